from .image_pyramid import ImagePyramid
from .sharpmask_fpn import SharpMaskFPN
from .sharpmask_generator import SharpMaskGenerator

__all__ = ["ImagePyramid", "SharpMaskFPN", "SharpMaskGenerator"]
