"""The objects that the proposals of some file miss, and how many they are."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
from pycocotools.coco import COCO

from ..evaluation.analysis.image_proposals import in_area_ranges
from ..evaluation.recall import AREA_RANGES
from .file_evaluation import MISS_COUNTS, FileEvaluation


class Miss(NamedTuple):
    """An object that at least one file misses within the first of the highest number of proposals for which it is listed."""

    image_id: Hashable
    # Index among the objects of the image without crowds.
    number: int
    # Square pixels.
    area: float
    # For each of `MISS_COUNTS` the indices of the files that miss the object.
    missed_by: list[list[int]]


def find_misses(
    coco: COCO, evaluations: Sequence[FileEvaluation], limit: int
) -> tuple[list[Miss], list[dict[str, Any]]]:
    """List missed objects, and count all of them.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        evaluations: one per file.
        limit: maximum number of listed objects, for each of `MISS_COUNTS` the ones that most files miss, and the largest ones of these.

    Returns:
        The listed objects, those that more files miss first; and one row per number of proposals and file with the number of missed
        objects by area range: {"count", "file", "objects": {area: number}, "missed": {area: number}}.
    """
    found = []
    totals = np.zeros(len(AREA_RANGES), dtype=int)
    counts = np.zeros((len(MISS_COUNTS), len(evaluations), len(AREA_RANGES)), dtype=int)
    for image_id in evaluations[0].objects:
        areas = object_areas(coco, image_id)
        inside = in_area_ranges(areas)  # A x G
        ranks = np.stack([evaluation.objects[image_id].ranks for evaluation in evaluations])
        missed = np.stack([ranks >= count for count in MISS_COUNTS])  # numbers of proposals x files x G
        totals += inside.sum(axis=1)
        counts += (missed[:, :, None] & inside).sum(axis=3)
        for number in np.flatnonzero(missed.any(axis=(0, 1))):
            by = [np.flatnonzero(row[:, number]).tolist() for row in missed]
            found.append(Miss(image_id, int(number), float(areas[number]), by))
    chosen: set[int] = set()
    for i in range(len(MISS_COUNTS)):
        order = sorted(
            (k for k, miss in enumerate(found) if miss.missed_by[i]),
            key=lambda k, i=i: (-len(found[k].missed_by[i]), -found[k].area),
        )
        chosen.update(order[:limit])
    key = lambda k: ([-len(by) for by in found[k].missed_by], -found[k].area)  # noqa: E731
    rows = [
        {
            "count": count,
            "file": file,
            "objects": dict(zip(AREA_RANGES, totals.tolist())),
            "missed": dict(zip(AREA_RANGES, counts[i, file].tolist())),
        }
        for i, count in enumerate(MISS_COUNTS)
        for file in range(len(evaluations))
    ]
    return [found[k] for k in sorted(chosen, key=key)], rows


def object_annotations(coco: COCO, image_id: Hashable) -> list[dict]:
    """The annotations of an image without crowds, in the order of `evaluation.ground_truth`."""
    annotations = sorted(coco.imgToAnns[image_id], key=lambda annotation: annotation.get("category_id") or 0)
    return [annotation for annotation in annotations if not annotation.get("iscrowd")]


def object_areas(coco: COCO, image_id: Hashable) -> np.ndarray:
    """(G,) areas of the objects of an image in square pixels, see `object_annotations`."""
    return np.array([annotation["area"] for annotation in object_annotations(coco, image_id)], dtype=np.float64)


def category_name(coco: COCO, annotation: dict) -> Optional[str]:
    """Name of the category of an annotation; None if the annotations do not say it."""
    return coco.cats.get(annotation.get("category_id"), {}).get("name")
