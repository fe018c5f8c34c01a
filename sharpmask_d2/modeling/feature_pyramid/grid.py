"""Windows on a feature pyramid: how they are numbered and where they lie.

Shape letters: L levels, D kinds of windows (numbers of cells), T windows of an image, N of them, G objects, Y X cells of a level.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from ...errors import UserError
from ...windows.geometry import centred_windows, square_windows
from .labels import enlarged

# Windows that are compared for each that is asked for, before all are: on photographs 2.1 to 2.3 were enough.
_FIRST = 2.5


class Cells(NamedTuple):
    """Windows by their cells, all (N,) int64: level, kind, row, column."""

    levels: Tensor
    kinds: Tensor
    ys: Tensor
    xs: Tensor


class PyramidWindows:
    """Windows of a few kinds around every cell of every level; numbered level by level, kind by kind and row by row."""

    def __init__(self, *, strides: list, window_cells: list, object_share: float):
        """
        Args:
            strides: of the L levels in pixels, fine to coarse.
            window_cells: side of each kind of window in cells of its level.
            object_share: larger side of an object that fits its window canonically, as a share of the window's.

        Raises:
            ValueError: an even number of cells, or strides that do not double.
        """
        if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:])):
            raise UserError(
                "MODEL.SHARPMASK.FPN.IN_FEATURES, or for a mask head MODEL.ROI_HEADS.IN_FEATURES: with EXTRA_LEVELS the strides are "
                f"{list(strides)}, each has to be twice the one before"
            )
        if any(cells % 2 == 0 for cells in window_cells):
            raise UserError(
                f"MODEL.SHARPMASK.FPN.WINDOW_CELLS is {list(window_cells)}: windows lie around a cell, so they have odd sides"
            )
        self.strides, self.window_cells = list(strides), list(window_cells)
        self.object_share = object_share

    @classmethod
    def from_config(cls, cfg, strides: list) -> "PyramidWindows":
        """The windows that MODEL.SHARPMASK.FPN of a config describes.

        Args:
            cfg: a config, of which EXTRA_LEVELS, WINDOW_CELLS and OBJECT_SHARE are read.
            strides: of the backbone's features in pixels, fine to coarse.

        Raises:
            UserError: see the constructor.
        """
        fpn = cfg.MODEL.SHARPMASK.FPN
        coarser = [strides[-1] * 2 ** (i + 1) for i in range(fpn.EXTRA_LEVELS)]
        return cls(strides=[*strides, *coarser], window_cells=fpn.WINDOW_CELLS, object_share=fpn.OBJECT_SHARE)

    @property
    def smallest_object(self) -> float:
        """Larger side in pixels of an object that fits the smallest window canonically."""
        return self.object_share * self.strides[0] * min(self.window_cells)

    def canonical_windows(self, boxes: Tensor, mask_window: float) -> Tensor:
        """The windows that the masks of objects are decoded in.

        Args:
            boxes: (G, 4) XYXY of the objects in the frame of the resized image, in pixels. Objects that are too small for the smallest
                window get that window.
            mask_window: side of the window whose mask is decoded, in sides of the window that is scored.

        Returns:
            (G, 4) XYXY squares in that frame.
        """
        return square_windows(enlarged(boxes, self.smallest_object), self.object_share / mask_window)

    def cells(self, numbers: Tensor, sizes: list) -> Cells:
        """Cells of windows.

        Args:
            numbers: (N,) int64 of 0 .. T - 1.
            sizes: (Y, X) of each level.
        """
        kinds = len(self.window_cells)
        counts = torch.tensor([kinds * rows * columns for rows, columns in sizes], device=numbers.device)
        ends = counts.cumsum(0)
        levels = torch.searchsorted(ends, numbers, right=True)
        rows, columns = torch.tensor(sizes, device=numbers.device).T
        inside = numbers - (ends - counts)[levels]
        kind, cell = inside // (rows * columns)[levels], inside % (rows * columns)[levels]
        return Cells(levels, kind, cell // columns[levels], cell % columns[levels])

    def windows(self, cells: Cells) -> Tensor:
        """(N, 4) XYXY in the frame of the image, in pixels."""
        strides, sides = (torch.tensor(x, device=cells.ys.device) for x in (self.strides, self.window_cells))
        return centred_windows(cells.ys, cells.xs, strides[cells.levels], sides[cells.kinds])


def spread(windows: Tensor, scores: Tensor, thresh: float, count: int) -> Tensor:
    """The first of an order of windows in which those beside a better one step back, so that the first show more objects.

    Args:
        windows: (N, 4) XYXY, highest score first.
        scores: (N,).
        thresh: IoU with a better window, which has not stepped back itself, from which a window does; 1 leaves the order as it is.
        count: how many are asked for.

    Returns:
        (min(count, N),) int64: numbers of windows, first those that stay, then the others, both by score.
    """
    if thresh >= 1:
        return torch.arange(min(count, len(windows)), device=windows.device)
    # Whether a window stays is up to better ones: often the first are enough, and few are compared faster.
    first = int(_FIRST * count)
    stays = _stays(windows[:first], scores[:first], thresh)
    if len(stays) < len(windows) and int(stays.sum()) < count:
        stays = _stays(windows, scores, thresh)
    return torch.cat([stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]])[:count]


def _stays(windows: Tensor, scores: Tensor, thresh: float) -> Tensor:
    """(N,) bool: the windows that do not step back in `spread`."""
    stays = torch.zeros(len(windows), dtype=torch.bool, device=windows.device)
    for number in _alike(windows, thresh):
        stays[number[nms(windows[number], scores[number], thresh)]] = True
    return stays


def _alike(windows: Tensor, thresh: float) -> list:
    """Numbers of the windows in groups; those of two groups differ too much in area for an IoU above the threshold."""
    areas, kinds = ((windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])).unique(return_inverse=True)
    # Rounding must not tell windows apart.
    apart = areas[:-1] < 0.999 * thresh * areas[1:]
    groups = F.pad(apart.long().cumsum(0), (1, 0))[kinds] if len(areas) else kinds
    order = groups.argsort(stable=True)
    return list(order.split(torch.bincount(groups).tolist()))
