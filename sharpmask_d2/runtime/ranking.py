"""Ranks the masks of an image: stability, non-maximum suppression of boxes, and Matrix NMS. The results equal those of `structures`.

Shape letters: N masks or boxes, K words of 64 bits of a mask, P pairs, H W height and width of an image in pixels.
"""

import numpy as np

from .edges import boxes_and_areas, words
from .outlines import Outlines

# As in `structures.mask_stability` and `structures.mask_nms`.
MARGIN = 1.0
_LEAST = 1e-3
_REDUCED_SIDE = 80
_SIGMA = 2.0
# 1 / IoU below which pairs are first left out: their overlap matters only to masks that overlap no better mask by more.
_LEFT_OUT = 4
# Rows of pairs that are compared at a time: they stay in the processor's cache.
_ROWS = 128


def stability(sure: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """The IoU of masks at a higher and at a lower threshold: see `structures.mask_stability`.

    Args:
        sure, possible: (N, bytes) uint8, bits from `outlines.pack` at both thresholds.

    Returns:
        (N,) float32 in 0.001..1.
    """
    sure, possible = (_count(bits).astype(np.float32) for bits in (sure, possible))
    return np.maximum(sure / np.maximum(possible, 1), np.float32(_LEAST))


def log_sigmoid(scores: np.ndarray) -> np.ndarray:
    """The logarithms of the probabilities of logits, float32."""
    return np.minimum(scores, 0) - np.log1p(np.exp(-np.abs(scores)))


def log_to_logit(log_probability: np.ndarray) -> np.ndarray:
    """The logits of probabilities that are given by their logarithms, float32; finite for a probability of 1."""
    return log_probability - np.log(np.maximum(-np.expm1(log_probability), np.finfo(np.float32).tiny))


def nms(boxes: np.ndarray, thresh: float) -> np.ndarray:
    """Non-maximum suppression.

    Args:
        boxes: (N, 4) float32 XYXY, best first.
        thresh: IoU with a better box that is kept, above which a box is removed; above 0.

    Returns:
        (N,) bool: the boxes that are kept.
    """
    x0, y0, x1, y1 = boxes.T
    areas = (x1 - x0) * (y1 - y0)
    # Boxes in groups whose areas differ too much for an IoU above the threshold. The factor keeps boxes together that differ by rounding.
    sizes, kinds = np.unique(areas, return_inverse=True)
    groups = np.concatenate([[0], np.cumsum(sizes[:-1] < 0.999 * thresh * sizes[1:])])[kinds.reshape(-1)]
    span = float(x1.max() - x0.min()) + 1 if len(boxes) else 1.0
    places = groups * (2 * span) + (x0.astype(np.float64) - x0.min(initial=np.inf))
    order = np.argsort(places, kind="stable")
    places = places[order]
    # An IoU above the threshold needs a common width of more than that share of the left box; one pixel more allows for rounding.
    ends = np.searchsorted(places, places + (1 - thresh) * (x1 - x0)[order] + 1, side="right")
    first, second = _pairs_from_ranges(np.arange(1, len(boxes) + 1), ends)
    first, second = order[first - 1], order[second]
    better, worse = np.minimum(first, second), np.maximum(first, second)
    width = np.minimum(x1[better], x1[worse]) - np.maximum(x0[better], x0[worse])
    height = np.minimum(y1[better], y1[worse]) - np.maximum(y0[better], y0[worse])
    common = np.maximum(width, 0) * np.maximum(height, 0)
    overlaps = common / (areas[better] + areas[worse] - common)
    # As torchvision compares: an overlap in single with a threshold in double precision.
    suppresses = overlaps.astype(np.float64) > thresh
    better, worse = better[suppresses], worse[suppresses]
    order = np.argsort(better, kind="stable")
    kept = [True] * len(boxes)
    # By the rank of the better box: whether it is kept is known by then.
    for one, other in zip(better[order].tolist(), worse[order].tolist()):
        if kept[one]:
            kept[other] = False
    return np.array(kept, bool)


def matrix_nms(scores: np.ndarray, outlines: Outlines, windows: np.ndarray, size: tuple[int, int], order: np.ndarray):
    """Lowers the scores of masks that overlap better ones: see `structures.mask_nms`.

    Args:
        scores: (N,) float32 logits, highest first.
        outlines: of all masks of the image.
        windows: of all masks of the image, XYXY in pixels.
        size: (H, W) of the image.
        order: (N,) int64, indices of the masks that the scores belong to.

    Returns:
        (N,) float32 logits.
    """
    height, width = size
    factor = min(1.0, _REDUCED_SIDE / max(height, width))
    reduced = max(1, round(height * factor)), max(1, round(width * factor))
    scale = np.array([reduced[1] / width, reduced[0] / height] * 2, windows.dtype)
    edges = outlines.edges(windows * scale, reduced, 64 * (reduced[0] // 64 + 1))
    boxes, areas = boxes_and_areas(edges)
    pairs = _Pairs(words(edges)[order], boxes[order].astype(np.int16), areas[order].astype(np.int16), reduced[1])

    better, worse = pairs.find_likely()
    overlaps = pairs.overlaps(better, worse)
    own = np.zeros(len(scores), np.float32)
    np.maximum.at(own, worse, overlaps)
    # Smaller overlaps matter where a mask overlaps no better one by more.
    others = pairs.find_all(np.flatnonzero(own < 1 / _LEFT_OUT))
    better, worse = (np.concatenate(x) for x in zip((better, worse), others))
    overlaps = np.concatenate([overlaps, pairs.overlaps(*others)])
    np.maximum.at(own, worse, overlaps)
    greatest = np.zeros(len(scores), np.float32)
    np.maximum.at(greatest, worse, overlaps**2 - own[better] ** 2)
    return log_to_logit(log_sigmoid(scores) - np.float32(_SIGMA) * greatest)


class _Pairs:
    """Pairs of N masks of a reduced image, best mask first."""

    def __init__(self, bits: np.ndarray, boxes: np.ndarray, areas: np.ndarray, width: int):
        """
        Args:
            bits: (N, K) uint64, from `edges.words`.
            boxes: (N, 4) int16 tight XYXY.
            areas: (N,) int16.
            width: W of the reduced image.
        """
        self.bits, self.areas, self.per_column = bits, areas, bits.shape[1] // width
        self.sides = np.ascontiguousarray(boxes.T)

    def find_likely(self) -> tuple[np.ndarray, np.ndarray]:
        """(better, worse), (P,) int64 indices of all pairs whose IoU may be above 1 / _LEFT_OUT."""
        found = []
        for start in range(0, len(self.areas), _ROWS):
            rows, columns = slice(start, start + _ROWS), slice(start, None)
            common = self._common_boxes(rows, columns)
            # Numbers of pixels of a reduced image, also five times as many, fit 16 bits.
            np.minimum(common, np.minimum(self.areas[rows, None], self.areas[columns]), out=common)
            likely = common * np.int16(_LEFT_OUT + 1) > self.areas[rows, None] + self.areas[columns]
            row, column = np.divmod(np.flatnonzero(likely), likely.shape[1])
            found.append((row + start, column + start))
        better, worse = (np.concatenate(x) for x in zip(*found)) if found else np.zeros((2, 0), np.int64)
        upper = better < worse
        return better[upper], worse[upper]

    def find_all(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(better, worse), (P,) int64 indices of all pairs of these masks and any other mask whose boxes meet; some occur twice."""
        one, other = np.nonzero(self._common_boxes(masks, slice(None)) > 0)
        one = masks[one]
        one, other = one[one != other], other[one != other]
        return np.minimum(one, other), np.maximum(one, other)

    def _common_boxes(self, rows, columns) -> np.ndarray:
        """Areas of the common parts of two boxes, int16; 0 if they do not meet."""
        x0, y0, x1, y1 = self.sides
        width = np.minimum(x1[rows, None], x1[columns]) - np.maximum(x0[rows, None], x0[columns])
        height = np.minimum(y1[rows, None], y1[columns]) - np.maximum(y0[rows, None], y0[columns])
        return np.maximum(width, 0) * np.maximum(height, 0)

    def overlaps(self, better: np.ndarray, worse: np.ndarray) -> np.ndarray:
        """(P,) float32 IoU of pairs whose boxes meet."""
        if not len(better):
            return np.zeros(0, np.float32)
        low = np.maximum(self.sides[0][better], self.sides[0][worse]) * self.per_column
        counts = np.minimum(self.sides[2][better], self.sides[2][worse]) * self.per_column - low
        begins = np.cumsum(counts) - counts
        places = np.arange(begins[-1] + counts[-1]) - np.repeat(begins - low, counts)
        flat, words_per_mask = self.bits.reshape(-1), self.bits.shape[1]
        one, other = (flat[places + np.repeat(x * words_per_mask, counts)] for x in (better, worse))
        common = np.add.reduceat(_ones(one & other), begins, dtype=np.int32).astype(np.float32)
        return common / (self.areas[better].astype(np.float32) + self.areas[worse] - common)


def _pairs_from_ranges(begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(begin, number) of all numbers from each begin up to before its end, two (P,) int64."""
    counts = np.maximum(ends - begins, 0)
    first = np.repeat(begins, counts)
    return first, np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts) + first


def _count(bits: np.ndarray) -> np.ndarray:
    """Number of ones in each row of bytes, (N,)."""
    aligned = bits.view(np.uint64) if bits.shape[1] % 8 == 0 else bits
    return _ones(aligned).sum(axis=1, dtype=np.int64)


if hasattr(np, "bitwise_count"):
    _ones = np.bitwise_count
else:  # numpy before 2.0
    _TABLE = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(
        1, dtype=np.uint8
    )

    def _ones(words: np.ndarray) -> np.ndarray:
        """Number of ones in each word."""
        parts = words.view(np.uint16 if words.itemsize > 1 else np.uint8)
        return _TABLE[parts].reshape(*words.shape, -1).sum(axis=-1, dtype=np.uint8)
