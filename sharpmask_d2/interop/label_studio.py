"""Writes masks as predictions of Label Studio.

Shape letters: h w a mask's tight box in pixels, R runs of pixels of an image, T tokens of an RLE.
"""

from collections.abc import Mapping
from typing import Any, Optional
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from .. import __version__
from ..structures.tight_masks import TightMask
from .labelled_images import LabelledImage, LabelledMask

# Where Label Studio serves the files of its local storage.
LOCAL_FILES = "/data/local-files/?d="
# Names of the tags of the labelling interface, as in Label Studio's templates.
FROM_NAME, TO_NAME = "label", "image"

# Shape -> type of the result, and tag of the labelling interface.
KINDS = {
    "mask": ("brushlabels", "BrushLabels"),
    "polygon": ("polygonlabels", "PolygonLabels"),
    "box": ("rectanglelabels", "RectangleLabels"),
}

# Bits of the lengths of runs, one of which each token of the RLE chooses, and bits of a value.
_LENGTH_BITS = (3, 4, 8, 16)
_VALUE_BITS = 8
# Each pixel has four values: red, green, blue and alpha.
_CHANNELS = 4


def labelling_interface(labels: Mapping[int, str], *, shape: str = "mask") -> str:
    """The labelling interface of a project that takes the predictions of `label_studio_task`.

    Args:
        labels: category id -> name.
        shape: "mask" (default), "polygon" or "box".

    Returns:
        XML for the settings of the project.
    """
    tag = KINDS[shape][1]
    names = "".join(f"<Label value={quoteattr(name)}/>" for name in labels.values())
    return (
        f'<View><Image name="{TO_NAME}" value="$image" zoom="true"/>'
        f'<{tag} name="{FROM_NAME}" toName="{TO_NAME}">{names}</{tag}></View>'
    )


def label_studio_task(
    image: LabelledImage, labels: Mapping[int, str], *, shape: str = "mask", image_url: Optional[str] = None
) -> dict[str, Any]:
    """A task with one prediction, for Label Studio's import.

    Args:
        image: with its masks.
        labels: category id -> name.
        shape: see `label_studio_results`.
        image_url: of the image. None, the default, takes its file name within Label Studio's local storage.

    Returns:
        Dict with data and predictions. The prediction of an image without masks is empty.
    """
    return {
        "data": {"image": LOCAL_FILES + quote(image.file_name) if image_url is None else image_url},
        "predictions": [prediction(label_studio_results(image, labels, shape=shape))],
    }


def prediction(found: list[dict[str, Any]]) -> dict[str, Any]:
    """A prediction with the results of an image; its score is the mean of their scores.

    Args:
        found: from `label_studio_results`.
    """
    scores = [result["score"] for result in found if "score" in result]
    mean = {"score": sum(scores) / len(scores)} if scores else {}
    return {"model_version": f"sharpmask_d2 {__version__}", **mean, "result": found}


def label_studio_results(
    image: LabelledImage,
    labels: Mapping[int, str],
    *,
    shape: str = "mask",
    from_name: str = FROM_NAME,
    to_name: str = TO_NAME,
) -> list[dict[str, Any]]:
    """Label Studio's results of the masks of an image.

    Args:
        image: with its masks.
        labels: category id -> name.
        shape: "mask" for brushlabels (default); "polygon" for polygonlabels, one for each part of a mask, without holes; or "box" for
            rectanglelabels.
        from_name, to_name: names of the tags of the labelling interface. Default: those of `labelling_interface`.

    Returns:
        One dict per mask, or per part of a mask.
    """
    kind = KINDS[shape][0]
    found = []
    for number, mask in enumerate(image.masks):
        for part, value in enumerate(_values(mask, image.size, shape)):
            result = {
                "id": f"{number}-{part}",
                "type": kind,
                "from_name": from_name,
                "to_name": to_name,
                "original_width": image.size[1],
                "original_height": image.size[0],
                "image_rotation": 0,
                "value": {**value, kind: [labels[mask.category_id]]},
            }
            if mask.score is not None:
                result["score"] = mask.score
            found.append(result)
    return found


def _values(mask: LabelledMask, size: tuple[int, int], shape: str) -> list[dict[str, Any]]:
    """The values of the results of a mask, without labels; coordinates are in percent of the image."""
    height, width = size
    tight = mask.tight()
    if shape == "mask":
        return [{"format": "rle", "rle": encode_brush(tight, size)}]
    percent = 100 / np.array([width, height])
    if shape == "polygon":
        return [{"points": (polygon * percent).tolist(), "closed": True} for polygon in tight.polygons()]
    x0, y0, x1, y1 = tight.box
    x, y, box_width, box_height = (np.array([x0, y0, x1 - x0, y1 - y0]) * np.tile(percent, 2)).tolist()
    return [{"x": x, "y": y, "width": box_width, "height": box_height, "rotation": 0}]


def encode_brush(mask: TightMask, image_size: tuple[int, int]) -> list[int]:
    """The RLE of Label Studio's brush, equal to that of `label_studio_sdk.converter.brush.mask2rle`.

    Args:
        mask: its pixels get the value 255.
        image_size: (H, W) in pixels.

    Returns:
        Bytes of a stream of bits: the number of values (32 bits), the bits of a value less 1 (5), four bits of lengths less 1 (4 each), and
        tokens of a 1, the number of a length (2), the length less 1, and the value.
    """
    lengths, values = _image_runs(mask, image_size)
    lengths = lengths * _CHANNELS
    # Longer runs are cut.
    longest = 2 ** _LENGTH_BITS[-1]
    pieces = -(-lengths // longest)
    values = np.repeat(values, pieces)
    last = np.cumsum(pieces) - 1
    cut = np.full(len(values), longest)
    cut[last] = lengths - (pieces - 1) * longest
    kind = np.searchsorted(2 ** np.array(_LENGTH_BITS), cut)  # (T,), the first length that is long enough
    length_bits = np.array(_LENGTH_BITS)[kind]
    tokens = (((4 + kind) << length_bits) + cut - 1 << _VALUE_BITS) + values
    header = [(int(np.prod(image_size)) * _CHANNELS, 32), (_VALUE_BITS - 1, 5), *((n - 1, 4) for n in _LENGTH_BITS)]
    numbers = np.concatenate([[number for number, _ in header], tokens])
    sizes = np.concatenate([[size for _, size in header], 3 + length_bits + _VALUE_BITS])
    # (T, 32): the last bits of each row are those of the token.
    bits = np.unpackbits(numbers.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    stream = bits[np.arange(32) >= 32 - sizes[:, None]]
    # Label Studio's encoder ends with a whole byte of zeros where the stream fills its last byte.
    padding = 8 - len(stream) % 8
    return np.packbits(np.concatenate([stream, np.zeros(padding, np.uint8)])).tolist()


def _image_runs(mask: TightMask, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The runs of an image row by row: lengths (R,) in pixels, and values (R,), 0 or 255."""
    width = image_size[1]
    # With a column of background at both sides of the box, runs end where a row of the box ends.
    padded = np.pad(mask.bitmap, ((0, 0), (1, 1)))
    rows, columns = np.nonzero(padded[:, 1:] != padded[:, :-1])
    changes = (rows + mask.y) * width + columns + mask.x
    # Where a run goes on in the next row, it does not end.
    repeated = np.flatnonzero(changes[1:] == changes[:-1])
    changes = np.delete(changes, np.concatenate([repeated, repeated + 1]))
    total = image_size[0] * width
    lengths = np.diff(changes, prepend=0, append=total)
    values = np.arange(len(lengths)) % 2 * 255
    return lengths[lengths > 0], values[lengths > 0]
