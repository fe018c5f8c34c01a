"""Writes the proposals of many images as COCO results (JSON) and as Detectron2's pickle of precomputed proposals.

During a run, `<output>.partial` holds the run's settings in its first line and one line for each finished image. A run that was stopped
resumes after the last complete line. At the end the lines become the output, and the partial file is removed.

Shape letters: N proposals of an image, H W image.
"""

import contextlib
import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator, KeysView, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import numpy as np

from ..errors import UserError
from .fingerprint import changed_settings
from .outputs import PARTIAL, OutputError, open_locked, open_output

if TYPE_CHECKING:
    from detectron2.structures import Instances

# An image is known by its id or by a text.
Key = Union[int, str]

# Of the form of partial files.
_VERSION = 2
# Between the results of a line of the partial file. JSON is the same with it as with ", ", and no other place of a line has a tab.
_SEPARATOR = b",\t"
# Between the key of an image and its results.
_RESULTS = b', "results": ['

# Maximum number of changed settings that a message names.
_NAMED = 4
# Detectron2's BoxMode.XYXY_ABS. This module works without Detectron2.
_XYXY_ABS = 0


def to_results(proposals: "Instances", image_id: Key, **extra: Any) -> list[dict]:
    """The proposals of an image as COCO results.

    Args:
        proposals: N proposals with proposal_boxes (XYXY in pixels), objectness_logits and proposal_masks in the frame of the image.
        image_id: as in the annotations.
        extra: further entries of every result.

    Returns:
        N dicts with image_id, category_id 1, bbox (x, y, width, height in pixels), score (probability) and segmentation (compressed RLE
        as text).
    """
    boxes = proposals.proposal_boxes.tensor.cpu().numpy()
    scores = proposals.objectness_logits.double().sigmoid().tolist()
    return make_results(boxes, scores, proposals.proposal_masks.rle(), image_id, **extra)


def make_results(
    boxes: np.ndarray, scores: Sequence[float], rles: Sequence[dict], image_id: Key, **extra: Any
) -> list[dict]:
    """The proposals of an image as COCO results.

    Args:
        boxes: (N, 4) float32 XYXY in pixels.
        scores: N probabilities.
        rles: N masks as compressed RLE, with counts as text.
        image_id, extra: see `to_results`.

    Returns:
        See `to_results`.
    """
    corners_and_sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    return [
        {
            "image_id": image_id,
            **extra,
            "category_id": 1,
            "bbox": box,
            "score": score,
            "segmentation": rle,
        }
        for box, score, rle in zip(corners_and_sides, scores, rles)
    ]


class ProposalWriter:
    """Collects the results of images in a partial file, from which a run that was killed can be resumed. One run at a time writes it.

    with ProposalWriter("proposals.json", settings) as writer:
        writer.add(1, results)
        writer.finish()
    """

    def __init__(self, output: str, settings: dict[str, Any]):
        """
        Args:
            output: path of the JSON file to write.
            settings: nested dicts of everything but the images that the results depend on. A partial file with other settings is not
                resumed.

        Raises:
            OutputError: another run is writing the output, or the partial file has other settings; the message names those that changed.
        """
        self.output = Path(output)
        self.partial = self.output.with_name(self.output.name + PARTIAL)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._places: dict[Key, int] = {}  # key of an image -> position at which its line begins
        self._pictures: set[tuple[Key, str]] = set()
        # Image id -> number of its results in the output, set by `finish`.
        self.counts: dict[Key, int] = {}
        self._started = False
        self._file = open_locked(self.partial)
        try:
            # In the form in which settings are read from the file.
            self._resume(json.loads(json.dumps({**settings, "partial file": _VERSION})))
        except BaseException:
            self.close()
            raise
        self._started = True

    def __enter__(self) -> "ProposalWriter":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Close the partial file. It stays for a run that resumes, unless no image was added."""
        if self._started and not self._places and not self._file.closed:
            self.partial.unlink(missing_ok=True)
        # On a full disk, closing fails a second time.
        with contextlib.suppress(OSError):
            self._file.close()

    @property
    def done(self) -> KeysView[Key]:
        """Keys of the images whose results have been added, in this run or before."""
        return self._places.keys()

    def _resume(self, settings: dict[str, Any]) -> None:
        """Read the lines of a stopped run, and remove the line that it did not complete."""
        end = self._read_lines(settings)
        self._file.seek(end)
        self._file.truncate()
        if not end:
            self._append(json.dumps({"settings": settings}).encode())

    def _read_lines(self, settings: dict[str, Any]) -> int:
        """The position at which the complete lines end; 0 if there is nothing to resume."""
        header = self._file.readline()
        if not header.endswith(b"\n"):
            return 0
        try:
            former = json.loads(header)["settings"]
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"{self.partial} is not the partial file of a stopped run: move it away, or choose another output"
            ) from None
        end = len(header)
        for line in self._file:
            key, kind = _parse_line(line)
            if kind == "results":
                self._places[key] = end
            elif kind == "picture":
                self._pictures.add((key, json.loads(line)["picture"]))
            else:
                break
            end += len(line)
        changes = changed_settings(former, settings)
        if changes and not self._places:
            # A run that ended before its first image is not resumed.
            self._pictures.clear()
            return 0
        if changes:
            more = f", and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
            raise OutputError(
                f"{self.partial} was written with other settings: {'; '.join(changes[:_NAMED])}{more}. Set them back to resume that "
                "run, remove the file to start again, or choose another output"
            )
        return end

    def _append(self, line: bytes) -> None:
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write(line + b"\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"cannot write {self.partial}: {error.strerror}; it keeps the images done so far: run again to resume"
            ) from error

    def add(self, key: Key, results: list[dict]) -> None:
        """Add the results of an image. They are in the partial file when this returns.

        Args:
            key: by which a run that resumes recognises the image.
            results: COCO results of the image.

        Raises:
            OutputError: the partial file cannot be written.
        """
        encoded = _SEPARATOR.join(json.dumps(result).encode() for result in results)
        self._file.seek(0, os.SEEK_END)
        place = self._file.tell()
        # The key comes first, so that it is found without decoding the results.
        self._append(b'{"image": %b%b%b]}' % (json.dumps(key).encode(), _RESULTS, encoded))
        self._places[key] = place

    def add_picture(self, key: Key, name: str) -> None:
        """Record that the picture `name` of the image `key` has been written."""
        self._append(json.dumps({"image": key, "picture": name}).encode())
        self._pictures.add((key, name))

    def has_picture(self, key: Key, name: str) -> bool:
        """Whether this run, or the one that it resumes, has written the picture `name` of the image `key`."""
        return (key, name) in self._pictures

    def results(self, key: Key) -> list[dict]:
        """The COCO results of an image that has been added."""
        self._file.seek(self._places[key])
        return json.loads(self._file.readline())["results"]

    def _encoded(self, key: Key, changes: dict[str, Any]) -> list[bytes]:
        """The results of an image as JSON, with entries replaced as in `entries`. They are encoded again only if an entry changes."""
        self._file.seek(self._places[key])
        line = self._file.readline()
        content = line[line.index(_RESULTS) + len(_RESULTS) : -len(b"]}\n")]
        unchanged = json.dumps(changes)[:-1].encode() + b", "
        return [
            text if text.startswith(unchanged) else json.dumps({**json.loads(text), **changes}).encode()
            for text in (content.split(_SEPARATOR) if content else [])
        ]

    def entries(self, images: Optional[list[tuple[Key, dict[str, Any]]]] = None) -> Iterator[dict[str, Any]]:
        """The results image by image.

        Args:
            images: (key, entries to replace in each result, such as {"image_id": 5}) of the images in the order wanted. By default all
                images that were added, in that order; their keys are then the image ids.

        Returns:
            Iterator of dicts with image_id and results.
        """
        for key, changes in self._in_order(images):
            yield {"image_id": changes["image_id"], "results": [{**result, **changes} for result in self.results(key)]}

    def _in_order(self, images: Optional[Sequence[tuple[Key, dict[str, Any]]]]) -> Sequence[tuple[Key, dict[str, Any]]]:
        return [(key, {"image_id": key}) for key in self._places] if images is None else images

    def finish(
        self,
        pickle_path: Optional[str] = None,
        *,
        images: Optional[Sequence[tuple[Key, dict[str, Any]]]] = None,
        pickle_masks: bool = False,
        keep_partial: bool = False,
        dataset: Optional[dict[str, Any]] = None,
    ) -> int:
        """Write the JSON file and, if a path is given, the pickle. Each appears under its name only when it is complete.

        Args:
            pickle_path: of the pickle of precomputed proposals for Detectron2; none by default.
            images: see `entries`.
            pickle_masks: write masks into the pickle, see `write_pickle`.
            keep_partial: keep the partial file, because the run has to be resumed.
            dataset: write a COCO dataset of these entries, such as images and categories, whose annotations are the results. By default
                the file is the list of the results.

        Returns:
            Number of results in the JSON file.

        Raises:
            OutputError: a file cannot be written; the partial file stays.
            UserError: see `write_pickle`.
        """
        self.counts = {}

        def encoded() -> Iterator[list[bytes]]:
            for key, changes in self._in_order(images):
                texts = self._encoded(key, changes)
                self.counts[changes["image_id"]] = len(texts)
                yield texts

        write_results(self.output, encoded(), dataset=dataset)
        if pickle_path:
            write_pickle(self.entries(images), pickle_path, masks=pickle_masks)
        if not keep_partial:
            # Before the lock ends, so that no other run resumes from it.
            self.partial.unlink()
            self._started = False
        self.close()
        return sum(self.counts.values())


def write_results(
    output: Union[str, Path], images: Iterable[Sequence[bytes]], *, dataset: Optional[dict[str, Any]] = None
) -> int:
    """Write COCO results as JSON, one per line. The file appears under its name when it is complete.

    Args:
        output: path of the file.
        images: the results of each image, each as JSON.
        dataset: write a COCO dataset of these entries, see `ProposalWriter.finish`. By default the file is the list of the results.

    Returns:
        Number of results.

    Raises:
        OutputError: the file cannot be written.
    """
    count = 0
    with open_output(output) as out:
        out.write(b"[" if dataset is None else (json.dumps(dataset)[:-1] + ', "annotations": [').encode())
        separator = b"\n"
        for texts in images:
            if texts:
                out.write(separator + b",\n".join(texts))
                separator = b",\n"
            count += len(texts)
        out.write(b"\n]\n" if dataset is None else b"\n]}\n")
    return count


def _parse_line(line: bytes) -> tuple[Optional[Key], Optional[str]]:
    """(key, "results" or "picture") of a line of the partial file; (None, None) of an incomplete line."""
    start, decoder = len('{"image": '), json.JSONDecoder()
    try:
        text = line.decode()
        key, end = decoder.raw_decode(text, start)
    except ValueError:
        return None, None
    if not text.startswith('{"image": ') or not text.endswith("}\n"):
        return None, None
    return key, next((kind for kind in ("results", "picture") if text.startswith(f', "{kind}": ', end)), None)


def write_pickle(entries: Iterable[dict[str, Any]], path: str, *, masks: bool = False) -> None:
    """Write proposals in the format that Detectron2's `load_proposals_into_dataset` reads.

    The pickle holds ids, boxes ((N, 4) XYXY float32 in pixels, one array per image), objectness_logits ((N,) float32, one array per image)
    and bbox_mode.

    Args:
        entries: one dict per image, with image_id and results as `to_results` makes them.
        path: of the pickle.
        masks: also write the masks, one entry of `join_rles` per image, for heads whose detections keep the masks of proposals. Detectron2
            ignores them. They take about 0.3 kB per proposal.

    Raises:
        UserError: masks are asked for, but a result has no segmentation, or not one in compressed RLE of the image's size.
        OutputError: the file cannot be written.
    """
    content: dict[str, Any] = {"ids": [], "boxes": [], "objectness_logits": [], "bbox_mode": _XYXY_ABS}
    joined = []
    for entry in entries:
        results = entry["results"]
        boxes = np.array([r["bbox"] for r in results], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        content["ids"].append(entry["image_id"])
        content["boxes"].append(boxes)
        content["objectness_logits"].append(np.array([_logit(r["score"]) for r in results], dtype=np.float32))
        if masks:
            try:
                joined.append(join_rles([r.get("segmentation") for r in results]))
            except ValueError as error:
                raise UserError(f"{path}: image {entry['image_id']}: {error}") from None
    if masks:
        content["masks"] = joined
    with open_output(path) as out:
        pickle.dump(content, out)


def join_rles(rles: list[dict]) -> dict[str, Any]:
    """The masks of an image in one string, so that reading a file of many images creates few objects.

    Args:
        rles: N compressed COCO RLEs of one size; counts are bytes or text.

    Returns:
        {"size": [H, W], "counts": the counts of all masks, as bytes separated by line ends}; size None and empty counts for no masks.

    Raises:
        UserError: a mask is not compressed RLE, or has another size than the first.
    """
    for i, rle in enumerate(rles):
        if not isinstance(rle, dict) or not isinstance(rle.get("counts"), (str, bytes)):
            raise UserError(f"segmentation {i} is not a compressed COCO RLE: encode it with pycocotools")
        if list(rle["size"]) != list(rles[0]["size"]):
            raise UserError(
                f"segmentation {i} has the size {list(rle['size'])}, but the first one {list(rles[0]['size'])}: masks of an image have "
                "one size"
            )
    counts = (rle["counts"] for rle in rles)
    return {
        "size": list(rles[0]["size"]) if rles else None,
        "counts": b"\n".join(c.encode("ascii") if isinstance(c, str) else c for c in counts),
    }


def count_rles(joined: dict[str, Any]) -> int:
    """Number of masks in an entry of `join_rles`."""
    return joined["counts"].count(b"\n") + 1 if joined["counts"] else 0


def split_rles(joined: dict[str, Any]) -> list[dict]:
    """The N RLEs of an entry of `join_rles`, with counts as bytes."""
    counts = joined["counts"].split(b"\n") if joined["counts"] else []
    return [{"size": joined["size"], "counts": c} for c in counts]


def _logit(probability: float) -> float:
    tiny = 1e-12
    probability = min(max(probability, tiny), 1 - tiny)
    return math.log(probability / (1 - probability))
