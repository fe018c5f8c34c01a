from ..image_pyramid.generator import ImagePyramid
from .sharpmask import SharpMaskGenerator
from .sharpmask_fpn import SharpMaskFPN

__all__ = ["ImagePyramid", "SharpMaskFPN", "SharpMaskGenerator"]
