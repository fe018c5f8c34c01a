"""Straight edges: masks whose outline has a long straight piece along the rows or columns of the image, which a window has cut off.

The side of a window cuts a mask along a row or a column of pixels. Outlines of objects seldom run along a row or column: a disc with a
diameter of at least 25 pixels has no straight piece longer than 40 % of its diameter. Only exactly straight pieces are counted, and small
masks are reported separately.

Shape letters:
    H, W: image height and width in pixels
    E: boundaries between two neighbouring rows of pixels
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as mask_utils

from ..recall import AREA_RANGES
from .image_proposals import ImageProposals, in_area_ranges
from .tables import Table, percent

# A straight piece counts if it is longer than this share of the larger side of the mask's tight box.
SHARE = 0.4
# Straight pieces nearer to the image border than this share of the image's larger side do not count: the image itself cuts masks there,
# and annotators end outlines a few pixels inside the border.
BORDER = 0.01
# Numbers of best proposals per image that are examined.
COUNTS = (10, 100)
_TRUE = "true masks"


def longest_straight_run(mask: np.ndarray, border: float = 0) -> int:
    """Find the longest horizontal or vertical straight piece of a mask's outline.

    A horizontal piece lies between two rows of pixels, and the mask lies on the same side of all of it. The sides of the image are not
    part of the outline.

    Args:
        mask: (H, W) bool, or integers 0 and 1.
        border: pieces nearer than this to the parallel side of the image are ignored, in pixels. Default: 0.

    Returns:
        The length in pixels; 0 if no outline lies inside the image.
    """
    mask = mask.astype(np.int8)
    return max(_longest_horizontal_run(mask, border), _longest_horizontal_run(mask.T, border))


def _longest_horizontal_run(mask: np.ndarray, border: float) -> int:
    steps = mask[1:] - mask[:-1]  # E x W: 1 where the mask begins below the boundary, -1 where it ends, 0 elsewhere
    boundaries = np.arange(1, len(mask))
    steps = steps[(boundaries >= border) & (len(mask) - boundaries >= border)]
    # All boundaries in one line, separated by zeros so that no run continues across two of them.
    line = np.pad(steps[steps.any(axis=1)], ((0, 0), (1, 1))).ravel()
    changes = np.flatnonzero(np.diff(line))
    lengths = np.diff(changes)
    return int(lengths[line[changes[:-1] + 1] != 0].max(initial=0))


def has_straight_edge(rle: dict[str, Any]) -> bool:
    """Decide whether a straight piece of the outline, away from the image border, exceeds 40 % of the larger side of the tight box.

    Args:
        rle: a mask of the whole image as compressed RLE.

    Returns:
        Whether there is such a piece; False for an empty mask.
    """
    _, _, width, height = mask_utils.toBbox(rle)
    return longest_straight_run(mask_utils.decode(rle), BORDER * max(rle["size"])) > SHARE * max(width, height)


class StraightEdges:
    """Collects which of the best proposals and of the true masks have a straight edge."""

    def __init__(self) -> None:
        # Name of the row -> areas of the masks, and whether each of them has a straight edge.
        self._masks = {name: ([], []) for name in (*map(_name, COUNTS), _TRUE)}

    def add(self, image: ImageProposals) -> None:
        """Examine the masks of one image.

        Args:
            image: an image with its proposals.
        """
        first = image.masks[: max(COUNTS)]
        areas, straight = _areas(first), [has_straight_edge(mask) for mask in first]
        for count in COUNTS:
            self._extend(_name(count), areas[:count], straight[:count])
        truth = image.objects.truth
        self._extend(_TRUE, _areas(truth.regions), [has_straight_edge(mask) for mask in truth.regions])

    def _extend(self, name: str, areas: ArrayLike, straight: list[bool]) -> None:
        for values, new in zip(self._masks[name], (areas, straight)):
            values.extend(new)

    def tables(self) -> list[Table]:
        """Report the share of masks with a straight edge, in percent, by size of the mask.

        Returns:
            One table, "straight edges".
        """
        rows = []
        for name, (areas, straight) in self._masks.items():
            counted, straight = in_area_ranges(np.array(areas)), np.array(straight, dtype=bool)
            rows.append([name, len(straight), *(percent(straight[chosen]) for chosen in counted)])
        title = (
            "Straight edges: masks with a horizontal or vertical piece of outline, away from the border of the image, that is longer than\n"
            f"{SHARE:.0%} of the larger side of the mask's box; in percent, by size of the mask (small masks naturally have such edges)"
        )
        return [Table("straight edges", title, ["masks", "number", *AREA_RANGES], rows)]


def _name(count: int) -> str:
    return f"first {count}"


def _areas(masks: list[dict]) -> list[float]:
    # One by one: of more than 255 masks together, pycocotools fails with an overflow beside numpy 2.
    return [float(mask_utils.area(mask)) for mask in masks]
