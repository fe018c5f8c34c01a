"""Turns the edges of masks into boxes, areas, bitmaps and the compressed RLE of pycocotools, vectorised over all masks.

Shape letters: N masks, R runs of foreground pixels of all masks together, H W height and width of an image in pixels, C counts of all masks
together (alternating lengths of background and foreground), K words of 64 bits of a mask.
"""

import numpy as np

from .outlines import Edges


def boxes_and_areas(edges: Edges) -> tuple[np.ndarray, np.ndarray]:
    """Tight boxes and areas of masks.

    Args:
        edges: of N masks.

    Returns:
        boxes: (N, 4) float32 XYXY in pixels of the image (first pixel, last pixel + 1), zeros for an empty mask.
        areas: (N,) int64, number of foreground pixels.
    """
    boxes, areas = np.zeros((edges.count, 4), np.float32), np.zeros(edges.count, np.int64)
    starts = edges.starts() // 2
    some = np.flatnonzero(starts[1:] > starts[:-1])
    if not len(some):
        return boxes, areas
    enter, leave = edges.positions[0::2], edges.positions[1::2]
    first, last = enter // edges.pitch, (leave - 1) // edges.pitch
    top, bottom = enter - first * edges.pitch, leave - last * edges.pitch
    # A run that goes on in the next column reaches the lower and the upper border of the image.
    longer = np.flatnonzero(first != last)
    top[longer], bottom[longer] = 0, edges.size[0]
    begins = starts[some]
    columns = some * (edges.size[1] + 1)
    boxes[some, 0] = first[begins] - columns
    boxes[some, 1] = np.minimum.reduceat(top, begins)
    boxes[some, 2] = last[starts[some + 1] - 1] + 1 - columns
    boxes[some, 3] = np.maximum.reduceat(bottom, begins)
    areas[some] = np.add.reduceat((leave - enter).astype(np.int64), begins)
    return boxes, areas


def words(edges: Edges) -> np.ndarray:
    """Bitmaps of small masks as bits.

    Args:
        edges: of N masks, with a pitch that is a multiple of 64 and larger than H.

    Returns:
        (N, K) uint64, K = W * pitch / 64; the first pixel of a column is in the lowest bit of its first word.
    """
    width, per_column = edges.size[1], edges.pitch // 64
    bits = np.zeros(edges.count * (width + 1) * per_column, np.uint64)
    if len(edges.positions):
        place = edges.positions >> 6
        begins = np.flatnonzero(np.concatenate([[True], place[1:] != place[:-1]]))
        # All bits from an edge on: with those from the next edge on, they cancel.
        ones = np.uint64(2**64 - 1) << (edges.positions & 63).astype(np.uint64)
        bits[place[begins]] = np.bitwise_xor.reduceat(ones, begins)
    bits = bits.reshape(edges.count, width + 1, per_column)
    for number in range(1, per_column):
        # A run that goes on from the word before.
        bits[:, :, number] ^= np.uint64(0) - (bits[:, :, number - 1] >> np.uint64(63))
    return bits[:, :width].reshape(edges.count, width * per_column)


def fill(edges: Edges) -> np.ndarray:
    """Bitmaps of masks; the pitch of the edges has to be H.

    Returns:
        (N, H, W) bool.
    """
    height, width = edges.size
    changes = np.zeros(edges.count * edges.per_image, np.uint8)
    changes[edges.positions] = 1
    inside = np.bitwise_xor.accumulate(changes.reshape(edges.count, edges.per_image), axis=1)[:, : height * width]
    return np.ascontiguousarray(inside.reshape(edges.count, width, height).transpose(0, 2, 1)).view(bool)


def encode(edges: Edges) -> list[dict]:
    """The compressed RLE of masks, equal in every character to pycocotools' encode() of the bitmaps.

    Args:
        edges: of N masks, whose pitch is H.

    Returns:
        N dicts {"size": [H, W], "counts": str}. Counts are text, as in COCO's result files, so that they can be written as JSON.
    """
    counts, per_mask = _counts(edges)
    text, stops = _compress(counts, per_mask)
    size, ends = list(edges.size), stops.tolist()
    return [{"size": list(size), "counts": text[a:b]} for a, b in zip([0, *ends[:-1]], ends)]


def _counts(edges: Edges) -> tuple[np.ndarray, np.ndarray]:
    """The counts of masks, (C,) int32 or int64, and the number of counts of each mask, (N,) int64."""
    length = edges.size[0] * edges.size[1]
    starts = edges.starts()
    per_mask = np.diff(starts)
    numbers = np.arange(edges.count)
    begins = starts[:-1] + numbers
    # The edges of each mask from its own first pixel on, and the end of the image.
    stops = np.empty(len(edges.positions) + edges.count, edges.positions.dtype)
    stops[np.arange(len(edges.positions)) + np.repeat(numbers, per_mask)] = edges.positions - np.repeat(
        (numbers * edges.per_image).astype(stops.dtype), per_mask
    )
    last = begins + per_mask
    stops[last] = length
    counts = stops.copy()
    counts[1:] -= stops[:-1]
    counts[begins] = stops[begins]
    per_mask = per_mask + 1
    # A mask that reaches the last pixel ends with a count of foreground, not with a zero count of background.
    full = counts[last] == 0
    if full.any():
        keep = np.ones(len(counts), bool)
        keep[last[full]] = False
        counts, per_mask = counts[keep], per_mask - full
    return counts, per_mask


def _compress(counts: np.ndarray, per_mask: np.ndarray) -> tuple[str, np.ndarray]:
    """Counts as COCO's strings: differences from the count two places before, in groups of five bits, lowest first.

    Returns:
        text: the strings of all masks, joined.
        stops: (N,) int64, position in the text at which each mask's string ends.
    """
    ends = np.cumsum(per_mask)
    begins = ends - per_mask
    delta = counts.copy()
    delta[2:] -= counts[:-2]
    for i in range(3):  # the first three counts of a mask are written as they are
        begin = begins[per_mask > i] + i
        delta[begin] = counts[begin]
    # n groups hold the numbers from -2^(5n-1) to 2^(5n-1) - 1: the top bit of the last group is the sign.
    size = delta ^ (delta >> (8 * delta.itemsize - 1))
    greatest, bits = int(size.max(initial=0)), 4
    more = np.zeros(len(delta), np.int8)  # groups after the first
    while greatest >> bits:
        more += size >= 1 << bits
        bits += 5
    text_stops = np.cumsum(more, dtype=np.int64) + np.arange(1, len(delta) + 1)
    text = np.empty(text_stops[-1] if len(delta) else 0, np.uint8)
    place = text_stops - 1 - more
    while len(delta):
        text[place] = (delta & 31) + (48 + 32 * (more > 0))
        rest = np.flatnonzero(more)
        delta, place, more = delta[rest] >> 5, place[rest] + 1, more[rest] - 1
    return text.tobytes().decode("ascii"), text_stops[ends - 1]
