"""The precomputed proposals that were published with DeepMask, SharpMask and MultiPath, as this package's proposal files.

They come in two formats. JSON chunks, such as props-1-500.json, are lists of COCO results of 500 images each, with up to 1000 segments
(`segmentation`, no `bbox`) or boxes (`bbox`, no `segmentation`) per image, the results of an image together. MultiPath's .t7 files are
tables of `images` (file names), `boxes` (per image (N, 4): y1, x1, y2, x2) and at times `scores` (per image N).
"""

import json
import math
import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Optional, Union

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


def list_files(paths: list) -> list:
    """Files of proposals, given as files and folders.

    Args:
        paths: files, which stay in this order, and folders, of which the *.json and *.t7 are taken, props-501-1000 before props-1001-1500.

    Returns:
        list of Path.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without such files.
        ValueError: a file of another kind.
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


def read_proposals(path: Union[str, Path], image_ids: Optional[dict] = None) -> Iterator[tuple]:
    """Read a published file image by image; of a JSON chunk no more than an image and a piece of text is held.

    Args:
        path: .json or .t7.
        image_ids: file name without folders -> image id, for the names in a .t7; by default the id is the number at the end of the name,
            139 for COCO_val2014_000000000139.jpg.

    Returns:
        iterator of (image_id, results). Results are COCO results, best score first, equal ones in the order of the file: image_id,
        category_id 1, bbox (x, y, width, height in pixels; floats), score (probability) and, if the file has it, segmentation (compressed
        RLE as text). The bbox of a segmentation is the tight one. A .t7 has continuous coordinates, x2 = x1 + width, so nothing is added to
        a width; without scores, all are 0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind or broken, or proposals that cannot be right; the message names the file and the image.
    """
    path = Path(path)
    seen = set()
    for image_id, results in _reader(path)(path, image_ids):
        if image_id in seen:
            raise UserError(
                f"{path}: image {image_id} comes a second time: the results of an image have to stand together"
            )
        seen.add(image_id)
        results.sort(key=itemgetter("score"), reverse=True)
        yield image_id, results


def convert_proposals(
    *,
    input: list,
    output: str,
    pkl: Optional[str] = None,
    pkl_masks: bool = False,
    annotations: Optional[str] = None,
    num_proposals: Optional[int] = None,
) -> None:
    """Write published proposals as COCO results and as Detectron2's pickle; see tools/convert_proposals.py. A stopped run goes on.

    Args:
        input: files and folders, see `list_files`.
        output: JSON to write.
        pkl: pickle to write.
        pkl_masks: with the masks of segments.
        annotations: a COCO JSON whose images give the ids of the file names in .t7 files.
        num_proposals: keep so many of an image, the best.

    Raises:
        FileNotFoundError: something that does not exist.
        ValueError: see `list_files` and `read_proposals`; an image in two files; boxes and segments together; an input as output; a partial
            file of another run.
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


def _read_all(files: list, image_ids: Optional[dict]) -> Iterator[tuple]:
    """`read_proposals` of several files that have no image in common and are of one kind."""
    sources = {}
    kind = None
    for path in files:
        for image_id, results in read_proposals(path, image_ids):
            if image_id in sources:
                raise UserError(f"{path}: image {image_id} is in {sources[image_id]} too: give only one of the files")
            sources[image_id] = path
            if results:
                found = "segments" if "segmentation" in results[0] else "boxes"
                kind = kind or found
                if found != kind:
                    raise UserError(
                        f"{path}: image {image_id} has {found}, those before it have {kind}: convert these files separately"
                    )
            yield image_id, results


def _reader(path: Path):
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path} is neither a .json nor a .t7 file")
    return _READERS[path.suffix.lower()]


def _natural_order(path: Path) -> list:
    # Text and numbers by turns, so that like is compared with like.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", path.name))]


def _annotated_ids(annotations: str) -> dict:
    """File name without folders -> image id."""
    image_ids = {}
    for image_id, file_name in load_images(annotations):
        name = PurePosixPath(file_name).name
        if image_ids.setdefault(name, image_id) != image_id:
            raise AnnotationError(f"{annotations}: images {image_ids[name]} and {image_id} are both named {name}")
    return image_ids


# ------------------------------------------------------------------ JSON chunks


def _read_json(path: Path, image_ids: Optional[dict]) -> Iterator[tuple]:
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
    """The results in a chunk, each with an image_id, a score, and a bbox or a segmentation."""
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


def _is_box(box) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, (int, float)) and abs(v) < math.inf for v in box)
        and min(box[2:]) >= 0
    )


def _elements(path: Path) -> Iterator:
    """The elements of a JSON list, decoded one by one."""
    decoder = json.JSONDecoder()
    # Bytes that are not text are found as characters that JSON or RLE do not have.
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
                    # A number of thousands of digits.
                    raise UserError(f"{path} is not a JSON list of COCO results: {error}") from error
                # At the end of what was read so far, the element may go on.
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


def _checked_rles(segmentations: list, where: str) -> list:
    """The masks of an image as pycocotools takes them, with `counts` as text, which a few files call `count`."""
    rles = []
    for segmentation in segmentations:
        if not isinstance(segmentation, dict):
            raise UserError(f"{where} has a segmentation that is not RLE, a dict of size and counts")
        counts = segmentation.get("counts", segmentation.get("count"))
        if not isinstance(counts, str) or not counts:
            raise UserError(f"{where} has an RLE without counts as text: only compressed RLE is read")
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


def _read_torch7(path: Path, image_ids: Optional[dict]) -> Iterator[tuple]:
    content = read_torch7(path)
    if not isinstance(content, Table):
        raise UserError(f"{path} does not hold a table of images and boxes")
    names, boxes = _list_of(content, "images", path), _list_of(content, "boxes", path)
    scores = _list_of(content, "scores", path) if "scores" in content else [None] * len(boxes)
    if not len(names) == len(boxes) == len(scores):
        raise UserError(
            f"{path}: images, boxes and scores are of different length: {len(names)}, {len(boxes)} and {len(scores)}"
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


def _list_of(content: Table, key: str, path: Path) -> list:
    if key not in content:
        raise UserError(f"{path} has no {key}; proposals have images and boxes, it has {sorted(map(str, content))}")
    values = content[key].sequence() if isinstance(content[key], Table) else []
    if not isinstance(content[key], Table) or len(values) != len(content[key]):
        raise UserError(f"{path}: {key} is not a list without gaps")
    return values


def _image_id(name, image_ids: Optional[dict], path: Path):
    if not isinstance(name, str):
        raise UserError(f"{path}: images has {name!r} where a file name is expected")
    name = PurePosixPath(name)
    if image_ids is not None:
        if name.name not in image_ids:
            raise UserError(f"{path}: image {name} is not in the annotations")
        return image_ids[name.name]
    number = re.search(r"[0-9]+$", name.stem)
    if number is None:
        raise UserError(f"{path}: the name of image {name} does not end in its id: give --annotations to look it up")
    return int(number.group())


def _xywh(boxes, where: str) -> np.ndarray:
    """y1, x1, y2, x2 to x, y, width, height: (N, 4) float64."""
    # Torch's empty tensor has no second dimension.
    if isinstance(boxes, np.ndarray) and boxes.shape == (0,):
        boxes = boxes.reshape(0, 4)
    if not isinstance(boxes, np.ndarray) or boxes.ndim != 2 or boxes.shape[1] != 4:
        found = f"shape {boxes.shape}" if isinstance(boxes, np.ndarray) else f"type {type(boxes).__name__}"
        raise UserError(f"{where}: boxes are of {found}, a tensor of (N, 4) is expected")
    y1, x1, y2, x2 = boxes.astype(np.float64).T
    converted = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)
    bad = np.flatnonzero(~(np.isfinite(converted).all(axis=1) & (converted[:, 2:] >= 0).all(axis=1)))
    if len(bad):
        raise UserError(
            f"{where}: box {bad[0] + 1} is {boxes[bad[0]].tolist()}; y1, x1, y2, x2 are expected, y1 <= y2, x1 <= x2"
        )
    return converted


def _scores(scores, count: int, where: str) -> np.ndarray:
    """(N,) or (N, 1) probabilities as (N,) float64."""
    if not isinstance(scores, np.ndarray) or scores.size != count:
        found = str(scores.size) if isinstance(scores, np.ndarray) else f"type {type(scores).__name__}"
        raise UserError(f"{where}: {found} scores for {count} boxes")
    scores = scores.reshape(-1).astype(np.float64)
    bad = scores[~((scores >= 0) & (scores <= 1))]
    if len(bad):
        raise UserError(f"{where}: score {bad[0]} is not a probability in 0..1")
    return scores


_READERS = {".json": _read_json, ".t7": _read_torch7}
