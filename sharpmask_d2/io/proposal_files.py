"""Proposals of many images in files: COCO result JSON and Detectron2's precomputed-proposal pickle, written so that nothing is lost.

While images are worked through, every finished one is a line of `<output>.partial`, after a first line with the run's settings. A run that
was stopped goes on behind the last whole line; at the end the lines become the output, and the partial file goes.
"""

import contextlib
import json
import math
import os
import pickle
from collections.abc import KeysView
from pathlib import Path
from typing import Optional

import numpy as np
from detectron2.structures import BoxMode, Instances

from ..errors import UserError
from .fingerprint import changed_settings
from .outputs import PARTIAL, OutputError, open_locked, open_output

# How many changed settings a message names.
_NAMED = 4


def to_results(proposals: Instances, image_id, **extra) -> list:
    """Proposals as COCO results.

    Args:
        proposals: proposal_boxes, objectness_logits and proposal_masks in the frame of the image.
        image_id: as in the annotations.
        extra: more entries for every result.

    Returns:
        list of dicts: image_id, category_id 1, bbox (x, y, width, height), score (probability), segmentation (compressed RLE as text).
    """
    boxes = BoxMode.convert(proposals.proposal_boxes.tensor.cpu(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    scores = proposals.objectness_logits.double().sigmoid().tolist()
    rles = proposals.proposal_masks.rle()
    return [
        {
            "image_id": image_id,
            **extra,
            "category_id": 1,
            "bbox": box,
            "score": score,
            "segmentation": rle,
        }
        for box, score, rle in zip(boxes, scores, rles)
    ]


class ProposalWriter:
    """Collects the results of images in a file that survives being killed, and that one run at a time writes.

    with ProposalWriter("proposals.json", settings) as writer:
        writer.add(1, results)
        writer.finish()
    """

    def __init__(self, output: str, settings: dict):
        """
        Args:
            output: path of the JSON to write.
            settings: what the results depend on, besides the images: nested dicts. A partial file made with others is not continued.

        Raises:
            OutputError: another run is writing the output, or one with other settings was stopped; the message names those that changed.
        """
        self.output = Path(output)
        self.partial = self.output.with_name(self.output.name + PARTIAL)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._places = {}  # key of an image -> where its line begins
        self._pictures = set()
        self._started = False
        self._file = open_locked(self.partial)
        try:
            # As it is when it has been read from the file.
            self._continue(json.loads(json.dumps(settings)))
        except BaseException:
            self.close()
            raise
        self._started = True

    def __enter__(self) -> "ProposalWriter":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Stop; what was added stays for a run that goes on. A run that added nothing leaves nothing."""
        if self._started and not self._places and not self._file.closed:
            self.partial.unlink(missing_ok=True)
        # A line that did not fit on a full disk would fail here a second time.
        with contextlib.suppress(OSError):
            self._file.close()

    @property
    def done(self) -> KeysView:
        """Keys of the images whose results are there."""
        return self._places.keys()

    def _continue(self, settings: dict) -> None:
        """Read what a stopped run left, and remove the line that it did not finish."""
        end = self._read_lines(settings)
        self._file.seek(end)
        self._file.truncate()
        if not end:
            self._append({"settings": settings})

    def _read_lines(self, settings: dict) -> int:
        """Returns where the whole lines end; 0 if there is nothing to continue."""
        header = self._file.readline()
        if not header.endswith(b"\n"):
            return 0
        try:
            former = json.loads(header)["settings"]
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"{self.partial} is not what a stopped run leaves behind: move it away, or choose another output"
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
            # A run that ended before its first image left nothing to lose.
            self._pictures.clear()
            return 0
        if changes:
            more = f", and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
            raise OutputError(
                f"{self.partial} was written with other settings: {'; '.join(changes[:_NAMED])}{more}. Set them back to go on with "
                "that run, remove the file to start anew, or choose another output"
            )
        return end

    def _append(self, line: dict) -> None:
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"cannot write {self.partial}: {error.strerror}; it keeps the images done so far, for a run that goes on"
            ) from error

    def add(self, key, results: list) -> None:
        """Keep the results of an image; they are in the file when this returns.

        Args:
            key: an int or a str by which a run that goes on knows the image.
            results: COCO results.
        """
        self._file.seek(0, os.SEEK_END)
        place = self._file.tell()
        # The key comes first: it is found without reading the results.
        self._append({"image": key, "results": results})
        self._places[key] = place

    def add_picture(self, key, name: str) -> None:
        """Keep that the picture `name` of an image has been written."""
        self._append({"image": key, "picture": name})
        self._pictures.add((key, name))

    def has_picture(self, key, name: str) -> bool:
        """Whether this run, or the one that it continues, has written the picture `name` of an image."""
        return (key, name) in self._pictures

    def results(self, key) -> list:
        """The results of an image that is done."""
        self._file.seek(self._places[key])
        return json.loads(self._file.readline())["results"]

    def entries(self, images: Optional[list] = None):
        """The images that are done: dicts of image_id and results.

        Args:
            images: pairs of key and what to replace in each result, such as {"image_id": 5}, in the order of the entries. By default all
                that were added, in that order, unchanged; then keys are image ids.
        """
        for key, changes in images if images is not None else [(key, {"image_id": key}) for key in self._places]:
            yield {"image_id": changes["image_id"], "results": [{**result, **changes} for result in self.results(key)]}

    def finish(
        self,
        pickle_path: Optional[str] = None,
        *,
        images: Optional[list] = None,
        pickle_masks: bool = False,
        keep_partial: bool = False,
    ) -> int:
        """Write the JSON and, where a path is given, the pickle; each appears under its name only when it is whole.

        Args:
            pickle_path: for Detectron2's precomputed proposals.
            images: see `entries`.
            pickle_masks: see `write_pickle`.
            keep_partial: leave the partial file, for a run that has to be continued.

        Returns:
            how many results the JSON holds.

        Raises:
            OutputError: a file cannot be written; the partial file stays.
        """
        count = 0
        with open_output(self.output) as out:
            out.write(b"[")
            separator = "\n"
            for entry in self.entries(images):
                count += len(entry["results"])
                for result in entry["results"]:
                    out.write((separator + json.dumps(result)).encode())
                    separator = ",\n"
            out.write(b"\n]\n")
        if pickle_path:
            write_pickle(self.entries(images), pickle_path, masks=pickle_masks)
        if not keep_partial:
            # Before the lock is given back, so that no other run goes on with it.
            self.partial.unlink()
            self._started = False
        self.close()
        return count


def _parse_line(line: bytes) -> tuple:
    """(key, "results" or "picture") of a line of the partial file; (None, None) of one that is not whole."""
    start, decoder = len('{"image": '), json.JSONDecoder()
    try:
        text = line.decode()
        key, end = decoder.raw_decode(text, start)
    except ValueError:
        return None, None
    if not text.startswith('{"image": ') or not text.endswith("}\n"):
        return None, None
    return key, next((kind for kind in ("results", "picture") if text.startswith(f', "{kind}": ', end)), None)


def write_pickle(entries, path: str, *, masks: bool = False) -> None:
    """Write proposals as Detectron2's `load_proposals_into_dataset` reads them.

    Args:
        entries: dicts with image_id and results as `to_results` makes them.
        path: of the pickle: ids, boxes (N, 4) XYXY float32 and objectness_logits (N,) per image, bbox_mode.
        masks: also the masks per image as `join_rles` makes them, which Detectron2 passes over: about 0.3 kB a proposal, read with the
            file, and of use to heads whose detections keep them.

    Raises:
        ValueError: masks are asked for, but a result has no segmentation, or none that is compressed RLE of the image's size.
    """
    content = {"ids": [], "boxes": [], "objectness_logits": [], "bbox_mode": int(BoxMode.XYXY_ABS)}
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


def join_rles(rles: list) -> dict:
    """The masks of an image as one string: a file of many images is read without making an object of every mask.

    Args:
        rles: N compressed COCO RLEs of one size; counts may be text.

    Returns:
        {"size": [H, W], "counts": bytes, those of all masks with a line end between them}; None and empty for no masks.

    Raises:
        ValueError: not compressed RLEs, or of several sizes.
    """
    for i, rle in enumerate(rles):
        if not isinstance(rle, dict) or not isinstance(rle.get("counts"), (str, bytes)):
            raise UserError(f"segmentation {i} is no compressed COCO RLE: encode it with pycocotools")
        if list(rle["size"]) != list(rles[0]["size"]):
            raise UserError(f"segmentation {i} has the size {list(rle['size'])}, the first {list(rles[0]['size'])}")
    counts = (rle["counts"] for rle in rles)
    return {
        "size": list(rles[0]["size"]) if rles else None,
        "counts": b"\n".join(c.encode("ascii") if isinstance(c, str) else c for c in counts),
    }


def count_rles(joined: dict) -> int:
    """How many masks `join_rles` joined."""
    return joined["counts"].count(b"\n") + 1 if joined["counts"] else 0


def split_rles(joined: dict) -> list:
    """The RLEs that `join_rles` joined."""
    counts = joined["counts"].split(b"\n") if joined["counts"] else []
    return [{"size": joined["size"], "counts": c} for c in counts]


def _logit(probability: float) -> float:
    tiny = 1e-12
    probability = min(max(probability, tiny), 1 - tiny)
    return math.log(probability / (1 - probability))
