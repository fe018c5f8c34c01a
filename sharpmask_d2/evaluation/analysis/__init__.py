"""Analysis of proposals: why objects are missed, and which defects the masks have. `analyze` runs all analyses."""

from .analyze import analyze
from .image_proposals import ImageProposals, images_of_results
from .masks_given_boxes import BoxDecoder
from .masks_given_clicks import ClickDecoder
from .missed_objects import WindowRule
from .model_proposals import images_of_model, window_rule
from .tables import Table

__all__ = [
    "BoxDecoder",
    "ClickDecoder",
    "ImageProposals",
    "Table",
    "WindowRule",
    "analyze",
    "images_of_model",
    "images_of_results",
    "window_rule",
]
