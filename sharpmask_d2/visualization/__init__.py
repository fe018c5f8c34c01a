from .overlay import choose_distinct, draw_masks

__all__ = ["choose_distinct", "draw_masks"]
