"""Evaluates one result file for a report: its recall, how well it covers each image, and which objects it misses.

Shape letters:
    D: proposals (detections) of an image, sorted by descending score
    G: objects of an image, without crowds, by category as `evaluation.ground_truth` sorts them
"""

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO

from ..console import progress
from ..evaluation.analysis.image_proposals import image_proposals
from ..evaluation.ground_truth import BOXES, MASKS
from ..evaluation.proposal_evaluation import add_results, summarize
from ..evaluation.recall import PROPOSAL_COUNTS, UNMATCHED, RecallAccumulator
from ..evaluation.result_file import ResultFile

# An object is found if a proposal among the first ones is matched to it at this IoU, the lowest threshold of recall.
FOUND_IOU = 0.5
# Numbers of proposals per image for which missed objects are listed.
MISS_COUNTS = PROPOSAL_COUNTS[1:]
# The overlap of an image is measured with this many proposals, as in `visualization.rank_images`.
OVERLAP_COUNT = 100


class FoundObjects(NamedTuple):
    """How the objects of an image are found by the proposals of one file."""

    # (G,) rank of the proposal that is matched to each object at `FOUND_IOU`, from 0; `UNMATCHED` without one.
    ranks: np.ndarray
    # (2, G) highest IoU of a proposal with each object among the first of `MISS_COUNTS`.
    ious: np.ndarray
    # (2, G) rank of this proposal, from 0; -1 if no proposal overlaps the object.
    best: np.ndarray


class FileEvaluation(NamedTuple):
    """The evaluation of one result file."""

    # Figures by kind of region, as `evaluate_proposal_json` returns them.
    metrics: dict[str, dict[str, float]]
    # Matched masks of all images.
    recall: RecallAccumulator
    # For each image with objects the mean over them of the highest IoU with any of the first 100 proposals, from 0 to 1.
    overlaps: dict[Hashable, float]
    # For each image with objects how they are found.
    objects: dict[Hashable, FoundObjects]


def evaluate_file(coco: COCO, file: ResultFile, name: str) -> FileEvaluation:
    """Evaluate a result file, image by image.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        file: results with segmentations.
        name: label of the progress bar.

    Returns:
        The evaluation.

    Raises:
        UserError: a result is broken, or an annotation has no segmentation, area or box.
    """
    recalls = {kind: RecallAccumulator() for kind in (MASKS, BOXES)}
    overlaps, objects = {}, {}

    def add(image_id: Hashable, masks: list[dict], scores: list[float]) -> None:
        image = image_proposals(coco, image_id, masks, scores)
        num_objects = len(image.objects.boxes)
        if not num_objects:
            return
        overlaps[image_id] = float(image.ious[:OVERLAP_COUNT].max(axis=0, initial=0).mean())
        ious, best = np.zeros((2, num_objects)), np.full((2, num_objects), -1)
        for i, count in enumerate(MISS_COUNTS):
            first = image.ious[:count]
            if len(first):
                ious[i] = first.max(axis=0)
                best[i] = np.where(ious[i] > 0, first.argmax(axis=0), -1)
        found = np.full(num_objects, UNMATCHED)
        if masks:
            matched = recalls[MASKS].images[image_id]
            found = matched.ranks[0, 0, matched.counted[0]]
        objects[image_id] = FoundObjects(found, ious.astype(np.float32), best.astype(np.int32))

    total = sum(image_id in coco.imgs for image_id in file.image_ids())
    for image_id, results in progress(file.images(), total=total, desc=f"evaluating {name}"):
        masks = add_results(recalls, coco, image_id, results)
        add(image_id, masks, [result["score"] for result in results])
    for image_id in coco.imgs:
        if not file.count(image_id):
            add(image_id, [], [])
    metrics = summarize(coco, recalls)
    # The report needs the ranks of masks only.
    return FileEvaluation(metrics, recalls[MASKS], overlaps, objects)
