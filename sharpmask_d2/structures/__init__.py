"""Window masks: what the network says about windows, and their boxes, RLEs and bitmaps in the image."""

from .proposals import build_proposals, rescale_proposals
from .window_masks import WindowMasks

__all__ = ["WindowMasks", "build_proposals", "rescale_proposals"]
