"""Geometry of square windows of an image, in continuous coordinates: pixel (row r, column c) covers [c, c + 1) x [r, r + 1).

Shape letters: N windows, G objects.
"""

import math

import torch
from torch import Tensor


def canonical_size(window_size: int) -> int:
    """Larger side of an object whose canonical window has a given side.

    It is 128 of 224 pixels (DeepMask, section 3.2), rounded up as in the released code.

    Args:
        window_size: side of the window in pixels.
    """
    return math.ceil(window_size * 128 / 224)


def pyramid_sizes(image_size: tuple[int, int], strides: list[int]) -> list[tuple[int, ...]]:
    """Counts the cells of an image on each level of a feature pyramid. Cells that lie partly in the image are counted.

    Args:
        image_size: (height, width) in pixels.
        strides: strides of the levels in pixels.

    Returns:
        Number of rows and columns on each level.
    """
    return [tuple(-(-side // stride) for side in image_size) for stride in strides]


def centred_windows(ys: Tensor, xs: Tensor, strides: Tensor, cells: Tensor) -> Tensor:
    """Computes windows that are centred on cells of a feature pyramid.

    On a level of stride S, cell (y, x) covers [S x, S (x + 1)) x [S y, S (y + 1)) of the image.

    Args:
        ys, xs: (N,) rows and columns of the cells.
        strides: (N,) stride of the level of each window in pixels.
        cells: (N,) side of each window in cells of its level, an odd number.

    Returns:
        (N, 4) float32 XYXY in the frame of the image, in pixels; windows may lie partly outside.
    """
    centres = (torch.stack([xs, ys], dim=1) + 0.5) * strides[:, None]
    half = (cells * strides)[:, None] / 2
    return torch.cat([centres - half, centres + half], dim=1).float()


def corner_aligned(windows: Tensor, mask_size: int) -> Tensor:
    """Enlarges windows for masks whose outermost cells have their centres on the edges of the window, as in the released code.

    Args:
        windows: (N, 4) XYXY in the image, in pixels.
        mask_size: side of a mask in cells.

    Returns:
        (N, 4) XYXY, larger by half a cell on every side: cells that are areas of these windows have the centres of the released code.
    """
    half_cell = (windows[:, 2:] - windows[:, :2]) / (mask_size - 1) / 2
    return torch.cat([windows[:, :2] - half_cell, windows[:, 2:] + half_cell], dim=1)


def square_windows(boxes: Tensor, share: float) -> Tensor:
    """Computes square windows that are centred on boxes.

    Args:
        boxes: (G, 4) XYXY in the image, in pixels.
        share: larger side of a box as a share of the side of its window.

    Returns:
        (G, 4) XYXY in the same frame.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True) / (2 * share)
    return torch.cat([centres - half, centres + half], dim=1)


def object_windows(boxes: Tensor, window_size: int) -> Tensor:
    """Computes the canonical windows of objects, which are centred on the box and proportional to its larger side.

    Args:
        boxes: (G, 4) XYXY of the objects in the image, in pixels.
        window_size: side in pixels of the patch that a window is resized to.

    Returns:
        (G, 4) XYXY squares in the same frame.
    """
    return square_windows(boxes, canonical_size(window_size) / window_size)
