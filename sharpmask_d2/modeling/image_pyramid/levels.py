"""Levels of the image pyramid and the windows of their cells: the only place that maps cells of a level to image coordinates and back.

Frames: the image is resized to each level. Cell (row y, column x) of a level's grid looks at the window of W x W pixels of that level that
is centred at (S x, S y) plus the level's shift. Coordinates are continuous: pixel (row r, column c) covers [c, c + 1) x [r, r + 1).

Shape letters: N windows, W window side in pixels of the level, S stride of the grid in pixels of the level, Y X rows and columns of a grid.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UserError


class Level(NamedTuple):
    """A level of the image pyramid.

    Attributes:
        image_size: (height, width) of the image in pixels.
        size: (height, width) of the resized image in pixels.
        shift: (y, x) by which the centres of the level's windows are shifted, in pixels of the level; default: (0, 0).
    """

    image_size: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)


def pyramid_levels(image_size: tuple[int, int], exponents: list[float], shifts: list[tuple[int, int]]) -> list[Level]:
    """The levels of an image.

    Args:
        image_size: (height, width) of the image in pixels.
        exponents: scales of the levels, as exponents of 2.
        shifts: (y, x) shifts of the grid in pixels of the level, each of which makes a level of its own.

    Returns:
        list[Level], scale by scale in the order given; sizes are rounded half up and at least one pixel.
    """
    height, width = image_size
    levels = []
    for exponent in exponents:
        size = tuple(max(1, math.floor(side * 2.0**exponent + 0.5)) for side in (height, width))
        levels += [Level((height, width), size, tuple(shift)) for shift in shifts]
    return levels


def grid_shifts(stride: int, grid_stride: int) -> list[tuple[int, int]]:
    """Shifts of the input by which grids of `stride` pixels interleave to one of `grid_stride` pixels.

    Args:
        stride: S, of the network, in pixels of the level.
        grid_stride: wanted distance of neighbouring windows in pixels of the level; a divisor of `stride`.

    Returns:
        list of (y, x) in pixels of the level.

    Raises:
        UserError: `grid_stride` does not divide `stride`.
    """
    if grid_stride < 1 or stride % grid_stride:
        raise UserError(
            f"MODEL.SHARPMASK.GRID_STRIDE is {grid_stride}: it must divide the stride of IN_FEATURE, {stride}"
        )
    steps = range(0, stride, grid_stride)
    return [(y, x) for y in steps for x in steps]


def level_padding(level: Level, window_size: int, divisor: int) -> tuple[int, int, int, int]:
    """Border around a level's image that lets windows be centred on its edges.

    It is half a window on every side, moved by the level's shift; right and bottom borders grow until the sides are multiples of `divisor`.

    Args:
        level: the level.
        window_size: W.
        divisor: what both sides of the padded image have to be multiples of.

    Returns:
        (left, right, top, bottom) in pixels of the level.
    """
    half = window_size // 2
    borders = []
    for side, shift in zip(level.size[::-1], level.shift[::-1]):
        before, after = half - shift, half + shift
        borders += [before, after + -(before + side + after) % divisor]
    return tuple(borders)


def cell_windows(level: Level, ys: Tensor, xs: Tensor, window_size: int, stride: int) -> Tensor:
    """Windows of cells, in the image.

    Args:
        level: whose cells they are.
        ys, xs: (N,) int64, rows and columns of the cells.
        window_size: W.
        stride: S.

    Returns:
        (N, 4) float32 XYXY in the frame of the image, in pixels; they may lie partly outside.
    """
    half = window_size / 2
    centres = torch.stack([xs, ys], dim=1).float() * stride + ys.new_tensor(level.shift[::-1]).float()
    scale = centres.new_tensor([i / s for i, s in zip(level.image_size[::-1], level.size[::-1])])
    return torch.cat([(centres - half) * scale, (centres + half) * scale], dim=1)


def grid_size(level: Level, window_size: int, stride: int, divisor: int) -> tuple[int, ...]:
    """Rows and columns of the grid that the network returns for a level, known without running it.

    Args:
        level: the level.
        window_size: W.
        stride: S, that of the feature that the head reads.
        divisor: see `level_padding`.

    Returns:
        (Y, X).
    """
    left, right, top, bottom = level_padding(level, window_size, divisor)
    sides = level.size[0] + top + bottom, level.size[1] + left + right
    return tuple(-(-side // stride) - window_size // stride + 1 for side in sides)


def grid_windows(
    levels: list[Level], sizes: list[tuple[int, int]], window_size: int, stride: int, device: torch.device
) -> Tensor:
    """Windows of all cells of an image, level by level and row by row.

    Args:
        levels: list[Level] of the image.
        sizes: (Y, X) of each level.
        window_size: W.
        stride: S.
        device: of the result.

    Returns:
        (N, 4) float32 XYXY in the frame of the image, in pixels; they may lie partly outside.
    """
    windows = []
    for level, (rows, columns) in zip(levels, sizes):
        cells = torch.arange(rows * columns, device=device)
        windows.append(cell_windows(level, cells // columns, cells % columns, window_size, stride))
    return torch.cat(windows)


def split_cells(cells: Tensor, sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Numbers of cells, counted over all levels, as rows and columns of each level.

    Args:
        cells: (N,) int64, ascending numbers in the order of `grid_windows`.
        sizes: (Y, X) of each level.

    Returns:
        (ys, xs) int64 for each level, in the order of `cells`.
    """
    bounds = torch.tensor([rows * columns for rows, columns in sizes]).cumsum(0)
    counts = torch.searchsorted(cells.cpu(), bounds).diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()
    split = zip(sizes, cells.split(counts), [0, *bounds.tolist()])
    return [((chosen - first) // columns, (chosen - first) % columns) for (_, columns), chosen, first in split]
