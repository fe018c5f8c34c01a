"""The windows of a feature pyramid: their numbers, their positions, and their order by non-maximum suppression.

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

# Number of windows that are compared first for each window that is asked for. On photographs, 2.1 to 2.3 were enough.
_FIRST = 2.5


class Cells(NamedTuple):
    """The cells that N windows are centred on, and the kinds of the windows; all fields are (N,) int64."""

    # From 0, the finest level.
    levels: Tensor
    # From 0 to D - 1.
    kinds: Tensor
    # Rows and columns of the level.
    ys: Tensor
    xs: Tensor


class PyramidWindows:
    """The geometry of windows of D kinds around every cell of every level, numbered level by level, kind by kind and row by row."""

    def __init__(self, *, strides: list[int], window_cells: list[int], object_share: float):
        """
        Args:
            strides: strides of the L levels in pixels, fine to coarse; each is twice the one before it.
            window_cells: side of each kind of window in cells of its level, an odd number.
            object_share: larger side of an object as a share of the side of its canonical window.

        Raises:
            UserError: an even number of cells, or strides that do not double; the message names the config key.
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
        """Larger side in pixels of an object whose canonical window is the smallest window."""
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
            numbers: (N,) int64, numbers of the windows from 0 to T - 1.
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
        """Returns the windows of N cells, (N, 4) float32 XYXY in the frame of the resized image, in pixels."""
        strides, sides = (torch.tensor(x, device=cells.ys.device) for x in (self.strides, self.window_cells))
        return centred_windows(cells.ys, cells.xs, strides[cells.levels], sides[cells.kinds])


def spread(windows: Tensor, scores: Tensor, thresh: float, count: int) -> Tensor:
    """Ranks windows that non-maximum suppression removes behind all others, so that the first windows cover more objects.

    Args:
        windows: (N, 4) XYXY, highest score first.
        scores: (N,) logits.
        thresh: IoU with a window of higher score, itself not suppressed, above which a window is suppressed; 1 keeps the order by score.
        count: number of windows to return.

    Returns:
        (min(count, N),) int64: indices of windows, first those that are not suppressed, then the suppressed ones, both by score.
    """
    if thresh >= 1:
        return torch.arange(min(count, len(windows)), device=windows.device)
    # Only windows of higher score suppress a window, so that often the first windows are enough; comparing few of them is faster.
    first = int(_FIRST * count)
    kept = _kept_by_nms(windows[:first], scores[:first], thresh)
    if len(kept) < len(windows) and int(kept.sum()) < count:
        kept = _kept_by_nms(windows, scores, thresh)
    return torch.cat([kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]])[:count]


def _kept_by_nms(windows: Tensor, scores: Tensor, thresh: float) -> Tensor:
    """(N,) bool: the windows that non-maximum suppression keeps."""
    kept = torch.zeros(len(windows), dtype=torch.bool, device=windows.device)
    for group in _groups_by_area(windows, thresh):
        kept[group[nms(windows[group], scores[group], thresh)]] = True
    return kept


def _groups_by_area(windows: Tensor, thresh: float) -> list[Tensor]:
    """Indices of the windows in groups. The areas of windows of two groups differ too much for an IoU above the threshold."""
    areas, kinds = ((windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])).unique(return_inverse=True)
    # The factor keeps windows together whose areas differ by rounding.
    apart = areas[:-1] < 0.999 * thresh * areas[1:]
    groups = F.pad(apart.long().cumsum(0), (1, 0))[kinds] if len(areas) else kinds
    order = groups.argsort(stable=True)
    return list(order.split(torch.bincount(groups).tolist()))
