"""Checks masks in COCO's formats that come from files, before pycocotools reads them.

pycocotools does not check lengths and coordinates: with RLE that is too short or too long it may never return, and polygons far outside the
image end the process.

Shape letters: N RLEs, B characters and C counts of all of them together (a count is the length of a run of equal pixels).
"""

import math
import reprlib
from collections.abc import Sequence
from typing import Any, Optional, Union

import numpy as np
from pycocotools import mask as mask_util

# Run lengths are 32-bit: seven digits of five bits.
_MAX_DIGITS = 7
_MAX_COUNT = 2**32 - 1
_ALPHABET = bytes(range(48, 112))
# Characters decoded at a time, so that they fit a CPU's cache.
_CHUNK = 2**16

# How far polygons may reach outside an image, in units of its longer side.
_MAX_DISTANCE = 10
# Height and width assumed for images of unknown size.
_LARGE_SIZE = (10_000, 10_000)


class MaskError(ValueError):
    """A mask is not valid in COCO's formats. The message holds the reason alone; the caller adds the file and the image.

    Attributes:
        index: of the mask among those that were given.
    """

    def __init__(self, reason: str, index: int = 0):
        super().__init__(reason)
        self.index = index


def check_masks(segmentations: Sequence[Any], image_sizes: Sequence[Optional[Sequence[int]]]) -> None:
    """Check masks of one or many images without decoding them.

    Args:
        segmentations: masks in any of COCO's formats: lists of polygons (x0, y0, x1, y1, ... in pixels), or dicts of size and counts.
        image_sizes: (height, width) in pixels of the image of each mask, or None where it is not known.

    Raises:
        MaskError: a mask is not valid; it is the first one, where several are not.
    """
    compressed, counts, expected = [], [], []
    image_size, size = None, None
    for index, (segmentation, of_image) in enumerate(zip(segmentations, image_sizes)):
        if of_image is not image_size:
            image_size, size = of_image, list(of_image or ())
        # These cheap conditions hold for nearly all masks.
        if (
            not isinstance(segmentation, dict)
            or segmentation.get("size") != size
            or not isinstance(segmentation.get("counts"), str)
            or not type(segmentation["size"][0]) is type(segmentation["size"][1]) is int
            or math.prod(size) > _MAX_COUNT
        ) and (reason := _fault(segmentation, image_size)):
            raise MaskError(reason, index)
        if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
            compressed.append(index)
            counts.append(segmentation["counts"])
            expected.append(math.prod(segmentation["size"]))
    if compressed and len(wrong := np.flatnonzero((pixels := count_pixels(counts)) != expected)):
        index, found = compressed[wrong[0]], int(pixels[wrong[0]])
        raise MaskError(_fault_of_length(segmentations[index], found), index)


def to_rle(segmentation: Union[list[list[float]], dict], image_size: tuple[int, int]) -> dict[str, Any]:
    """The compressed RLE of a mask that `check_masks` accepts.

    Args:
        segmentation: polygons or RLE. Polygons of fewer than three points are ignored.
        image_size: (height, width) in pixels.

    Returns:
        Dict of size and counts, as pycocotools has it.

    Raises:
        MaskError: no polygon has three points or more.
    """
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return mask_util.frPyObjects(segmentation, *segmentation["size"])
        return segmentation
    polygons = whole_polygons(segmentation)
    if not polygons:
        raise MaskError("has no polygon with three points or more: remove it or give it a mask")
    return mask_util.merge(mask_util.frPyObjects(polygons, *image_size))


def whole_polygons(polygons: list[list[float]]) -> list[list[float]]:
    """The polygons that have at least three points and an even number of coordinates."""
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]


def count_pixels(counts: Sequence[Union[str, bytes]]) -> np.ndarray:
    """The number of pixels, foreground and background together, that compressed RLEs describe.

    Args:
        counts: of N RLEs.

    Returns:
        (N,) int64; -1 for text that is not RLE.
    """
    # RLE uses ASCII characters only, so that encoding turns no other character into one of them.
    texts = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for text in counts]
    joined = b"".join(texts)
    good = range(len(texts))
    if joined.translate(None, _ALPHABET) or not all(texts):
        good = [i for i in good if texts[i] and not texts[i].translate(None, _ALPHABET)]
        texts = [texts[i] for i in good]
        joined = b"".join(texts)
    pixels = np.full(len(counts), -1, dtype=np.int64)
    if not texts:
        return pixels
    digits = np.frombuffer(joined, np.uint8) - np.uint8(48)
    ends = np.cumsum([len(text) for text in texts])
    # A digit of 32 or above is followed by another digit of the same number.
    whole = np.flatnonzero(digits[ends - 1] < 32)
    if len(whole) < len(texts):
        good = [good[i] for i in whole]
        pixels[good] = count_pixels([counts[i] for i in good])
        return pixels
    found, begin = [], 0
    while begin < len(ends):
        start = ends[begin - 1] if begin else 0
        end = max(int(np.searchsorted(ends, start + _CHUNK, side="right")), begin + 1)
        found.append(_count(digits[start : ends[end - 1]], ends[begin:end] - start))
        begin = end
    pixels[good] = np.concatenate(found)
    return pixels


def _count(digits: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """`count_pixels` of complete numbers, given by their digits (B,) uint8; the digits of each text end at `ends` (N,)."""
    last = np.flatnonzero(digits < 32)
    # The fifth bit of the last digit is the sign.
    numbers = ((digits[last] ^ 16).view(np.int8) - np.int8(16)).astype(np.int64)
    lengths = np.diff(last, prepend=-1)
    # The digits before the last one, from the highest to the lowest.
    longer = np.flatnonzero(lengths > 1)
    place, left = last[longer], lengths[longer] - 1
    most = int(left.max(initial=0))
    for _ in range(min(most, _MAX_DIGITS - 1)):
        place = place - 1
        numbers[longer] = (numbers[longer] << 5) | (digits[place] & 31)
        left = left - 1
        more = np.flatnonzero(left)
        longer, place, left = longer[more], place[more], left[more]
    # (N,): where the numbers of each text end and start among the C counts.
    stops = np.searchsorted(last, ends)
    starts = np.concatenate([[0], stops[:-1]])
    pixels = numbers[starts]
    bad = pixels < 0
    if most >= _MAX_DIGITS:
        bad |= np.maximum.reduceat(lengths, starts) > _MAX_DIGITS
    # From the fourth on, a number is the difference from the count two places before: the counts are two interleaved cumulative sums, apart
    # from the first number.
    numbers[starts] = 0
    for parity in (0, 1):
        sums = np.cumsum(numbers[parity::2])
        begin, end = (starts + 1 - parity) // 2, (stops + 1 - parity) // 2
        some = np.flatnonzero(end > begin)
        if not len(some):
            continue
        begin, end = begin[some], end[some]
        before = np.where(begin > 0, sums[begin - 1], 0)
        bad[some] |= np.minimum.reduceat(sums, begin) < before
        # With fewer numbers, the sum below cannot overflow.
        if (end - begin).max() >= 2**13:
            bad[some] |= np.maximum.reduceat(sums, begin) - before > _MAX_COUNT
        pixels[some] += np.add.reduceat(sums, begin) - (end - begin) * before
    return np.where(bad, -1, pixels)


def _fault(segmentation: Any, image_size: Optional[Sequence[int]]) -> str:
    """Why a mask is not valid, or an empty text. The runs of compressed RLE are not checked here."""
    if isinstance(segmentation, dict):
        return _fault_of_rle(segmentation, image_size)
    if isinstance(segmentation, (list, tuple)):
        return _fault_of_polygons(segmentation, image_size or _LARGE_SIZE)
    return f"is {_shown(segmentation)}, neither polygons nor RLE"


def _fault_of_rle(rle: dict[str, Any], image_size: Optional[Sequence[int]]) -> str:
    size, counts = rle.get("size"), rle.get("counts")
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        return f"has the RLE size {_shown(size)}, not height and width"
    if math.prod(size) > _MAX_COUNT:
        return f"has the RLE size {_shown(size)}: more pixels than RLE can count"
    if image_size and tuple(size) != tuple(image_size):
        return f"is an RLE of size (height, width) {tuple(size)}, its image is of {tuple(image_size)}"
    if isinstance(counts, list):
        if not all(type(n) is int and n >= 0 for n in counts):
            return f"has RLE counts {_shown(counts)}, which are not all whole numbers from 0"
        if sum(counts) != math.prod(size):
            return _fault_of_length(rle, sum(counts))
    elif not isinstance(counts, (str, bytes)):
        return f"is RLE without counts that are text or a list, but {_shown(counts)}"
    return ""


def _fault_of_length(rle: dict[str, Any], found: int) -> str:
    runs = f"run over {found} pixels" if found >= 0 else "are no run lengths"
    size = " x ".join(map(str, rle["size"]))
    return f"is broken RLE: counts {_shown(rle['counts'])} {runs}, its size is {size}"


def _fault_of_polygons(polygons: Sequence[Any], image_size: Sequence[int]) -> str:
    longer = max(image_size)
    for polygon in polygons:
        if not hasattr(polygon, "__len__") or isinstance(polygon, (str, bytes, dict)):
            return f"has the polygon {_shown(polygon)}, not a list x0, y0, x1, y1, ..."
        if not len(polygon):
            continue
        try:
            # A sum is NaN if any of its terms is.
            low, high, total = min(polygon), max(polygon), sum(polygon)
            inside = -_MAX_DISTANCE * longer <= low and high <= (_MAX_DISTANCE + 1) * longer and total == total
        except (TypeError, ValueError, OverflowError):
            return f"has the polygon {_shown(polygon)}, in which not all are numbers"
        if not inside:
            return (
                f"has a polygon with a coordinate that is not finite or lies far outside of its image of "
                f"{image_size[1]} x {image_size[0]} pixels: {_shown([low, high])} are its lowest and its highest"
            )
        # pycocotools allocates memory for every pixel of an outline. The first condition is a cheap bound that most outlines meet.
        if len(polygon) * (high - low) > math.prod(image_size) and _outline(polygon) > _longest(image_size):
            return f"has a polygon of {len(polygon) // 2} points whose outline is longer than its image has pixels"
    return ""


def _outline(polygon: Sequence[float]) -> float:
    points = np.asarray(polygon[: len(polygon) // 2 * 2], dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def _longest(image_size: Sequence[int]) -> float:
    return math.prod(image_size) + 2 * (2 * _MAX_DISTANCE + 1) * sum(image_size)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def _shown(value: Any) -> str:
    return _REPR.repr(value)
