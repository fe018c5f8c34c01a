"""Proposals that show again what a better one shows.

Shape letters:
    D: proposals of an image, best first
"""

import numpy as np
from pycocotools import mask as mask_utils

from .proposed_image import ProposedImage
from .tables import Table, percent

# IoU with an earlier mask from which a mask repeats it.
THRESHOLDS = (0.5, 0.7, 0.9)
COUNT = 100


def overlap_with_earlier(masks: list) -> np.ndarray:
    """The highest IoU of each mask with one before it.

    Args:
        masks: D RLEs of one image, best first.

    Returns:
        (D,), 0 for the first.
    """
    if not masks:
        return np.zeros(0)
    return np.tril(mask_utils.iou(masks, masks, [0] * len(masks)), k=-1).max(axis=1)


class Repetition:
    """Collects, image by image, how far the first 100 proposals repeat earlier ones."""

    def __init__(self) -> None:
        self._overlaps = []

    def add(self, image: ProposedImage) -> None:
        self._overlaps.extend(overlap_with_earlier(image.masks[:COUNT]))

    def tables(self) -> list:
        """The share that repeats an earlier proposal, in percent, for each of THRESHOLDS."""
        overlaps = np.array(self._overlaps)
        title = f"Repetition: share of the first {COUNT} whose mask has at least this IoU with that of an earlier one; in percent"
        row = ["repeated", *(percent(overlaps >= threshold) for threshold in THRESHOLDS)]
        return [Table("repetition", title, ["", *(f"IoU {threshold}" for threshold in THRESHOLDS)], [row])]
