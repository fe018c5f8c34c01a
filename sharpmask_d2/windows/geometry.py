"""Geometry of square windows of an image, in continuous coordinates: pixel (row r, column c) covers [c, c + 1) x [r, r + 1).

Shape letters: N windows, G objects.
"""

import math

import torch
from torch import Tensor


def canonical_size(window_size: int) -> int:
    """Larger side in pixels of an object that fits its window canonically: 128 of 224 (DeepMask, section 3.2), rounded up as released."""
    return math.ceil(window_size * 128 / 224)


def pyramid_sizes(image_size: tuple, strides: list) -> list:
    """Rows and columns (Y, X) of the cells that an image has on each level of a feature pyramid; those it covers in part count.

    Args:
        image_size: (height, width) in pixels.
        strides: of the levels, in pixels.
    """
    return [tuple(-(-side // stride) for side in image_size) for stride in strides]


def centred_windows(ys: Tensor, xs: Tensor, strides: Tensor, cells: Tensor) -> Tensor:
    """Windows centred on cells of a feature pyramid: cell (y, x) covers [S x, S (x + 1)) x [S y, S (y + 1)) of the image.

    Args:
        ys, xs: (N,) rows and columns of cells.
        strides: (N,) pixels that a cell of the window's level covers.
        cells: (N,) side of the window in such cells, odd.

    Returns:
        (N, 4) float32 XYXY in the frame of the image, in pixels; they may lie partly outside.
    """
    centres = (torch.stack([xs, ys], dim=1) + 0.5) * strides[:, None]
    half = (cells * strides)[:, None] / 2
    return torch.cat([centres - half, centres + half], dim=1).float()


def corner_aligned(windows: Tensor, mask_size: int) -> Tensor:
    """Windows of masks whose outermost cells have their centres on the window's edge, as the released code lays them.

    Args:
        windows: (N, 4) XYXY in the image, in pixels.
        mask_size: cells along the side of a mask.

    Returns:
        (N, 4) XYXY: half a cell larger on every side, so that cells taken as areas have those centres.
    """
    half_cell = (windows[:, 2:] - windows[:, :2]) / (mask_size - 1) / 2
    return torch.cat([windows[:, :2] - half_cell, windows[:, 2:] + half_cell], dim=1)


def square_windows(boxes: Tensor, share: float) -> Tensor:
    """Square windows centred on boxes.

    Args:
        boxes: (G, 4) XYXY in the image, in pixels.
        share: larger side of the box as a share of the window's side.

    Returns:
        (G, 4) XYXY in the same frame.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True) / (2 * share)
    return torch.cat([centres - half, centres + half], dim=1)


def object_windows(boxes: Tensor, window_size: int) -> Tensor:
    """Canonical windows of objects: centred on the box, its larger side canonical.

    Args:
        boxes: (G, 4) XYXY in the image, in pixels.

    Returns:
        (G, 4) XYXY squares in the same frame.
    """
    return square_windows(boxes, canonical_size(window_size) / window_size)
