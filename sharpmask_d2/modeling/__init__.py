from . import backbone, roi_heads
from .meta_arch import SegmentProposalNetwork, SharpMaskProposalNetwork
from .proposal_generator import ImagePyramid, SharpMaskFPN, SharpMaskGenerator
from .sharpmask import SharpMaskNetwork

__all__ = [
    "ImagePyramid",
    "SegmentProposalNetwork",
    "SharpMaskFPN",
    "SharpMaskGenerator",
    "SharpMaskNetwork",
    "SharpMaskProposalNetwork",
    "backbone",
    "roi_heads",
]
