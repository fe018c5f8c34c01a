from . import backbone, roi_heads
from .meta_arch import SharpMaskProposalNetwork
from .proposal_generator import ImagePyramid, SharpMaskGenerator
from .sharpmask import SharpMaskNetwork

__all__ = [
    "ImagePyramid",
    "SharpMaskGenerator",
    "SharpMaskNetwork",
    "SharpMaskProposalNetwork",
    "backbone",
    "roi_heads",
]
