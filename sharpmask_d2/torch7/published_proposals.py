"""Converts the precomputed proposals that were published with DeepMask, SharpMask and MultiPath to this package's proposal files.

They have two formats. JSON chunks, such as props-1-500.json, are lists of the COCO results of 500 images. An image has up to 1000 segments
(`segmentation` without `bbox`) or boxes (`bbox` without `segmentation`), which follow one another. MultiPath's .t7 files are tables of
`images` (file names), `boxes` (one (N, 4) tensor of y1, x1, y2, x2 per image) and optionally `scores` (one tensor of N per image).

Shape letters: N proposals of an image.
"""

import json
import math
import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, Callable, Optional, Union

import numpy as np
from pycocotools import mask as mask_util
from tqdm import tqdm

from ..data.coco import AnnotationError, load_images
from ..errors import UserError
from ..io.fingerprint import digest_file
from ..io.outputs import check_outputs
from ..io.proposal_files import ProposalWriter
from ..structures.coco_masks import count_pixels
from .reader import Table, read_torch7

# Characters of a JSON file that are read at a time.
_PIECE = 1 << 24
_SPACE = re.compile(r"[ \t\r\n]*")

ImageId = Union[int, str]


def list_files(paths: list[Union[str, Path]]) -> list[Path]:
    """The files of proposals among files and folders.

    Args:
        paths: files, which keep this order, and folders, whose *.json and *.t7 files are sorted by the numbers in their names, so that
            props-501-1000 comes before props-1001-1500.

    Returns:
        Paths of the files.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no such files.
        UserError: a file has another suffix.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted((p for p in path.iterdir() if p.suffix.lower() in _READERS), key=_natural_order)
            if not inside:
                raise FileNotFoundError(f"--input: the folder {path} has no .json or .t7 files")
            files += inside
        elif path.exists():
            _reader(path)
            files.append(path)
        else:
            raise FileNotFoundError(f"--input: there is no {path}")
    return files


def read_proposals(
    path: Union[str, Path], image_ids: Optional[dict[str, ImageId]] = None
) -> Iterator[tuple[ImageId, list[dict]]]:
    """Read a published file image by image. A JSON chunk is read as a stream, of which one image is in memory at a time.

    Args:
        path: a .json or .t7 file.
        image_ids: file name without folders -> image id, for the names in a .t7 file; by default the id is the number at the end of the
            name: 139 for COCO_val2014_000000000139.jpg.

    Returns:
        Iterator of (image_id, results). Results are COCO results in the order of falling scores, equal scores in the order of the file:
        image_id, category_id 1, bbox (x, y, width, height in pixels of the image; floats), score (probability) and, if the file has it,
        segmentation (compressed RLE as text). The bbox of a segmentation is its tight box. A .t7 file has continuous coordinates,
        x2 = x1 + width. Without scores in the file, all scores are 0.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the file is broken or of another kind, or a proposal is not valid; the message names the file and the image.
    """
    path = Path(path)
    seen = set()
    for image_id, results in _reader(path)(path, image_ids):
        if image_id in seen:
            raise UserError(
                f"{path}: image {image_id} occurs a second time: the results of an image have to follow one another"
            )
        seen.add(image_id)
        results.sort(key=itemgetter("score"), reverse=True)
        yield image_id, results


def convert_proposals(
    *,
    input: list[Union[str, Path]],
    output: str,
    pkl: Optional[str] = None,
    pkl_masks: bool = False,
    annotations: Optional[str] = None,
    num_proposals: Optional[int] = None,
) -> None:
    """Write published proposals as COCO results and as Detectron2's pickle (tools/convert_proposals.py).

    A run that was stopped is resumed by the next call with the same arguments.

    Args:
        input: files and folders, see `list_files`.
        output: path of the JSON file to write.
        pkl: path of the pickle to write; none by default.
        pkl_masks: also write the masks of segments into the pickle.
        annotations: path of a COCO annotation file whose images give the ids of the file names in .t7 files.
        num_proposals: maximum number of proposals per image, those with the highest scores; all by default.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        UserError: a file cannot be read (see `list_files` and `read_proposals`), an image is in two files, or boxes and segments are mixed.
        OutputError: an output is also an input, or cannot be written, or its partial file is from a run with other arguments.
    """
    if num_proposals is not None and num_proposals < 1:
        raise UserError(f"--num-proposals must be at least 1, not {num_proposals}")
    files = list_files(input)
    check_outputs({"--output": output, "--pkl": pkl}, inputs=[annotations, *files])
    image_ids = _annotated_ids(annotations) if annotations else None
    settings = {
        "--input": [str(path) for path in files],
        "--annotations": annotations and digest_file(annotations),
        "--num-proposals": num_proposals,
    }
    with ProposalWriter(output, settings) as writer:
        earlier = frozenset(writer.done)
        if earlier:
            print(f"{len(earlier)} images are done already, in {writer.partial}")
        for image_id, results in tqdm(_read_all(files, image_ids), unit="image", desc="proposals"):
            if image_id not in earlier:
                writer.add(image_id, results[:num_proposals])
        count = writer.finish(pkl, pickle_masks=pkl_masks)
    print(f"wrote {count} proposals of {len(writer.done)} images: {output}" + (f", {pkl}" if pkl else ""))


def _read_all(files: list[Path], image_ids: Optional[dict[str, ImageId]]) -> Iterator[tuple[ImageId, list[dict]]]:
    """`read_proposals` of several files, which must not share an image nor mix boxes and segments."""
    sources = {}
    kind = None
    for path in files:
        for image_id, results in read_proposals(path, image_ids):
            if image_id in sources:
                raise UserError(f"{path}: image {image_id} is also in {sources[image_id]}: give only one of the files")
            sources[image_id] = path
            if results:
                found = "segments" if "segmentation" in results[0] else "boxes"
                kind = kind or found
                if found != kind:
                    raise UserError(
                        f"{path}: image {image_id} has {found}, but the images before it have {kind}: convert these files separately"
                    )
            yield image_id, results


def _reader(path: Path) -> Callable[..., Iterator[tuple[ImageId, list[dict]]]]:
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path} is neither a .json nor a .t7 file")
    return _READERS[path.suffix.lower()]


def _natural_order(path: Path) -> list[Union[str, int]]:
    # Text and numbers alternate, so that numbers are compared with numbers.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", path.name))]


def _annotated_ids(annotations: str) -> dict[str, ImageId]:
    """File name without folders -> image id."""
    image_ids = {}
    for image_id, file_name in load_images(annotations):
        name = PurePosixPath(file_name).name
        if image_ids.setdefault(name, image_id) != image_id:
            raise AnnotationError(f"{annotations}: images {image_ids[name]} and {image_id} are both named {name}")
    return image_ids


# ------------------------------------------------------------------ JSON chunks


def _read_json(path: Path, image_ids: Optional[dict[str, ImageId]]) -> Iterator[tuple[ImageId, list[dict]]]:
    for image_id, group in groupby(_checked_elements(path), key=itemgetter("image_id")):
        elements = list(group)
        rles = [element["segmentation"] for element in elements if "segmentation" in element]
        if not rles:
            boxes = [element["bbox"] for element in elements]
        elif len(rles) == len(elements):
            rles = _checked_rles(rles, f"{path}: image {image_id}")
            boxes = mask_util.toBbox(rles).tolist()
        else:
            raise UserError(f"{path}: only some results of image {image_id} have a segmentation")
        results = [
            {"image_id": image_id, "category_id": 1, "bbox": box, "score": element["score"]}
            for element, box in zip(elements, boxes)
        ]
        for result, rle in zip(results, rles):
            result["segmentation"] = rle
        yield image_id, results


def _checked_elements(path: Path) -> Iterator[dict]:
    """The results of a chunk; each is checked to have an image_id, a score, and a bbox or a segmentation."""
    for number, element in enumerate(_elements(path)):
        if not isinstance(element, dict):
            raise UserError(f"{path}: result {number} is not a COCO result but {str(element)[:40]!r}")
        image_id = element.get("image_id")
        if not isinstance(image_id, (int, str)):
            raise UserError(f"{path}: result {number} has no image_id that is a whole number or text")
        score = element.get("score")
        if not (isinstance(score, (int, float)) and 0 <= score <= 1):
            fault = f"score {score!r}, not a probability in 0..1" if "score" in element else "no score"
            raise UserError(f"{path}: result {number}, of image {image_id}, has {fault}")
        if "segmentation" not in element:
            if "bbox" not in element:
                raise UserError(f"{path}: result {number}, of image {image_id}, has neither bbox nor segmentation")
            if not _is_box(element["bbox"]):
                raise UserError(
                    f"{path}: result {number}, of image {image_id}, has bbox {element['bbox']!r}, not x, y, width, height"
                )
        yield element


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, (int, float)) and abs(v) < math.inf for v in box)
        and min(box[2:]) >= 0
    )


def _elements(path: Path) -> Iterator:
    """The elements of a JSON list, decoded one by one, so that memory does not grow with the file.

    ijson does not replace this: for deeply nested input, its memory grows with the square of the depth.
    """
    decoder = json.JSONDecoder()
    # Bytes that are not text become a character that occurs neither in JSON nor in RLE.
    with open(path, encoding="utf-8", errors="replace") as file:
        text, passed = file.read(_PIECE), 0
        at = _SPACE.match(text).end()
        if text[at : at + 1] != "[":
            raise UserError(f"{path} is not a JSON list of COCO results: it does not begin with '['")
        at, separator = at + 1, "["
        while separator != "]":
            try:
                start = _SPACE.match(text, at).end()
                if separator == "[" and text[start] == "]":
                    at = start + 1
                    break
                element, after = decoder.raw_decode(text, start)
                after = _SPACE.match(text, after).end()
                separator = text[after]
            except RecursionError:
                raise UserError(f"{path} is not a JSON list of COCO results: it is nested too deeply") from None
            except (ValueError, IndexError) as error:
                if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
                    # A number of several thousand digits.
                    raise UserError(f"{path} is not a JSON list of COCO results: {error}") from error
                # The element may continue after the part that was read so far.
                more = file.read(_PIECE + len(text) - at)
                if not more:
                    place, reason = (error.pos, error.msg) if isinstance(error, ValueError) else (len(text), "it ends")
                    raise UserError(
                        f"{path} is not whole JSON: {reason} at character {passed + place}; was it downloaded or copied completely?"
                    ) from error
                text, passed, at = text[at:] + more, passed + at, 0
                continue
            if separator not in ",]":
                raise UserError(
                    f"{path} is not JSON: {separator!r} instead of ',' or ']' at character {passed + after}"
                )
            yield element
            at = after + 1
        if (text[at:] + file.read()).strip():
            raise UserError(f"{path} is not JSON: the list ends at character {passed + at}, but not the file")


def _checked_rles(segmentations: list[dict], where: str) -> list[dict]:
    """The masks of an image as pycocotools takes them, with `counts` as text; a few files call it `count`."""
    rles = []
    for segmentation in segmentations:
        if not isinstance(segmentation, dict):
            raise UserError(f"{where} has a segmentation that is not RLE, a dict of size and counts")
        counts = segmentation.get("counts", segmentation.get("count"))
        if not isinstance(counts, str) or not counts:
            raise UserError(f"{where} has an RLE without counts as text: only compressed RLE can be read")
        size = segmentation.get("size")
        if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
            raise UserError(f"{where} has an RLE with size {size!r}, not height and width")
        rles.append({"size": size, "counts": counts})
    bad = np.flatnonzero(count_pixels([rle["counts"] for rle in rles]) != [math.prod(rle["size"]) for rle in rles])
    if len(bad):
        rle = rles[bad[0]]
        raise UserError(
            f"{where} has a broken RLE: counts {rle['counts'][:20]!r}... do not fill an image of {rle['size'][0]} x {rle['size'][1]} pixels"
        )
    return rles


# ------------------------------------------------------------------ .t7


def _read_torch7(path: Path, image_ids: Optional[dict[str, ImageId]]) -> Iterator[tuple[ImageId, list[dict]]]:
    content = read_torch7(path)
    if not isinstance(content, Table):
        raise UserError(f"{path} does not hold a table of images and boxes")
    names, boxes = _list_of(content, "images", path), _list_of(content, "boxes", path)
    scores = _list_of(content, "scores", path) if "scores" in content else [None] * len(boxes)
    if not len(names) == len(boxes) == len(scores):
        raise UserError(
            f"{path}: images, boxes and scores have different lengths: {len(names)}, {len(boxes)} and {len(scores)}"
        )
    for name, image_boxes, image_scores in zip(names, boxes, scores):
        image_id = _image_id(name, image_ids, path)
        rows = _xywh(image_boxes, f"{path}: {name}")
        values = np.zeros(len(rows)) if image_scores is None else _scores(image_scores, len(rows), f"{path}: {name}")
        yield (
            image_id,
            [
                {"image_id": image_id, "category_id": 1, "bbox": box, "score": score}
                for box, score in zip(rows.tolist(), values.tolist())
            ],
        )


def _list_of(content: Table, key: str, path: Path) -> list[Any]:
    if key not in content:
        raise UserError(
            f"{path} has no {key}: a file of proposals has images and boxes, this one has {sorted(map(str, content))}"
        )
    values = content[key].sequence() if isinstance(content[key], Table) else []
    if not isinstance(content[key], Table) or len(values) != len(content[key]):
        raise UserError(f"{path}: {key} is not a list without gaps")
    return values


def _image_id(name: Any, image_ids: Optional[dict[str, ImageId]], path: Path) -> ImageId:
    if not isinstance(name, str):
        raise UserError(f"{path}: images has {name!r} where a file name is expected")
    name = PurePosixPath(name)
    if image_ids is not None:
        if name.name not in image_ids:
            raise UserError(f"{path}: image {name} is not in the annotations")
        return image_ids[name.name]
    number = re.search(r"[0-9]+$", name.stem)
    if number is None:
        raise UserError(f"{path}: the name of image {name} does not end in its id: look it up with --annotations")
    return int(number.group())


def _xywh(boxes: Any, where: str) -> np.ndarray:
    """Boxes y1, x1, y2, x2 as x, y, width, height: (N, 4) float64 in pixels."""
    # An empty tensor of Torch7 has no second dimension.
    if isinstance(boxes, np.ndarray) and boxes.shape == (0,):
        boxes = boxes.reshape(0, 4)
    if not isinstance(boxes, np.ndarray) or boxes.ndim != 2 or boxes.shape[1] != 4:
        found = f"shape {boxes.shape}" if isinstance(boxes, np.ndarray) else f"type {type(boxes).__name__}"
        raise UserError(f"{where}: boxes are of {found}: a tensor of (N, 4) is expected")
    y1, x1, y2, x2 = boxes.astype(np.float64).T
    converted = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)
    bad = np.flatnonzero(~(np.isfinite(converted).all(axis=1) & (converted[:, 2:] >= 0).all(axis=1)))
    if len(bad):
        raise UserError(
            f"{where}: box {bad[0] + 1} is {boxes[bad[0]].tolist()}: y1, x1, y2, x2 with y1 <= y2 and x1 <= x2 are expected"
        )
    return converted


def _scores(scores: Any, count: int, where: str) -> np.ndarray:
    """Probabilities of shape (N,) or (N, 1) as (N,) float64."""
    if not isinstance(scores, np.ndarray) or scores.size != count:
        found = str(scores.size) if isinstance(scores, np.ndarray) else f"type {type(scores).__name__}"
        raise UserError(f"{where}: {found} scores for {count} boxes")
    scores = scores.reshape(-1).astype(np.float64)
    bad = scores[~((scores >= 0) & (scores <= 1))]
    if len(bad):
        raise UserError(f"{where}: score {bad[0]} is not a probability in 0..1")
    return scores


_READERS = {".json": _read_json, ".t7": _read_torch7}
