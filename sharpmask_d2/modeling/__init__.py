from . import backbone, roi_heads
from .image_pyramid.network import SharpMaskNetwork
from .meta_arch import SegmentProposalNetwork, SharpMaskProposalNetwork
from .proposal_generator import ImagePyramid, SharpMaskFPN, SharpMaskGenerator
from .test_time_augmentation import ProposalMaskTTA

__all__ = [
    "ImagePyramid",
    "ProposalMaskTTA",
    "SegmentProposalNetwork",
    "SharpMaskFPN",
    "SharpMaskGenerator",
    "SharpMaskNetwork",
    "SharpMaskProposalNetwork",
    "backbone",
    "roi_heads",
]
