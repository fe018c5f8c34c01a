from .image_pyramid import ImagePyramid
from .sharpmask_generator import SharpMaskGenerator

__all__ = ["ImagePyramid", "SharpMaskGenerator"]
