"""Repetition: how many proposals repeat a better proposal of the same image.

Shape letters:
    D: proposals of an image, sorted by descending score
"""

import numpy as np
from pycocotools import mask as mask_utils

from .image_proposals import ImageProposals
from .tables import Table, percent

# A mask repeats an earlier one if their IoU reaches the threshold.
THRESHOLDS = (0.5, 0.7, 0.9)
# Number of best proposals per image that are examined.
COUNT = 100


def overlap_with_earlier(masks: list[dict]) -> np.ndarray:
    """Compute the highest IoU of each mask with any mask before it.

    Args:
        masks: D masks of one image as compressed RLE, sorted by descending score.

    Returns:
        (D,) float64; 0 for the first mask.
    """
    if not masks:
        return np.zeros(0)
    return np.tril(mask_utils.iou(masks, masks, [0] * len(masks)), k=-1).max(axis=1)


class Repetition:
    """Collects how much the best 100 proposals of each image overlap with better ones."""

    def __init__(self) -> None:
        self._overlaps = []

    def add(self, image: ImageProposals) -> None:
        """Measure the proposals of one image.

        Args:
            image: an image with its proposals.
        """
        self._overlaps.extend(overlap_with_earlier(image.masks[:COUNT]))

    def tables(self) -> list[Table]:
        """Report the share of proposals, in percent, that repeat a better one, for each of `THRESHOLDS`.

        Returns:
            One table, "repetition".
        """
        overlaps = np.array(self._overlaps)
        title = (
            f"Repetition: share of the first {COUNT} proposals of each image whose mask has at least this IoU with the mask of an\n"
            "earlier proposal; in percent"
        )
        row = ["repeated", *(percent(overlaps >= threshold) for threshold in THRESHOLDS)]
        return [Table("repetition", title, ["", *(f"IoU {threshold}" for threshold in THRESHOLDS)], [row])]
