"""Where windows lie: the only place that maps cells and scales to image coordinates and back.

Frames: an image is resized to each level of the pyramid; cell (row y, column x) of a level's grid looks at the window of W x W pixels of
that level centred at (S x, S y) plus the level's shift. Coordinates are continuous: pixel (row r, column c) covers [c, c + 1) x [r, r + 1).

Shape letters: N windows, G objects, W window side in pixels of the level, S stride of the grid.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError


class Level(NamedTuple):
    """A level of the pyramid: sizes (height, width) of the image and of the resized image, and the grid's shift (y, x) in pixels."""

    image_size: tuple
    size: tuple
    shift: tuple = (0, 0)


def canonical_size(window_size: int) -> int:
    """Larger side in pixels of an object that fits its window canonically: 128 of 224 (DeepMask, section 3.2), rounded up as released."""
    return math.ceil(window_size * 128 / 224)


def pyramid_levels(image_size: tuple, exponents: list, shifts: list) -> list:
    """The levels for an image.

    Args:
        image_size: (height, width) in pixels.
        exponents: scales as exponents of 2.
        shifts: (y, x) shifts of the grid in pixels of the level, each of which makes a level of its own.

    Returns:
        list[Level]: scale by scale in the order given; sizes are rounded half up and at least one pixel.
    """
    height, width = image_size
    levels = []
    for exponent in exponents:
        size = tuple(max(1, math.floor(side * 2.0**exponent + 0.5)) for side in (height, width))
        levels += [Level((height, width), size, tuple(shift)) for shift in shifts]
    return levels


def grid_shifts(stride: int, grid_stride: int) -> list:
    """Shifts (y, x) of the input that turn a grid of `stride` into one of `grid_stride` pixels by interleaving.

    Raises:
        ValueError: `grid_stride` does not divide `stride`.
    """
    if grid_stride < 1 or stride % grid_stride:
        raise UserError(
            f"MODEL.SHARPMASK.GRID_STRIDE is {grid_stride}: it must divide the stride of IN_FEATURE, {stride}"
        )
    steps = range(0, stride, grid_stride)
    return [(y, x) for y in steps for x in steps]


def level_padding(level: Level, window_size: int, divisor: int) -> tuple:
    """Border around a level's image, (left, right, top, bottom) in pixels, so that windows may be centred on its edge.

    Half a window on every side, moved by the level's shift; right and bottom grow until the sides are multiples of `divisor`.
    """
    half = window_size // 2
    borders = []
    for side, shift in zip(level.size[::-1], level.shift[::-1]):
        before, after = half - shift, half + shift
        borders += [before, after + -(before + side + after) % divisor]
    return tuple(borders)


def cell_windows(level: Level, ys: Tensor, xs: Tensor, window_size: int, stride: int) -> Tensor:
    """Windows of cells in the image.

    Args:
        ys, xs: (N,) rows and columns of cells.

    Returns:
        (N, 4) float32 XYXY in the frame of the image, in pixels; they may lie partly outside.
    """
    half = window_size / 2
    centres = torch.stack([xs, ys], dim=1).float() * stride + ys.new_tensor(level.shift[::-1]).float()
    scale = centres.new_tensor([i / s for i, s in zip(level.image_size[::-1], level.size[::-1])])
    return torch.cat([(centres - half) * scale, (centres + half) * scale], dim=1)


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


def window_offsets(windows: Tensor, boxes: Tensor, *, share: float, side: float = 1.0) -> tuple:
    """How far windows are from the canonical windows of objects.

    Args:
        windows: (N, 4) XYXY squares in the image, in pixels.
        boxes: (G, 4) XYXY of the objects in the same frame.
        share: larger side of an object as a share of the side of its canonical window.
        side: of a window, in the unit that shifts are given in: 1 gives them as shares of the window's side, the side of the patch that
            the window is resized to gives them in pixels of the patch.

    Returns:
        shift (N, G): the larger of the two distances between the centres, in that unit;
        octaves (N, G): log2 of the window's side over the canonical one, absolute.
    """
    canonical = square_windows(boxes, share)
    sides = windows[:, 2] - windows[:, 0]  # N
    canonical_sides = canonical[:, 2] - canonical[:, 0]  # G
    centres = (windows[:, :2] + windows[:, 2:]) / 2
    canonical_centres = (canonical[:, :2] + canonical[:, 2:]) / 2
    distance = (centres[:, None] - canonical_centres[None]).abs().amax(dim=2)  # N x G
    shift = distance * (side / sides[:, None])
    octaves = (sides[:, None] / canonical_sides[None]).log2().abs()
    return shift, octaves


def label_rule(cfg, *, of_cells: bool = False) -> dict:
    """The keywords of `label_windows` that MODEL.SHARPMASK.LABELS gives.

    Args:
        cfg: reads MODEL.SHARPMASK.LABELS.
        of_cells: the windows to be labelled are those of a grid's cells. None of them is the canonical window of an object but by chance,
            while patches may be cut there.

    Raises:
        ValueError: a limit that leaves nothing to be positive; the message names the key.
    """
    labels = cfg.MODEL.SHARPMASK.LABELS
    for name in ("POSITIVE_SHIFT", "POSITIVE_OCTAVES"):
        if labels[name] < 0 or (of_cells and labels[name] == 0):
            least = "above 0: no window of a cell would be positive" if of_cells else "0 or above"
            raise UserError(f"MODEL.SHARPMASK.LABELS.{name} is {labels[name]}: it must be {least}")
    return {name.lower(): value for name, value in labels.items()}


def label_windows(
    windows: Tensor,
    boxes: Tensor,
    window_size: int,
    *,
    positive_shift: float,
    positive_octaves: float,
    negative_shift: float,
    negative_octaves: float,
) -> tuple:
    """Label windows by the objects they hold (DeepMask, section 3.2).

    A window is positive if it is within `positive_shift` pixels of the patch and `positive_octaves` of an object's canonical window,
    and negative if it is at least `negative_shift` pixels or `negative_octaves` away from all of them.

    Args:
        windows: (N, 4) XYXY squares in the image.
        boxes: (G, 4) XYXY of the objects in the same frame; G may be 0.

    Returns:
        labels (N,) int64: 1 positive, 0 negative, -1 neither;
        objects (N,) int64: the object of a positive window, the nearest if there are several; -1 for the others.
    """
    if len(boxes) == 0:
        return windows.new_zeros(len(windows), dtype=torch.long), windows.new_full(
            (len(windows),), -1, dtype=torch.long
        )
    share = canonical_size(window_size) / window_size
    shift, octaves = window_offsets(windows, boxes, share=share, side=window_size)
    inside = (shift <= positive_shift) & (octaves <= positive_octaves)
    # A limit of 0 is met by 0 alone, whose share of it is none.
    least = torch.finfo(shift.dtype).tiny
    shares = shift / max(positive_shift, least), octaves / max(positive_octaves, least)
    distance = torch.maximum(*shares).masked_fill(~inside, math.inf)
    nearest, objects = distance.min(dim=1)
    positive = nearest < math.inf
    negative = ((shift >= negative_shift) | (octaves >= negative_octaves)).all(dim=1)
    labels = torch.where(positive, 1, torch.where(negative, 0, -1))
    return labels, torch.where(positive, objects, -1)
