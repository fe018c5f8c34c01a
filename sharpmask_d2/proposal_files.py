"""Proposals of many images in files: COCO result JSON and Detectron2's precomputed-proposal pickle, written so that nothing is lost.

While images are worked through, every finished one is a line of `<output>.partial`. A run that was stopped goes on behind the last whole
line; at the end the lines become the output, and the partial file goes.
"""

import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
from detectron2.structures import BoxMode, Instances


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
    """Collects the results of images in a file that survives being killed."""

    def __init__(self, output: str, settings: dict):
        """
        Args:
            output: path of the JSON to write.
            settings: what the results depend on; a partial file made with others is not continued.

        Raises:
            ValueError: there is a partial file of another run.
        """
        self.output = Path(output)
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.done = set()
        header = json.dumps({"settings": settings}, sort_keys=True)
        end = self._read_partial(header)
        self._file = open(self.partial, "r+b" if end else "wb")  # noqa: SIM115  (open until finish)
        if end:
            # A line that was being written when the run was stopped is written again.
            self._file.truncate(end)
            self._file.seek(end)
        else:
            self._append(header)

    def _read_partial(self, header: str) -> int:
        """Reads the ids of finished images; returns where whole lines end, 0 if there is nothing to continue."""
        if not self.partial.exists():
            return 0
        end = 0
        with open(self.partial, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                if end == 0 and line.decode().strip() != header:
                    # A run that ended before its first image left nothing to lose.
                    if not next(lines, b"").endswith(b"\n"):
                        return 0
                    raise ValueError(
                        f"{self.partial} was written with another config, other weights or other inputs: "
                        "remove it, or choose another output"
                    )
                if end:
                    self.done.add(json.loads(line)["image_id"])
                end += len(line)
        return end

    def _append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def add(self, image_id, results: list) -> None:
        """Keep the results of an image; they are on disk when this returns."""
        self._append(json.dumps({"image_id": image_id, "results": results}))
        self.done.add(image_id)

    def entries(self):
        """The images that are done: dicts of image_id and results, in the order they were added."""
        with open(self.partial, "rb") as lines:
            next(lines)
            for line in lines:
                yield json.loads(line)

    def finish(self, pickle_path: str = "", *, pickle_masks: bool = False, keep_partial: bool = False) -> int:
        """Write the JSON and, where a path is given, the pickle; each appears under its name only when it is whole.

        Args:
            pickle_path: for Detectron2's precomputed proposals.
            pickle_masks: see `write_pickle`.
            keep_partial: leave the partial file, for a run that has to be continued.

        Returns:
            how many results the JSON holds.
        """
        self._file.close()
        count = 0
        temporary = self.output.with_name(self.output.name + ".tmp")
        with open(temporary, "w") as out:
            out.write("[")
            separator = "\n"
            for entry in self.entries():
                count += len(entry["results"])
                for result in entry["results"]:
                    out.write(separator + json.dumps(result))
                    separator = ",\n"
            out.write("\n]\n")
        os.replace(temporary, self.output)
        if pickle_path:
            write_pickle(self.entries(), pickle_path, masks=pickle_masks)
        if not keep_partial:
            self.partial.unlink()
        return count


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
                raise ValueError(f"{path}: image {entry['image_id']}: {error}") from None
    if masks:
        content["masks"] = joined
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as out:
        pickle.dump(content, out)
    os.replace(temporary, path)


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
            raise ValueError(f"segmentation {i} is no compressed COCO RLE: encode it with pycocotools")
        if list(rle["size"]) != list(rles[0]["size"]):
            raise ValueError(f"segmentation {i} has the size {list(rle['size'])}, the first {list(rles[0]['size'])}")
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
