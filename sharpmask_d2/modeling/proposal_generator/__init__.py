from .image_pyramid import ImagePyramid, SharpMaskGenerator

__all__ = ["ImagePyramid", "SharpMaskGenerator"]
