"""Masks as bitmaps of their tight boxes, which take less memory than bitmaps of the whole image.

Shape letters: h w height and width of a tight box in pixels, P points of a polygon.
"""

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as mask_utils


class TightMask(NamedTuple):
    """A mask as the bitmap of its tight box."""

    # Of the first pixel of the box in pixels of the image.
    x: int
    y: int
    # (h, w) bool; (0, 0) for an empty mask.
    bitmap: np.ndarray

    @classmethod
    def from_bitmap(cls, bitmap: np.ndarray) -> "TightMask":
        """The tight mask of a bitmap of the whole image, (H, W) bool."""
        rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
        if not len(rows):
            return cls(0, 0, np.zeros((0, 0), dtype=bool))
        x, y = int(columns[0]), int(rows[0])
        return cls(x, y, bitmap[y : rows[-1] + 1, x : columns[-1] + 1])

    @classmethod
    def from_rle(cls, rle: dict[str, Any]) -> "TightMask":
        """The tight mask of a compressed RLE.

        Args:
            rle: dict of size and counts, as pycocotools has it.
        """
        return cls.from_bitmap(mask_utils.decode(rle).astype(bool))

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The tight box, XYXY in pixels of the image (first pixel, last pixel + 1); zeros for an empty mask."""
        height, width = self.bitmap.shape
        return self.x, self.y, self.x + width, self.y + height

    def paste(self, image_size: tuple[int, int]) -> np.ndarray:
        """The bitmap of the whole image.

        Args:
            image_size: (H, W) in pixels.

        Returns:
            (H, W) bool.
        """
        pasted = np.zeros(image_size, dtype=bool)
        x0, y0, x1, y1 = self.box
        pasted[y0:y1, x0:x1] = self.bitmap
        return pasted

    def polygons(self, *, tolerance: float = 0.5) -> list[np.ndarray]:
        """Outlines of the parts of the mask. Holes are filled.

        Args:
            tolerance: maximum distance of an outline from the outline along the pixels, in pixels; 0 keeps every corner. Default: 0.5.

        Returns:
            Arrays (P, 2) float64 of x, y in pixels of the image, from the largest part to the smallest; an empty list for an empty mask.

        Raises:
            ValueError: the tolerance is negative or not finite.
        """
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be 0 or more pixels, got {tolerance}")
        return [outline + (self.x, self.y) for outline in _outlines(self.bitmap, tolerance)]


def _outlines(bitmap: np.ndarray, tolerance: float) -> list[np.ndarray]:
    """The outer outlines of a bitmap (h, w) bool: arrays (P, 2) of x, y in pixels of the bitmap."""
    if not bitmap.size:
        return []
    # OpenCV's outlines run through the centres of pixels. In an image twice as large they run a quarter of a pixel inside the true outline,
    # so that the centres of all pixels stay within them.
    doubled = bitmap.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    found = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[-2]
    found = sorted(found, key=cv2.contourArea, reverse=True)
    outlines = [cv2.approxPolyDP(outline, 2 * tolerance, True)[:, 0] for outline in found]
    # A part of one pixel, or a thin one, may lose its corners to the tolerance.
    outlines = [short if len(short) > 2 else full[:, 0] for short, full in zip(outlines, found)]
    return [outline / 2 + 0.25 for outline in outlines]
