from .extremes import rank_images, write_extremes
from .overlay import choose_distinct, draw_masks

__all__ = ["choose_distinct", "draw_masks", "rank_images", "write_extremes"]
