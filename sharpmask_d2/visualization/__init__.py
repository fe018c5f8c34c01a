"""Pictures of masks: overlays on an image, and the images with the best and the worst proposals."""

from .extremes import rank_images, write_extremes
from .overlay import choose_distinct, draw_masks
from .pictures import name_pictures, write_picture

__all__ = ["choose_distinct", "draw_masks", "name_pictures", "rank_images", "write_extremes", "write_picture"]
