"""Masks of windows: a grid of logits with the window of the image that it covers. Pixels are computed only on request.

Shape letters:
    N: window masks         M: side of the logit grid
    H, W: image height and width
    B: windows of a chunk   K: image columns of all windows of a chunk
    G: maximum number of knots of a window in a chunk       R: runs of foreground knots in columns, with an edge at each end

How masks become runs: bilinear interpolation is separable. After interpolation along x alone, each image column is a piecewise linear
function of y whose knots are the grid rows. The position at which it crosses the threshold follows from the knots on both sides of the
crossing, so that no pixel has to be interpolated: a column costs G knots, not its height. Boxes, areas, RLEs and bitmaps all come from the
same runs and agree to the pixel.
"""

import math
import numbers
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes

from .rle import Runs, boxes_and_areas, encode_runs, fill_positions, fill_runs
from .tight_masks import TightMask

__all__ = ["WindowMasks"]

# Knots interpolated at a time: as many as fit a CPU's cache, or enough to occupy another device.
CHUNK_CPU = 2**19
CHUNK_DEVICE = 2**24
# Maximum number of grid rows that are searched for foreground together; a power of two.
_ROWS = 8


class WindowMasks:
    """N window masks of one image; a field of :class:`detectron2.structures.Instances`.

    The pixel in row r and column c belongs to mask n if its centre (c + 0.5, r + 0.5) lies in the image and in window n (left and top edges
    included, right and bottom edges excluded) and the logit interpolated there is above the threshold. Cell (i, j) of the grid (row i,
    column j) has its centre at ((j + 0.5) / M, (i + 0.5) / M) of the window. Interpolation is bilinear; beyond the outermost centres, the
    logits of the outermost cells continue.

    The runs of pixels are computed once, on the first request. The tensors must therefore not be changed in place.

    Attributes:
        logits: (N, M, M), floating point.
        windows: (N, 4) XYXY in pixels of the image.
        image_size: (H, W) in pixels.
        threshold: logit above which a pixel is foreground.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        windows: torch.Tensor,
        image_size: tuple[int, int],
        *,
        threshold: float = math.log(0.2 / 0.8),
    ):
        """
        Args:
            logits: (N, M, M) finite mask logits, float32, float16 or bfloat16.
            windows: (N, 4) XYXY windows in pixels of the image (continuous coordinates). They need not be square and may lie partly or
                wholly outside the image. A window without area or with a coordinate that is not finite has an empty mask.
            image_size: (H, W) of the image in pixels, both positive.
            threshold: finite logit above which an interpolated logit is foreground; the default is the logit of 0.2.

        Raises:
            ValueError: an argument has a wrong shape, type, device or value; the message names it.
        """
        if logits.dim() != 3 or logits.shape[1] != logits.shape[2] or logits.shape[1] == 0:
            raise ValueError(f"logits must be (N, M, M) with M > 0, got {tuple(logits.shape)}")
        if not logits.is_floating_point():
            raise ValueError(f"logits must be floating point, got {logits.dtype}")
        if windows.dim() != 2 or windows.shape[1] != 4:
            raise ValueError(f"windows must be (N, 4), got {tuple(windows.shape)}")
        if len(logits) != len(windows):
            raise ValueError(f"logits and windows must have the same length, got {len(logits)} and {len(windows)}")
        if logits.device != windows.device:
            raise ValueError(f"logits and windows must be on one device, got {logits.device} and {windows.device}")
        height, width = (int(side) for side in image_size)
        if height <= 0 or width <= 0:
            raise ValueError(f"image_size must be a positive (H, W), got {tuple(image_size)}")
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be finite, got {threshold}")
        self.logits = logits
        self.windows = windows if windows.is_floating_point() else windows.float()
        self.image_size = (height, width)
        self.threshold = float(threshold)
        self._known_runs = None

    # ------------------------------------------------------------------ a field of Instances

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, item: Union[int, slice, torch.Tensor]) -> "WindowMasks":
        """Some of the masks.

        Args:
            item: which masks: an int (the result has one mask), a slice, or a bool or long tensor.

        Raises:
            IndexError: an int is out of range.
        """
        if isinstance(item, numbers.Integral):
            if not -len(self) <= item < len(self):
                raise IndexError(f"index {item} is out of range for {len(self)} window masks")
            item = [int(item)]
        if isinstance(item, slice):
            chosen = self._like(self.logits[item], self.windows[item])
        else:
            # On a CPU, index_select copies rows several times as fast as indexing.
            item = torch.arange(len(self), device=self.device)[item]
            chosen = self._like(self.logits.index_select(0, item), self.windows.index_select(0, item))
        if self._known_runs is not None:
            chosen._known_runs = self._known_runs.select(item)
        return chosen

    def __repr__(self) -> str:
        height, width = self.image_size
        return (
            f"WindowMasks(num_masks={len(self)}, mask_side={self.logits.shape[-1]}, image_height={height}, "
            f"image_width={width}, threshold={self.threshold:.4g}, device={self.device})"
        )

    @property
    def device(self) -> torch.device:
        """The device of the logits and windows."""
        return self.logits.device

    def to(self, device: Union[str, torch.device]) -> "WindowMasks":
        """The masks on another device."""
        moved = self._like(self.logits.to(device), self.windows.to(device))
        if self._known_runs is not None:
            moved._known_runs = Runs(*(x.to(device) for x in self._known_runs))
        return moved

    @staticmethod
    def cat(masks: Sequence["WindowMasks"]) -> "WindowMasks":
        """Concatenate several sets of masks.

        Args:
            masks: sets of one image size, threshold and grid.

        Raises:
            ValueError: there is no set, or the sets differ in image size, threshold or grid.
        """
        if not masks:
            raise ValueError("cat needs at least one WindowMasks")
        for name, values in (
            ("image_size", {m.image_size for m in masks}),
            ("threshold", {m.threshold for m in masks}),
            ("mask side", {m.logits.shape[-1] for m in masks}),
        ):
            if len(values) > 1:
                raise ValueError(f"cat needs one {name}, got {sorted(values)}")
        return masks[0]._like(torch.cat([m.logits for m in masks]), torch.cat([m.windows for m in masks]))

    def _like(self, logits: torch.Tensor, windows: torch.Tensor) -> "WindowMasks":
        return WindowMasks(logits, windows, self.image_size, threshold=self.threshold)

    # ------------------------------------------------------------------ other frames

    def scale(self, scale_x: float, scale_y: float, image_size: tuple[int, int]) -> "WindowMasks":
        """The masks in the frame of the resized image.

        Args:
            scale_x: new width divided by old width.
            scale_y: new height divided by old height.
            image_size: (H, W) of the resized image in pixels.
        """
        factors = self.windows.new_tensor([scale_x, scale_y, scale_x, scale_y])
        return WindowMasks(self.logits, self.windows * factors, image_size, threshold=self.threshold)

    def hflip(self) -> "WindowMasks":
        """The masks in the frame of the image mirrored left to right.

        Pasted, they equal the mirrored bitmaps, except where an edge of a window runs exactly through pixel centres: pixels on the left
        edge belong to the window, those on the right edge do not.
        """
        x0, y0, x1, y1 = self.windows.unbind(1)
        width = self.image_size[1]
        return self._like(self.logits.flip(2), torch.stack([width - x1, y0, width - x0, y1], dim=1))

    # ------------------------------------------------------------------ masks in pixels

    def encode(self) -> tuple[Boxes, torch.Tensor, list[dict]]:
        """Boxes, areas and RLEs in one pass, see `boxes`, `areas` and `rle`."""
        runs = self._runs()
        boxes, areas = boxes_and_areas(runs, self.image_size[0])
        return Boxes(boxes), areas, encode_runs(runs, self.image_size)

    def boxes(self) -> Boxes:
        """Tight XYXY boxes in pixels of the image (first pixel, last pixel + 1); zeros for an empty mask."""
        return Boxes(boxes_and_areas(self._runs(), self.image_size[0])[0])

    def areas(self) -> torch.Tensor:
        """(N,) long, number of foreground pixels of each mask."""
        return boxes_and_areas(self._runs(), self.image_size[0])[1]

    def nonempty(self) -> torch.Tensor:
        """(N,) bool, whether each mask has a foreground pixel."""
        return self._runs().per_mask > 0

    def rle(self) -> list[dict]:
        """N dicts {"size": [H, W], "counts": str}: pycocotools' compressed RLE, with counts as text so that JSON can hold them."""
        return encode_runs(self._runs(), self.image_size)

    def paste(self, indices: Union[int, slice, torch.Tensor, None] = None) -> torch.Tensor:
        """Bitmaps of the full image.

        Args:
            indices: which masks, in any form that `masks[indices]` accepts; all by default.

        Returns:
            (number of masks chosen, H, W) bool.
        """
        chosen = self if indices is None else self[indices]
        return fill_runs(chosen._runs(), self.image_size)

    def pixels(self) -> torch.Tensor:
        """Bitmaps as rows of pixels in COCO's order, column by column: (N, W * H) int8 of 0 and 1."""
        height, width = self.image_size
        return fill_positions(self._runs(), height * width)

    def _runs(self) -> Runs:
        """The foreground of all masks as runs of pixels in image columns; computed once."""
        if self._known_runs is None:
            self._known_runs = self._find_runs()
        return self._known_runs

    @torch.no_grad()
    def _find_runs(self) -> Runs:
        # Rounded to float32, so that every comparison and every crossing uses one number.
        threshold = float(torch.tensor(self.threshold, dtype=torch.float32))
        active, parts = _foreground_parts(self.logits, self.windows, self.image_size, threshold)
        side = self.logits.shape[-1]
        columns = _image_columns(parts, side)
        widths = parts.col_hi - parts.col_lo
        stops = [0, *widths.cumsum(0).tolist()]
        budget = CHUNK_CPU if self.device.type == "cpu" else CHUNK_DEVICE
        pieces = []
        for span in _chunks(widths.clamp(min=side) * side, budget):
            own = slice(stops[span.start], stops[span.stop])
            edges = _edges(_grid_rows(self.logits, active[span], parts.select(span)), columns.select(own), threshold)
            pieces.append(edges._replace(column=edges.column + own.start))
        counts = active.new_zeros(len(self))
        if not pieces:
            return Runs(active.new_zeros(0), active.new_zeros(0), counts)
        runs = _crossings(_Edges(*map(torch.cat, zip(*pieces))), columns, parts, threshold, self.image_size[0])
        counts[active] = runs.per_mask
        return runs._replace(per_mask=counts)

    # ------------------------------------------------------------------ for users of numpy

    def to_numpy(self) -> np.ndarray:
        """Bitmaps of the full image as a numpy array: (N, H, W) bool."""
        return self.paste().cpu().numpy()

    def paste_logits(self) -> torch.Tensor:
        """Logits of the full image, interpolated at the centres of pixels: (N, H, W) float32, minus infinity outside of the windows."""
        height, width = self.image_size
        logits = self.logits.new_full((len(self), height, width), -math.inf, dtype=torch.float32)
        xs, ys = (torch.arange(side, device=self.device) + 0.5 for side in (width, height))
        for grid, pasted, (x0, y0, x1, y1) in zip(self.logits.float(), logits, self.windows.tolist()):
            columns, rows = (xs >= x0) & (xs < x1), (ys >= y0) & (ys < y1)
            if columns.any() and rows.any():
                x, y = (xs[columns] - x0) / (x1 - x0), (ys[rows] - y0) / (y1 - y0)
                pasted[rows.nonzero(), columns.nonzero()[:, 0]] = _interpolate(grid[None], x[None], y[None])[0]
        return logits

    def crop(self, boxes: torch.Tensor) -> "WindowMasks":
        """The masks without the pixels outside of boxes. The logits are interpolated, so that they cover the boxes.

        Args:
            boxes: (N, 4) XYXY in pixels of the image, one for each mask. Their parts outside of the windows are left out.

        Returns:
            N masks, whose windows are the parts of the boxes in the windows. A mask whose box does not meet its window is empty.
        """
        side = self.logits.shape[-1]
        windows = self.windows.to(boxes.dtype)
        inside = torch.cat(
            [torch.maximum(boxes[:, :2], windows[:, :2]), torch.minimum(boxes[:, 2:], windows[:, 2:])], 1
        )
        steps = (torch.arange(side, device=self.device) + 0.5) / side
        sides = (windows[:, 2:] - windows[:, :2]).clamp(min=torch.finfo(windows.dtype).tiny)
        low, high = (inside[:, :2] - windows[:, :2]) / sides, (inside[:, 2:] - windows[:, :2]) / sides
        x, y = (low[:, :, None] + (high - low)[:, :, None] * steps).unbind(1)
        return self._like(_interpolate(self.logits.float(), x, y).to(self.logits.dtype), inside)

    def polygons(self, *, tolerance: float = 0.5) -> list[list[list[float]]]:
        """Outlines of the masks as COCO's polygons. Holes are filled, because COCO's polygons have none.

        Args:
            tolerance: maximum distance of an outline from the outline along the pixels, in pixels; 0 keeps every corner. Default: 0.5.

        Returns:
            For each mask, the polygons [x0, y0, x1, y1, ...] of its parts in pixels of the image; an empty list for an empty mask.

        Raises:
            ValueError: the tolerance is negative or not finite.
        """
        return [
            [outline.ravel().tolist() for outline in mask.polygons(tolerance=tolerance)] for mask in self.tight_masks()
        ]

    def crops(self, image: np.ndarray) -> list[np.ndarray]:
        """Cuts the masks out of their image; `cv2.imwrite` writes the results as transparent PNG files.

        Args:
            image: (H, W, 3) uint8, BGR, of the size that the masks refer to.

        Returns:
            For each mask, (h, w, 4) uint8 BGRA: the image in the mask's tight box, with an alpha of 255 in the mask and of 0 elsewhere.
            An empty mask gives an array of height and width 0.

        Raises:
            ValueError: the image has another shape.
        """
        if image.shape != (*self.image_size, 3):
            raise ValueError(f"the image must have the shape {(*self.image_size, 3)}, got {image.shape}")
        crops = []
        for mask in self.tight_masks():
            x0, y0, x1, y1 = mask.box
            crops.append(np.dstack([image[y0:y1, x0:x1], mask.bitmap.astype(np.uint8) * 255]))
        return crops

    def tight_masks(self) -> Iterator[TightMask]:
        """Bitmaps of the masks within their tight boxes, one mask at a time. No bitmap of the whole image is made."""
        runs, height = self._runs(), self.image_size[0]
        boxes = boxes_and_areas(runs, height)[0].long().tolist()
        starts, ends = runs.starts.cpu().numpy(), runs.ends.cpu().numpy()
        stop = 0
        for (x0, y0, x1, y1), count in zip(boxes, runs.per_mask.tolist()):
            own = slice(stop, stop + count)
            stop += count
            # In columns of the box instead of columns of the image.
            shift = starts[own] // height * (height - (y1 - y0)) + x0 * (y1 - y0) + y0
            steps = np.zeros((x1 - x0) * (y1 - y0) + 1, dtype=np.int8)
            np.add.at(steps, starts[own] - shift, 1)
            np.add.at(steps, ends[own] - shift, -1)  # touching runs cancel
            filled = steps[:-1].cumsum(dtype=np.int8).astype(bool)
            yield TightMask(x0, y0, filled.reshape(x1 - x0, y1 - y0).T)


def _interpolate(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Logits at the crossings of columns and rows.

    Args:
        logits: (N, M, M).
        x, y: (N, X) and (N, Y), places in 0..1 of the window.

    Returns:
        (N, Y, X).
    """
    places = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), dim=-1) * 2 - 1
    return F.grid_sample(
        logits[:, None], places.to(logits.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )[:, 0]


class _Parts(NamedTuple):
    """The part of each window that may hold foreground; all tensors are (B,)."""

    col_lo: torch.Tensor  # long, first image column
    col_hi: torch.Tensor  # long, image column after the last
    row_lo: torch.Tensor  # long, first image row
    row_hi: torch.Tensor  # long, image row after the last
    grid_lo: torch.Tensor  # long, first grid row
    num_rows: torch.Tensor  # long, number of grid rows
    x0: torch.Tensor  # double, left edge of the window, pixels
    y0: torch.Tensor  # double, upper edge of the window, pixels
    cell_w: torch.Tensor  # double, width of a grid cell, pixels
    cell_h: torch.Tensor  # double, height of a grid cell, pixels

    def select(self, item: Union[slice, torch.Tensor]) -> "_Parts":
        return _Parts(*(field[item] for field in self))


def _foreground_parts(
    logits: torch.Tensor, windows: torch.Tensor, image_size: tuple[int, int], threshold: float
) -> tuple[torch.Tensor, _Parts]:
    """The windows that may have foreground pixels.

    Returns:
        active: (B,) long, indices of these windows.
        parts: the part of each that may hold foreground.
    """
    height, width = image_size
    side = logits.shape[-1]
    # Groups of rows: a few rows too many cost less than a second pass over the logits.
    group = math.gcd(side, _ROWS)
    greatest = _greatest(logits.unflatten(1, (-1, group)), 2).float()
    columns = _extent(greatest.amax(1) > threshold)
    rows = _extent(greatest.amax(2) > threshold)
    rows[:2] *= group
    rows[1] += group - 1
    x0, y0, x1, y1 = windows.double().unbind(1)  # in double precision, pixel ranges are exact
    cell_w, cell_h = (x1 - x0) / side, (y1 - y0) / side
    col_lo, col_hi = _pixel_range(x0, x1, cell_w, columns, side, width)
    row_lo, row_hi = _pixel_range(y0, y1, cell_h, rows, side, height)
    some = rows[2].bool() & (col_hi > col_lo) & (row_hi > row_lo) & windows.isfinite().all(1)
    active = some.nonzero()[:, 0]
    col_lo, col_hi, row_lo, row_hi = (v[active].long() for v in (col_lo, col_hi, row_lo, row_hi))
    x0, y0, cell_w, cell_h = x0[active], y0[active], cell_w[active], cell_h[active]
    # The knots on both sides of the first and of the last pixel row.
    grid_lo = ((row_lo + 0.5 - y0) / cell_h - 0.5).floor().clamp(0, side - 1).long()
    grid_hi = ((row_hi - 0.5 - y0) / cell_h - 0.5).floor().add(1).clamp(0, side - 1).long()
    num_rows = grid_hi - grid_lo + 1
    return active, _Parts(col_lo, col_hi, row_lo, row_hi, grid_lo, num_rows, x0, y0, cell_w, cell_h)


def _greatest(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x.amax(dim) for a short dimension: on a CPU, comparing two tensors is faster than reducing one."""
    first, *others = x.unbind(dim)
    greatest = first.clone()
    for other in others:
        torch.maximum(greatest, other, out=greatest)
    return greatest


def _extent(filled: torch.Tensor) -> torch.Tensor:
    """(3, N) long for rows (N, M) bool: first true index, last true index, and whether there is one."""
    filled = filled.byte()
    last = filled.shape[1] - 1 - filled.flip(1).argmax(1)
    return torch.stack([filled.argmax(1), last, filled.amax(1).long()])


def _pixel_range(
    low: torch.Tensor, high: torch.Tensor, cell: torch.Tensor, extent: torch.Tensor, side: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels along one axis that lie in the image, in the window and next to its foreground cells.

    Args:
        low, high: (N,) double, edges of the windows in pixels.
        cell: (N,) double, length of a grid cell in pixels.
        extent: (3, N), first and last foreground cell, see `_extent`.
        side: M.
        size: of the image along the axis in pixels.

    Returns:
        first: (N,) double, first pixel.
        after: (N,) double, pixel after the last.
    """
    # A cell contributes up to the centres of its neighbours. One pixel more allows for rounding and the outermost cells.
    near = (low + (extent[0] - 0.5) * cell - 0.5).floor()
    far = (low + (extent[1] + 1.5) * cell - 0.5).floor() + 1
    first = torch.maximum((low - 0.5).ceil(), near)
    after = torch.minimum((high - 0.5).ceil(), far)
    return first.clamp(0, size), after.clamp(0, size)


def _chunks(sizes: torch.Tensor, budget: int) -> Iterator[slice]:
    """Cut windows into chunks of about `budget` knots.

    Args:
        sizes: (B,) maximum number of knots of each window.
        budget: number of knots per chunk; a single window may have more.
    """
    if len(sizes) == 0:
        return
    filled = torch.div(sizes.cumsum(0), budget, rounding_mode="floor")
    stops = (filled[1:] != filled[:-1]).nonzero()[:, 0].add(1).tolist() + [len(sizes)]
    for start, stop in zip([0] + stops[:-1], stops):
        yield slice(start, stop)


class _Columns(NamedTuple):
    """The image columns of windows, window by window; all tensors are (K,)."""

    window: torch.Tensor  # long, index of the window
    at: torch.Tensor  # long, column of the image
    left: torch.Tensor  # long, grid column whose centre is at or before the pixel's
    right: torch.Tensor  # long, grid column after it
    weight: torch.Tensor  # float32, of the grid column on the right

    def select(self, item: slice) -> "_Columns":
        return _Columns(*(field[item] for field in self))


def _image_columns(parts: _Parts, side: int) -> _Columns:
    """The image columns of `parts` and their positions in the grid of `side` cells."""
    widths = parts.col_hi - parts.col_lo
    window = torch.repeat_interleave(torch.arange(len(widths), device=widths.device), widths)
    at = torch.arange(len(window), device=widths.device) + (parts.col_lo - widths.cumsum(0) + widths)[window]
    place = ((at + 0.5 - parts.x0[window]) / parts.cell_w[window] - 0.5).clamp_(0, side - 1)
    left = place.floor()
    weight = (place - left).float()
    left = left.long()
    return _Columns(window, at, left, (left + 1).clamp_(max=side - 1), weight)


class _Edges(NamedTuple):
    """The edges of the runs in columns: the first at which a column enters the foreground, the second at which it leaves it."""

    column: torch.Tensor  # (R,) long, index of the image column
    knot: torch.Tensor  # (R, 2) long, number of the knot after the edge, counted from the window's first
    before: torch.Tensor  # (R, 2) float32, logit at the knot before
    after: torch.Tensor  # (R, 2) float32, logit at the knot


def _grid_rows(logits: torch.Tensor, chosen: torch.Tensor, parts: _Parts) -> torch.Tensor:
    """The logits of a chunk of windows at grid rows.

    Args:
        logits: (N, M, M) of all masks.
        chosen: (B,) long, indices of the chunk's masks.
        parts: of the chunk's masks.

    Returns:
        (B, G, M), the knots.
    """
    side, num_rows = logits.shape[-1], int(parts.num_rows.max())
    # Beyond its own knots a window gets rows without visible foreground, or its last row again. Neither adds an edge.
    rows = (parts.grid_lo[:, None] + torch.arange(num_rows, device=logits.device)).clamp(max=side - 1)
    grid = logits.reshape(-1, side).index_select(0, (chosen[:, None] * side + rows).view(-1))
    return grid.view(len(chosen), num_rows, side)


def _edges(grid: torch.Tensor, columns: _Columns, threshold: float) -> _Edges:
    """The edges of a chunk of windows, whose columns are counted within the chunk.

    Args:
        grid: (B, G, M) from `_grid_rows`.
        columns: of the chunk's windows.
        threshold: logit above which a knot is foreground.
    """
    num_windows, num_rows, side = grid.shape
    # A background knot before each column and one at the very end make edges into and out of the foreground alternate.
    # Its logit is the threshold itself, so that an edge next to it lies exactly at the knot.
    knots = grid.new_full((num_windows, side, num_rows + 1), threshold, dtype=torch.float32)
    knots[:, :, 1:] = grid.transpose(1, 2)
    knots = knots.view(-1, num_rows + 1)
    first = (columns.window - columns.window[0]) * side
    values = knots.new_full((len(first) * (num_rows + 1) + 1,), threshold)
    along = torch.index_select(knots, 0, first + columns.left, out=values[:-1].view(-1, num_rows + 1))
    along.lerp_(knots.index_select(0, first + columns.right), columns.weight[:, None])  # (K, G + 1)

    above = values > threshold
    before = (above[1:] != above[:-1]).nonzero()[:, 0]
    column = torch.div(before[0::2], num_rows + 1, rounding_mode="floor")
    knot = before.view(-1, 2) - (column * (num_rows + 1))[:, None]
    sides = [values.index_select(0, at).view(-1, 2) for at in (before, before + 1)]
    return _Edges(column, knot, *sides)


def _crossings(edges: _Edges, columns: _Columns, parts: _Parts, threshold: float, height: int) -> Runs:
    """The runs of pixels between edges; `height` is that of the image in pixels."""
    before = edges.before.double()
    row = (threshold - before) / (edges.after - before) + edges.knot  # counted from the knot before the window's first
    window = columns.window.index_select(0, edges.column)
    first = parts.y0 + (parts.grid_lo - 0.5) * parts.cell_h - 0.5
    row = first.index_select(0, window)[:, None] + row * parts.cell_h.index_select(0, window)[:, None]
    enter, leave = row[:, 0].floor() + 1, row[:, 1].ceil()  # rows whose centre lies strictly between the crossings
    enter = torch.maximum(enter, parts.row_lo.double().index_select(0, window)).long()
    leave = torch.minimum(leave, parts.row_hi.double().index_select(0, window)).long()
    keep = (leave > enter).nonzero()[:, 0]
    base = columns.at.index_select(0, edges.column.index_select(0, keep)) * height
    per_mask = torch.bincount(window.index_select(0, keep), minlength=len(parts.x0))
    return Runs(base + enter.index_select(0, keep), base + leave.index_select(0, keep), per_mask)
