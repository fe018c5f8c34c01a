"""Finds the outlines of masks of windows, and the places at which they cross the columns of an image.

Shape letters: N masks, M mask side in cells, P places of outlines (squares between the centres of four cells), H W height and width of an
image in pixels, E edges: positions at which a mask changes between background and foreground.

Bilinear interpolation is linear in y in each column of pixels between the centres of two cells. A column therefore crosses the outline at
most once in each square between four centres, and only in squares whose four logits lie on both sides of the threshold. These squares,
about three of a hundred, are found once, on bits. They give the pixels in the frame of the image, and in the reduced one of Matrix NMS.
"""

from typing import NamedTuple

import numpy as np

# Masks whose logits are compared at a time: they stay in the processor's cache.
_BLOCK = 32


class Edges(NamedTuple):
    """The masks of an image as positions at which they change, column by column.

    Pixel (row y, column x) of mask n has the position (n * (W + 1) + x) * pitch + y. Each mask has an even number of edges: at the first
    one its foreground begins, at the second one it ends.
    """

    # (E,) int32 or int64, ascending; no position occurs twice.
    positions: np.ndarray
    # Number of masks, N.
    count: int
    # (H, W) of the image in pixels.
    size: tuple[int, int]
    # Number of positions of a column, at least H.
    pitch: int

    @property
    def per_image(self) -> int:
        """Number of positions of a mask."""
        return (self.size[1] + 1) * self.pitch

    def starts(self) -> np.ndarray:
        """(N + 1,) int64, index of the first edge of each mask, and E."""
        begins = np.arange(self.count + 1, dtype=np.int64) * self.per_image
        # The end of the last mask may exceed the type of the positions.
        return np.append(np.searchsorted(self.positions, begins[:-1].astype(self.positions.dtype)), len(self.positions))

    def select(self, masks: np.ndarray) -> "Edges":
        """The edges of some masks.

        Args:
            masks: int64 indices, in the order wanted.
        """
        starts = self.starts()
        counts = np.diff(starts)[masks]
        before = np.cumsum(counts) - counts
        edges = np.arange(counts.sum()) + np.repeat(starts[masks] - before, counts)
        shifts = (np.arange(len(masks)) - masks) * self.per_image
        positions = self.positions[edges] + np.repeat(shifts, counts).astype(self.positions.dtype)
        return self._replace(positions=positions, count=len(masks))


def pack(logits: np.ndarray, thresholds: list[float]) -> list[np.ndarray]:
    """Compares the logits of masks with thresholds.

    Args:
        logits: (N, M, M) float32, M a multiple of 4.
        thresholds: logits.

    Returns:
        For each threshold, (N, M * M / 8) uint8: bits of the cells above it, the first cell in the lowest bit.
    """
    cells = logits.reshape(len(logits), logits.shape[1] ** 2)
    packed = [np.empty((len(cells), cells.shape[1] // 8), np.uint8) for _ in thresholds]
    above = np.empty((_BLOCK, cells.shape[1]), bool)
    for start in range(0, len(cells), _BLOCK):
        block = cells[start : start + _BLOCK]
        for bits, threshold in zip(packed, thresholds):
            np.greater(block, np.float32(threshold), out=above[: len(block)])
            flat = np.packbits(above[: len(block)].reshape(-1), bitorder="little")
            bits[start : start + _BLOCK] = flat.reshape(len(block), -1)
    return packed


class Outlines:
    """The squares between four cells that the outlines of N masks run through."""

    def __init__(self, logits: np.ndarray, threshold: float, bits: np.ndarray):
        """
        Args:
            logits: (N, M, M) finite float32, M a multiple of 4.
            threshold: logit above which a pixel is foreground.
            bits: from `pack`, at this threshold.
        """
        self.logits, self.threshold, side = logits, float(np.float32(threshold)), logits.shape[1]
        places = _mixed_squares(bits, side).astype(np.int32)
        flat = logits.reshape(-1)
        # The logits of the four cells: upper left, upper right, lower left, lower right.
        self.corners = [flat[step:].take(places) for step in (0, 1, side, side + 1)]
        row = places // side
        self.mask = row // side
        # Row and column of the upper left cell, and its column among those of all masks.
        self.row, self.column = row - self.mask * side, places - row * side
        self.column_number = self.mask * side + self.column
        first, last = (logits[:, number] > np.float32(threshold) for number in (0, -1))
        # (mask, column) of squares with foreground above the first row and below the last row of centres.
        self.borders = [np.nonzero(cells[:, :-1] | cells[:, 1:]) for cells in (first, last)]

    def edges(self, windows: np.ndarray, size: tuple[int, int], pitch: int) -> Edges:
        """The pixels of the masks in the frame of an image.

        The pixel in row r and column c belongs to a mask if its centre (c + 0.5, r + 0.5) lies in the image and in the window and the logit
        interpolated there is above the threshold; see `structures.WindowMasks`.

        Args:
            windows: (N, 4) XYXY in the frame of the image, in pixels.
            size: (H, W) of the image in pixels.
            pitch: see `Edges`.
        """
        height, width = size
        side = self.logits.shape[1]
        x0, y0, x1, y1 = windows.astype(np.float64).T
        cell_w, cell_h = (x1 - x0) / side, (y1 - y0) / side
        left, right = (np.clip(np.ceil(x - 0.5), 0, width) for x in (x0, x1))
        top, bottom = (np.clip(np.ceil(y - 0.5), 0, height) for y in (y0, y1))
        # First column of pixels of each column of squares. Before the first and behind the last centre, logits continue.
        first = np.ceil(x0[:, None] + (np.arange(side) + 0.5) * cell_w[:, None] - 0.5)
        first[:, 0], first[:, -1] = left, right
        first = np.clip(first, left[:, None], np.maximum(left, right)[:, None]).astype(np.int32)
        counts = np.zeros_like(first)
        np.subtract(first[:, 1:], first[:, :-1], out=counts[:, :-1])
        scale = np.broadcast_to(1 / cell_w[:, None], first.shape)
        weight = (first + 0.5 - x0[:, None]) * scale - 0.5 - np.arange(side)
        dtype = np.int32 if len(windows) * (width + 1) * pitch < 2**31 else np.int64
        begin = ((np.arange(len(windows)) * (width + 1))[:, None] + first) * pitch
        frame = _Frame(counts, scale, weight, begin.astype(dtype), pitch)

        found = self._crossings(frame, y0, cell_h, height)
        for row, (mask, column), limit in zip((0, side - 1), self.borders, (top, bottom)):
            found.append(self._border(frame, row, mask, column, limit))
        positions = np.concatenate(found)
        positions.sort()
        return Edges(_without_pairs(positions), len(windows), size, pitch)

    def _crossings(self, frame: "_Frame", y0: np.ndarray, cell_h: np.ndarray, height: int) -> list[np.ndarray]:
        """Positions at which the columns of pixels cross the outlines."""
        counts = frame.counts.reshape(-1).take(self.column_number)
        chosen = np.flatnonzero(counts != 0)
        # Sorted by their number of columns, the squares that have a k-th column come first: no square is copied for each of its columns.
        counts = counts.take(chosen)
        chosen = chosen.take(np.argsort(-counts.astype(np.int16), kind="stable"))
        totals = len(chosen) - np.cumsum(np.bincount(counts, minlength=1))
        a, b, c, d = (x.take(chosen).astype(np.float64) for x in self.corners)
        mask, number = self.mask.take(chosen), self.column_number.take(chosen)
        upper, lower = b - a, d - c
        scale, weight, begin = (x.reshape(-1).take(number) for x in (frame.scale, frame.weight, frame.begin))
        cell_h = cell_h.take(mask)
        y = y0.take(mask) + (self.row.take(chosen) + 0.5) * cell_h - 0.5
        found = []
        for k, total in enumerate(totals[:-1]):
            along = np.clip(weight[:total] + k * scale[:total], 0, 1)
            above = a[:total] + upper[:total] * along
            below = c[:total] + lower[:total] * along
            inside = above > self.threshold
            crossing = np.flatnonzero(inside != (below > self.threshold))
            above, below = above.take(crossing), below.take(crossing)
            row = y.take(crossing) + (self.threshold - above) / (below - above) * cell_h.take(crossing)
            # The first pixel whose centre lies behind the crossing. A centre on the crossing is background.
            behind = np.ceil(row)
            behind += (behind == row) & ~inside.take(crossing)
            found.append(np.clip(behind, 0, height).astype(begin.dtype) + (begin.take(crossing) + k * frame.pitch))
        return found

    def _border(self, frame: "_Frame", row: int, mask: np.ndarray, column: np.ndarray, limit: np.ndarray) -> np.ndarray:
        """Positions at which columns of pixels begin or end in the foreground, at the border of their window or of the image."""
        counts = frame.counts[mask, column]
        mask, column = np.repeat(mask, counts), np.repeat(column, counts)
        k = np.arange(len(mask)) - np.repeat(np.cumsum(counts) - counts, counts)
        along = np.clip(frame.weight[mask, column] + k * frame.scale[mask, column], 0, 1)
        left, right = (self.logits[mask, row, column + step].astype(np.float64) for step in (0, 1))
        inside = left + (right - left) * along > self.threshold
        mask, column, k = mask[inside], column[inside], k[inside]
        return (frame.begin[mask, column] + k * frame.pitch + limit[mask]).astype(frame.begin.dtype)


class _Frame(NamedTuple):
    """The columns of pixels in each column of squares of N masks. The last one of the M columns of a mask has none."""

    # (N, M) int32: number of columns of pixels.
    counts: np.ndarray
    # (N, M): cells per pixel, and place of the first pixel in cells from the centre of the left cell.
    scale: np.ndarray
    weight: np.ndarray
    # (N, M) int32 or int64: position of the first pixel of the first column, see `Edges`, and the distance to that of the next column.
    begin: np.ndarray
    pitch: int


def _mixed_squares(bits: np.ndarray, side: int) -> np.ndarray:
    """Numbers of the cells that are the upper left of four cells of which some, but not all, are foreground; bits are those of `pack`."""
    flat = bits.reshape(-1)
    beside = _shifted(flat, 1)
    some, all_ = flat | beside, flat & beside
    mixed = (some | _shifted(some, side)) ^ (all_ & _shifted(all_, side))
    # Cells of the last column and of the last row have no square.
    has_square = np.ones((side, side), bool)
    has_square[-1], has_square[:, -1] = False, False
    mixed = mixed.reshape(bits.shape) & np.packbits(has_square, bitorder="little")
    # Bytes without a square are left out before bits become numbers.
    mixed = mixed.reshape(-1)
    some_bytes = np.flatnonzero(mixed != 0)
    places = np.flatnonzero(np.unpackbits(mixed[some_bytes], bitorder="little").view(bool))
    return some_bytes[places >> 3] * 8 + (places & 7)


def _shifted(bits: np.ndarray, count: int) -> np.ndarray:
    """Bits whose number k is number k + `count` of the input, zeros at the end."""
    result = np.zeros_like(bits)
    begin, rest = divmod(count, 8)
    result[: len(bits) - begin] = bits[begin:] >> rest
    if rest:
        result[: max(0, len(bits) - begin - 1)] |= bits[begin + 1 :] << (8 - rest)
    return result


def _without_pairs(positions: np.ndarray) -> np.ndarray:
    """Each position that occurs an odd number of times in a sorted array, once: two changes at one place are none."""
    new = np.ones(len(positions) + 1, bool)
    np.not_equal(positions[1:], positions[:-1], out=new[1:-1])
    if new.all():
        return positions
    begins = np.flatnonzero(new)
    return positions[begins[:-1][np.diff(begins) % 2 == 1]]
