"""Masks of windows with their boxes, RLEs and bitmaps in the image, and the proposals of an image as `Instances`."""

from .proposals import build_proposals, rescale_proposals
from .tight_masks import TightMask
from .window_masks import WindowMasks

__all__ = ["TightMask", "WindowMasks", "build_proposals", "rescale_proposals"]
