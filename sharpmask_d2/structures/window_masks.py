"""Masks of windows: a grid of logits and the window of the image it covers, pasted only when someone asks.

Shape letters:
    N: window masks         M: side of the logit grid
    H, W: image height and width
    B: windows of a chunk   K: image columns of all windows of a chunk
    G: knots a chunk needs at most          R: runs of foreground knots in columns, an edge at each end

How masks become runs: bilinear interpolation is separable. Interpolated along x only, each image column is a
piecewise linear function of y whose knots are the grid rows. Where it crosses the threshold follows from the two
knots beside the crossing, so that pixels are never looked at: a column costs G knots, not its height, and the boxes,
areas, RLEs and bitmaps all come from the same runs and agree to the pixel.
Small windows have fewer pixel rows than grid rows: there the knots are the pixel rows, interpolated along y before.
"""

import math
import numbers
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Union

import torch
from detectron2.structures import Boxes

from .rle import Runs, boxes_and_areas, encode_runs, fill_positions, fill_runs

__all__ = ["WindowMasks"]

# Knots interpolated at once: on a CPU what fits its cache, elsewhere enough to keep the device busy.
CHUNK_CPU = 2**19
CHUNK_DEVICE = 2**24
# Grid rows whose foreground is looked for together, at most; a power of two.
_ROWS = 8
# Windows with fewer pixel rows than this share of their grid rows are interpolated at pixel rows, the others at grid rows.
_FEW_PIXELS = 0.75


class WindowMasks:
    """N window masks of one image; a field of :class:`detectron2.structures.Instances`. Not to be changed in place: what the masks are in
    pixels is found once, when first asked for.

    The pixel in row r and column c belongs to mask n if its centre (c + 0.5, r + 0.5) lies in the image and in window n
    (left and top edges included, right and bottom ones not) and the logit interpolated there is above the threshold.
    Cell (i, j) of the grid (row i, column j) has its centre at ((j + 0.5) / M, (i + 0.5) / M) of the window;
    interpolation is bilinear, and beyond the outermost centres the outermost cells continue.

    Attributes:
        logits: (N, M, M), floating point.
        windows: (N, 4), XYXY in pixels of the image.
        image_size: (H, W).
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
            windows: (N, 4) XYXY window boxes in pixels, in the frame of the image of size `image_size`, continuous
                coordinates; may be non-square and lie partly or wholly outside the image. A window without area or
                with a coordinate that is not finite has an empty mask.
            image_size: (H, W) of the image in pixels, both positive.
            threshold: finite logit above which an interpolated logit is foreground; the default is the logit of 0.2.

        Raises:
            ValueError: for wrong shapes, types, devices or sizes, or no finite threshold; the message names the argument.
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
        """Masks chosen by an int (which keeps a leading dimension of 1), a slice, or a bool or long tensor."""
        if isinstance(item, numbers.Integral):
            if not -len(self) <= item < len(self):
                raise IndexError(f"index {item} is out of range for {len(self)} window masks")
            item = [int(item)]
        if isinstance(item, slice):
            chosen = self._like(self.logits[item], self.windows[item])
        else:
            # On a CPU index_select copies rows several times as fast as indexing does.
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
        return self.logits.device

    def to(self, device: Union[str, torch.device]) -> "WindowMasks":
        moved = self._like(self.logits.to(device), self.windows.to(device))
        if self._known_runs is not None:
            moved._known_runs = Runs(*(x.to(device) for x in self._known_runs))
        return moved

    @staticmethod
    def cat(masks: Sequence["WindowMasks"]) -> "WindowMasks":
        """All masks of several sets in one.

        Raises:
            ValueError: for no set at all, or sets that differ in image size, threshold or mask side.
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
        """The same masks in the frame of the resized image.

        Args:
            scale_x, scale_y: new over old width and height.
            image_size: (H, W) of the resized image.
        """
        factors = self.windows.new_tensor([scale_x, scale_y, scale_x, scale_y])
        return WindowMasks(self.logits, self.windows * factors, image_size, threshold=self.threshold)

    def hflip(self) -> "WindowMasks":
        """The same masks in the frame of the image mirrored left to right.

        Equal to the mirrored bitmaps but where a window's side runs exactly through pixel centres: left ones count.
        """
        x0, y0, x1, y1 = self.windows.unbind(1)
        width = self.image_size[1]
        return self._like(self.logits.flip(2), torch.stack([width - x1, y0, width - x0, y1], dim=1))

    # ------------------------------------------------------------------ what the masks are in pixels

    def encode(self) -> tuple[Boxes, torch.Tensor, list[dict]]:
        """Boxes, areas and RLEs in one pass: see boxes(), areas() and rle()."""
        runs = self._runs()
        boxes, areas = boxes_and_areas(runs, self.image_size[0])
        return Boxes(boxes), areas, encode_runs(runs, self.image_size)

    def boxes(self) -> Boxes:
        """Tight XYXY boxes in pixels (first pixel, last pixel + 1), all zeros where a mask is empty."""
        return Boxes(boxes_and_areas(self._runs(), self.image_size[0])[0])

    def areas(self) -> torch.Tensor:
        """(N,) long, number of foreground pixels."""
        return boxes_and_areas(self._runs(), self.image_size[0])[1]

    def nonempty(self) -> torch.Tensor:
        """(N,) bool, whether a mask has a pixel."""
        return self._runs().per_mask > 0

    def rle(self) -> list[dict]:
        """N dicts {"size": [H, W], "counts": str} in pycocotools' compressed format, which can be written as JSON."""
        return encode_runs(self._runs(), self.image_size)

    def paste(self, indices: Union[int, slice, torch.Tensor, None] = None) -> torch.Tensor:
        """Full-image bitmaps.

        Args:
            indices: which masks, in any form that [] takes; all of them by default.

        Returns:
            (n, H, W) bool.
        """
        chosen = self if indices is None else self[indices]
        return fill_runs(chosen._runs(), self.image_size)

    def pixels(self) -> torch.Tensor:
        """The same as rows of all pixels, column by column as in COCO: (N, W * H) int8 of 0 and 1."""
        height, width = self.image_size
        return fill_positions(self._runs(), height * width)

    def _runs(self) -> Runs:
        """The foreground of all masks as runs of pixels in image columns; found once."""
        if self._known_runs is None:
            self._known_runs = self._find_runs()
        return self._known_runs

    @torch.no_grad()
    def _find_runs(self) -> Runs:
        # As float32, so that every comparison and every crossing uses the same number.
        threshold = float(torch.tensor(self.threshold, dtype=torch.float32))
        active, parts = _foreground_parts(self.logits, self.windows, self.image_size, threshold)
        side = self.logits.shape[-1]
        few = parts.row_hi - parts.row_lo < _FEW_PIXELS * parts.num_rows
        knots = torch.where(few, parts.row_hi - parts.row_lo, parts.num_rows)
        order = (knots + 2 * side * few).argsort()  # windows of a chunk share G, and what their knots are
        active, parts, few, knots = active[order], parts.select(order), few[order], knots[order]
        columns = _image_columns(parts, side)
        pieces = []
        chunk = CHUNK_CPU if self.device.type == "cpu" else CHUNK_DEVICE
        stops = [0, *(parts.col_hi - parts.col_lo).cumsum(0).tolist()]
        split = len(few) - int(few.sum())
        for span in _chunks(knots, (parts.col_hi - parts.col_lo).clamp(min=side), chunk, split):
            own = slice(stops[span.start], stops[span.stop])
            at_knots = _pixel_rows if span.start >= split else _grid_rows
            grid = at_knots(self.logits, active[span], parts.select(span), int(knots[span.stop - 1]))
            edges = _edges(grid, columns.select(own), threshold)
            pieces.append(edges._replace(column=edges.column + own.start))
        counts = active.new_zeros(len(self))
        if not pieces:
            return Runs(active.new_zeros(0), active.new_zeros(0), counts)
        # Pixel rows as knots: the one before a window's first is that before its first pixel row.
        parts = parts._replace(
            y0=torch.where(few, parts.row_lo.double(), parts.y0),
            cell_h=torch.where(few, 1.0, parts.cell_h),
            grid_lo=torch.where(few, 0, parts.grid_lo),
        )
        runs = _crossings(_Edges(*map(torch.cat, zip(*pieces))), columns, parts, threshold, self.image_size[0])
        per_mask = runs.per_mask
        counts[active] = per_mask
        # From the order of the chunks to that of the masks: a shift per mask, no sort of the runs.
        shifts = active.new_zeros(len(self))
        shifts[active] = per_mask.cumsum(0) - per_mask
        shifts -= counts.cumsum(0) - counts
        index = torch.arange(len(runs.starts), device=self.device)
        index += torch.repeat_interleave(shifts, counts, output_size=len(index))
        return Runs(runs.starts.index_select(0, index), runs.ends.index_select(0, index), counts)


class _Parts(NamedTuple):
    """The part of each window that can hold foreground, all tensors (B,)."""

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
    """Windows that can have foreground pixels, (B,) long, and where these can be."""
    height, width = image_size
    side = logits.shape[-1]
    # Of several rows at once: more rows than need be cost little, a second pass over the logits more.
    group = math.gcd(side, _ROWS)
    greatest = _greatest(logits.unflatten(1, (-1, group)), 2).float()
    columns = _extent(greatest.amax(1) > threshold)
    rows = _extent(greatest.amax(2) > threshold)
    rows[:2] *= group
    rows[1] += group - 1
    x0, y0, x1, y1 = windows.double().unbind(1)  # double: pixel ranges are exact
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
    """x.amax(dim) for few entries: on a CPU two tensors are compared faster than one is reduced."""
    first, *others = x.unbind(dim)
    greatest = first.clone()
    for other in others:
        torch.maximum(greatest, other, out=greatest)
    return greatest


def _extent(filled: torch.Tensor) -> torch.Tensor:
    """First and last true index of each row of filled (N, M), and whether there is one: (3, N) long."""
    filled = filled.byte()
    last = filled.shape[1] - 1 - filled.flip(1).argmax(1)
    return torch.stack([filled.argmax(1), last, filled.amax(1).long()])


def _pixel_range(
    low: torch.Tensor, high: torch.Tensor, cell: torch.Tensor, extent: torch.Tensor, side: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels along one axis that lie in the image, in the window and within a cell of the foreground, [first, after).

    Args:
        low, high: (N,) double, edges of the windows, pixels.
        cell: (N,) double, length of a grid cell, pixels.
        extent: (3, N), first and last foreground cell.
        size: pixels of the image along the axis.
    """
    # A cell weighs in up to the centres of its neighbours; one pixel more covers rounding and the outermost cells.
    near = (low + (extent[0] - 0.5) * cell - 0.5).floor()
    far = (low + (extent[1] + 1.5) * cell - 0.5).floor() + 1
    first = torch.maximum((low - 0.5).ceil(), near)
    after = torch.minimum((high - 0.5).ceil(), far)
    return first.clamp(0, size), after.clamp(0, size)


def _chunks(num_rows: torch.Tensor, widths: torch.Tensor, budget: int, split: int) -> Iterator[slice]:
    """Cuts windows, ordered by their num_rows (B,) before and from number `split` on, into chunks of about `budget` knots.

    A chunk also ends where num_rows passes a power of two, so that padding to the greatest at most doubles its size.
    """
    if len(num_rows) == 0:
        return
    filled = torch.div((num_rows * widths).cumsum(0), budget, rounding_mode="floor")
    octave = torch.frexp(num_rows.float() - 0.5).exponent
    cuts = (filled[1:] != filled[:-1]) | (octave[1:] != octave[:-1])
    if 0 < split < len(num_rows):
        cuts[split - 1] = True
    stops = cuts.nonzero()[:, 0].add(1).tolist() + [len(num_rows)]
    for start, stop in zip([0] + stops[:-1], stops):
        yield slice(start, stop)


class _Columns(NamedTuple):
    """The image columns of windows, window by window, all tensors (K,)."""

    window: torch.Tensor  # long, which of the windows
    at: torch.Tensor  # long, column of the image
    left: torch.Tensor  # long, grid column whose centre is at or before the pixel's
    right: torch.Tensor  # long, the one after it
    weight: torch.Tensor  # float32, of the right one

    def select(self, item: slice) -> "_Columns":
        return _Columns(*(field[item] for field in self))


def _image_columns(parts: _Parts, side: int) -> _Columns:
    """The columns that `parts` name, and where they lie in the grid of `side` cells."""
    widths = parts.col_hi - parts.col_lo
    window = torch.repeat_interleave(torch.arange(len(widths), device=widths.device), widths)
    at = torch.arange(len(window), device=widths.device) + (parts.col_lo - widths.cumsum(0) + widths)[window]
    place = ((at + 0.5 - parts.x0[window]) / parts.cell_w[window] - 0.5).clamp_(0, side - 1)
    left = place.floor()
    weight = (place - left).float()
    left = left.long()
    return _Columns(window, at, left, (left + 1).clamp_(max=side - 1), weight)


class _Edges(NamedTuple):
    """Where columns enter the foreground and where they leave it."""

    column: torch.Tensor  # (R,) long, which of the image columns
    knot: torch.Tensor  # (R, 2) long, number of the knot after the edge, counted from the window's first
    before: torch.Tensor  # (R, 2) float32, logit at the knot before
    after: torch.Tensor  # (R, 2) float32, logit at the knot


def _grid_rows(logits: torch.Tensor, chosen: torch.Tensor, parts: _Parts, num_rows: int) -> torch.Tensor:
    """Grid rows of a chunk of windows as knots: (B, G, M).

    Args:
        chosen: (B,) long, which masks.
        parts: of these.
        num_rows: G.
    """
    side = logits.shape[-1]
    # Knots past a window's own: those of rows without visible foreground, or its last again. Neither adds an edge.
    rows = (parts.grid_lo[:, None] + torch.arange(num_rows, device=logits.device)).clamp(max=side - 1)
    grid = logits.reshape(-1, side).index_select(0, (chosen[:, None] * side + rows).view(-1))
    return grid.view(len(chosen), num_rows, side)


def _pixel_rows(logits: torch.Tensor, chosen: torch.Tensor, parts: _Parts, num_rows: int) -> torch.Tensor:
    """Pixel rows as knots, interpolated: see `_grid_rows`."""
    side = logits.shape[-1]
    pixels = parts.row_lo[:, None] + torch.arange(num_rows, device=logits.device)
    pixels = torch.minimum(pixels, parts.row_hi[:, None] - 1)  # past a window's own: its last again
    place = ((pixels + 0.5 - parts.y0[:, None]) / parts.cell_h[:, None] - 0.5).clamp_(0, side - 1).view(-1)
    above = place.floor()
    weight = (place - above).float()[:, None]
    above = above.long()
    first = (chosen * side).repeat_interleave(num_rows, output_size=len(above))
    rows = logits.reshape(-1, side)
    grid = rows.index_select(0, first + above).float()
    grid = grid.lerp(rows.index_select(0, first + (above + 1).clamp_(max=side - 1)).float(), weight)
    return grid.view(len(chosen), num_rows, side)


def _edges(grid: torch.Tensor, columns: _Columns, threshold: float) -> _Edges:
    """The edges of a chunk of windows; columns are counted within the chunk.

    Args:
        grid: (B, G, M) of `_grid_rows` or `_pixel_rows`.
        columns: of these windows.
    """
    num_windows, num_rows, side = grid.shape
    # A background knot before each column and one at the very end: entering and leaving alternate along the whole.
    # At the threshold itself: edges beside it lie at the knot before the first or at the one after the last.
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
    """Runs of pixels between edges."""
    before = edges.before.double()
    row = (threshold - before) / (edges.after - before) + edges.knot  # from the knot before the window's first
    window = columns.window.index_select(0, edges.column)
    first = parts.y0 + (parts.grid_lo - 0.5) * parts.cell_h - 0.5
    row = first.index_select(0, window)[:, None] + row * parts.cell_h.index_select(0, window)[:, None]
    enter, leave = row[:, 0].floor() + 1, row[:, 1].ceil()  # rows whose centre is strictly between the crossings
    enter = torch.maximum(enter, parts.row_lo.double().index_select(0, window)).long()
    leave = torch.minimum(leave, parts.row_hi.double().index_select(0, window)).long()
    keep = (leave > enter).nonzero()[:, 0]
    base = columns.at.index_select(0, edges.column.index_select(0, keep)) * height
    per_mask = torch.bincount(window.index_select(0, keep), minlength=len(parts.x0))
    return Runs(base + enter.index_select(0, keep), base + leave.index_select(0, keep), per_mask)
