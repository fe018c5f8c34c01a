"""Curves of recall: against the number of proposals and against IoU, by size of the objects."""

import math
from typing import Any

import numpy as np

from ..evaluation.recall import AREA_RANGES, IOU_THRESHOLDS, PROPOSAL_COUNTS, RecallAccumulator

# Numbers of proposals at which curves have a point: all small ones, then about 20 per factor of ten.
COUNTS = sorted({round(10**exponent) for exponent in np.linspace(0, math.log10(PROPOSAL_COUNTS[-1]), 61)})
# Numbers of proposals for which recall is shown against IoU.
IOU_COUNTS = PROPOSAL_COUNTS[1:]


def curves(recall: RecallAccumulator) -> dict[str, Any]:
    """Compute the curves of one file.

    Args:
        recall: matched masks of all images.

    Returns:
        In percent, nan without objects: {"average_recall": {area: one value per entry of `COUNTS`}, "recall": {number of proposals: {area:
        one value per IoU threshold}}}.
    """
    return {
        "average_recall": {area: (100 * recall.average_recall(COUNTS, area)).tolist() for area in AREA_RANGES},
        "recall": {
            str(count): {area: (100 * recall.recall(count, area)).tolist() for area in AREA_RANGES}
            for count in IOU_COUNTS
        },
    }


def axes_of_curves() -> dict[str, list]:
    """The values of the horizontal axes: "counts", numbers of proposals, and "ious", IoU thresholds."""
    return {"counts": COUNTS, "ious": [round(float(threshold), 2) for threshold in IOU_THRESHOLDS]}
