"""Masks that are cut off: outlines with a long edge that runs exactly along the rows or the columns of the image.

The side of a window cuts a mask along a row or a column of pixels. Outlines of things seldom run along one for long: a disc of 25 pixels
and more never does for 40 % of its side. So what counts is an exactly straight run, and small masks are reported apart.

Shape letters:
    H, W: image height and width
    E: places between two rows of pixels
"""

import numpy as np
from pycocotools import mask as mask_utils

from .proposed_image import ProposedImage, in_area_ranges
from .recall import AREA_RANGES
from .tables import Table, percent

# A run counts from this share of the larger side of the mask's tight box.
SHARE = 0.4
# Nearer to the border of the image than this share of the image's larger side an edge does not count: there the image cuts masks,
# and people who draw outlines stop a few pixels short of it.
BORDER = 0.01
COUNTS = (10, 100)
_TRUE = "true masks"


def longest_straight_run(mask: np.ndarray, border: float = 0) -> int:
    """The longest horizontal or vertical straight piece of a mask's outline.

    A horizontal piece lies between two rows of pixels, and the mask is on one and the same side of all of it.

    Args:
        mask: (H, W) bool or of 0 and 1.
        border: pieces nearer than this to the side of the image that they run along do not count, in pixels. The sides of the image are
            no outline.

    Returns:
        its length in pixels, 0 without an outline inside the image.
    """
    mask = mask.astype(np.int8)
    return max(_longest_row_run(mask, border), _longest_row_run(mask.T, border))


def _longest_row_run(mask: np.ndarray, border: float) -> int:
    steps = mask[1:] - mask[:-1]  # E x W: 1 where the mask begins below, -1 where it ends, 0 where there is no outline
    places = np.arange(1, len(mask))
    steps = steps[(places >= border) & (len(mask) - places >= border)]
    # All places one behind the other, with a 0 between two of them so that no run goes on in the next.
    line = np.pad(steps[steps.any(axis=1)], ((0, 0), (1, 1))).ravel()
    changes = np.flatnonzero(np.diff(line))
    lengths = np.diff(changes)
    return int(lengths[line[changes[:-1] + 1] != 0].max(initial=0))


def has_straight_edge(rle: dict) -> bool:
    """Whether a horizontal or vertical straight piece of the outline, away from the border of the image, is longer than 40 % of the
    larger side of the mask's tight box; an empty mask has none.

    Args:
        rle: the mask as compressed RLE, of the whole image.
    """
    _, _, width, height = mask_utils.toBbox(rle)
    return longest_straight_run(mask_utils.decode(rle), BORDER * max(rle["size"])) > SHARE * max(width, height)


class StraightEdges:
    """Collects, image by image, which of the first proposals and of the true masks have a straight edge."""

    def __init__(self) -> None:
        # Name of the row -> areas of masks, and whether they have a straight edge.
        self._masks = {name: ([], []) for name in (*map(_name, COUNTS), _TRUE)}

    def add(self, image: ProposedImage) -> None:
        first = image.masks[: max(COUNTS)]
        areas, straight = mask_utils.area(first), [has_straight_edge(mask) for mask in first]
        for count in COUNTS:
            self._extend(_name(count), areas[:count], straight[:count])
        truth = image.objects.truth
        self._extend(_TRUE, mask_utils.area(truth.regions), [has_straight_edge(mask) for mask in truth.regions])

    def _extend(self, name: str, areas, straight) -> None:
        for values, new in zip(self._masks[name], (areas, straight)):
            values.extend(new)

    def tables(self) -> list:
        """The shares in percent, by the size of the mask."""
        rows = []
        for name, (areas, straight) in self._masks.items():
            counted, straight = in_area_ranges(np.array(areas)), np.array(straight, dtype=bool)
            rows.append([name, len(straight), *(percent(straight[chosen]) for chosen in counted)])
        title = (
            "Straight edges: masks with a horizontal or vertical piece of outline, away from the border of the image, that is longer than\n"
            f"{SHARE:.0%} of the larger side of the mask's box; in percent, by size of the mask (small ones have such edges by nature)"
        )
        return [Table("straight edges", title, ["masks", "number", *AREA_RANGES], rows)]


def _name(count: int) -> str:
    return f"first {count}"
