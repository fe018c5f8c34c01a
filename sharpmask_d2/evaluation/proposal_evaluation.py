"""Recall of segment proposals on a COCO-format data set: from a network as it runs, or from a COCO result JSON.

Shape letters:
    D: proposals (detections) of an image
"""

import json
import logging
import math
import os
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Sequence
from typing import Optional, Union

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from tabulate import tabulate

from ..data.coco import check_annotations, image_size, load_annotations, load_json
from ..errors import UserError
from ..io.outputs import write_output
from ..structures.coco_masks import MaskError, to_rle
from .coco_results import check_results
from .recall import AREA_RANGES, IOU_THRESHOLDS, PROPOSAL_COUNTS, GroundTruth, RecallAccumulator

# One flat dict of figures per IoU type: {"segm": {"AR@10": ...}, "bbox": {...}}.
Metrics = dict[str, dict[str, float]]

BOXES, MASKS = "bbox", "segm"


class ProposalEvaluator(DatasetEvaluator):
    """AR, AUC and recall by object size and IoU of class-agnostic proposals: of their boxes, and of masks if present.

    The figures are those of `COCOeval` with `useCats = 0`. An image without proposals, or never processed, counts its
    objects as missed (Detectron2's own box-proposal AR drops such images).

    Args:
        dataset_name: a registered data set whose metadata names a COCO annotation file (`json_file`).
        distributed: gather the results of all processes; the main process alone then reports.
        output_dir: where `proposal_metrics.json` is written, unless None.
        max_proposals: of an image's proposals only the best so many take part.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        output_dir: Optional[str] = None,
        max_proposals: int = PROPOSAL_COUNTS[-1],
    ) -> None:
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_proposals = max_proposals
        metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(metadata, "json_file"):
            raise UserError(f"data set {dataset_name} has no json_file in its metadata: register it in COCO format")
        self._coco = load_annotations(PathManager.get_local_path(metadata.json_file))
        self._logger = logging.getLogger(__name__)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._recalls = _accumulators((MASKS, BOXES), self._max_proposals)
        self._without_masks = []  # ids of images that have proposals, but no masks of them

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Match the proposals of some images; nothing of their size is kept.

        Args:
            inputs: dicts with "image_id".
            outputs: dicts with "proposals": Instances in the frame of the original image, with `proposal_boxes` (Boxes,
                D x 4, XYXY in pixels), `objectness_logits` (D, in any order) and, if masks are to be evaluated,
                `proposal_masks`, of which only `rle()` is asked: a list of D compressed COCO RLEs.

        Raises:
            ValueError: the annotation file does not know the image, an annotation has no mask, or masks are of another
                size.
        """
        for record, output in zip(inputs, outputs):
            image_id, proposals = record["image_id"], output["proposals"]
            boxes = proposals.proposal_boxes.tensor.detach().cpu().double().numpy().copy()
            boxes[:, 2:] -= boxes[:, :2]
            scores = proposals.objectness_logits.detach().cpu().double().numpy()
            self._recalls[BOXES].add(image_id, ground_truth(self._coco, image_id, BOXES), boxes, scores)
            if proposals.has("proposal_masks"):
                truth = ground_truth(self._coco, image_id, MASKS)
                self._recalls[MASKS].add(image_id, truth, proposals.proposal_masks.rle(), scores)
            elif len(scores):
                self._without_masks.append(image_id)

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """The figures over all images of the data set.

        Returns:
            {"segm": figures, "bbox": figures}, each as `RecallAccumulator.summarize` gives them, in percent; without
            "segm" if no image came with masks; empty in all processes but the main one.

        Raises:
            ValueError: some images came with masks, and others with proposals but no masks.
        """
        gathered = [(self._recalls, self._without_masks)]
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            gathered = comm.gather(gathered[0], dst=0)
            if not comm.is_main_process():
                return OrderedDict()
        recalls = _accumulators((MASKS, BOXES), self._max_proposals)
        for kind, recall in recalls.items():
            recall.merge(part[kind] for part, _ in gathered)
        without_masks = [image_id for _, ids in gathered for image_id in ids]

        if not recalls[MASKS].images:
            recalls = {BOXES: recalls[BOXES]}
        elif without_masks:
            raise UserError(f"image {without_masks[0]}: its proposals have no proposal_masks, those of other images do")
        num_images = len(self._coco.getImgIds())
        num_missing = num_images - len(recalls[BOXES].images)
        if num_missing:
            self._logger.warning(
                f"{num_missing} of the {num_images} images of {self._dataset_name} were not processed; "
                "their objects count as missed"
            )
        metrics = _summarize(self._coco, recalls)
        self._logger.info(f"Proposals on {self._dataset_name}:\n{format_table(metrics)}")
        if self._output_dir is not None:
            PathManager.mkdirs(self._output_dir)
            write_json(metrics, os.path.join(self._output_dir, "proposal_metrics.json"))
        return metrics


def evaluate_proposal_json(
    annotations: Union[str, os.PathLike, COCO],
    proposals: Union[str, os.PathLike, Sequence[dict]],
    *,
    max_proposals: int = PROPOSAL_COUNTS[-1],
) -> "OrderedDict[str, dict[str, float]]":
    """The figures of `ProposalEvaluator`, from COCO results.

    Categories play no part. An image without results counts its objects as missed; results of images that the annotations do not have are
    left out. Both are logged as warnings, and so are boxes that do not fit their masks or reach beyond their images.

    Args:
        annotations: a COCO annotation file, or what pycocotools loaded from one.
        proposals: a COCO result file, or the list in it: dicts with "image_id", "score" and at least one of "bbox"
            (XYWH in pixels) and "segmentation" (RLE or polygons); a missing box is the tight one of the mask.
        max_proposals: of an image's proposals only the best so many take part.

    Returns:
        {"segm": figures, "bbox": figures} in percent, without "segm" if no result has a segmentation.

    Raises:
        ValueError: a file is not JSON or not of its format, a result is incomplete or broken, none is of an image of the annotations, or
            only some results have a segmentation.
    """
    if isinstance(annotations, COCO):
        coco = annotations
        check_annotations(coco.dataset, "annotations")
    else:
        coco = load_annotations(annotations)
    source = "proposals"
    if isinstance(proposals, (str, os.PathLike)):
        source = os.fspath(proposals)
        proposals = load_json(proposals)
    has_masks = check_results(coco, proposals, source)

    by_image = defaultdict(list)
    for result in proposals:
        by_image[result["image_id"]].append(result)
    recalls = _accumulators((MASKS, BOXES) if has_masks else (BOXES,), max_proposals)
    for image_id in coco.getImgIds():
        if not (results := by_image.get(image_id)):
            continue
        scores = [result["score"] for result in results]
        masks = _rles(coco, image_id, results, "a result") if has_masks else []
        if has_masks:
            recalls[MASKS].add(image_id, ground_truth(coco, image_id, MASKS), masks, scores)
        boxes = [r["bbox"] if "bbox" in r else mask_utils.toBbox(masks[i]) for i, r in enumerate(results)]
        boxes = np.array(boxes, dtype=np.float64)
        recalls[BOXES].add(image_id, ground_truth(coco, image_id, BOXES), boxes, scores)
    return _summarize(coco, recalls)


def format_table(metrics: Metrics) -> str:
    """The figures as two tables to print: AR by number of proposals and object size, and recall by IoU."""
    recall_rows, threshold_rows = [], []
    for kind, values in metrics.items():
        for area in AREA_RANGES:
            suffix = "" if area == "all" else f"-{area}"
            row = [values[f"AR@{count}{suffix}"] for count in PROPOSAL_COUNTS]
            recall_rows.append([kind, area] + row + ([values["AUC"]] if area == "all" else []))
        for count in PROPOSAL_COUNTS:
            row = [values[f"Recall@{count}-IoU{round(100 * threshold)}"] for threshold in IOU_THRESHOLDS]
            threshold_rows.append([kind, count] + row)
    recall_header = ["", "objects"] + [f"AR@{count}" for count in PROPOSAL_COUNTS] + ["AUC"]
    threshold_header = ["recall", "N"] + [f"IoU {threshold:.2f}" for threshold in IOU_THRESHOLDS]
    tables = [(recall_rows, recall_header), (threshold_rows, threshold_header)]
    return "\n\n".join(tabulate(rows, header, tablefmt="pipe", floatfmt=".2f") for rows, header in tables)


def write_json(content, path: Union[str, os.PathLike]) -> None:
    """Write JSON so that the file is there whole or not at all; nan, which JSON has not, becomes null."""
    write_output(path, json.dumps(_without_nan(content), allow_nan=False).encode())


def _without_nan(content):
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def _accumulators(kinds: Sequence[str], max_proposals: int) -> dict[str, RecallAccumulator]:
    return {kind: RecallAccumulator(max_proposals=max_proposals) for kind in kinds}


def _summarize(coco: COCO, recalls: dict[str, RecallAccumulator]) -> "OrderedDict[str, dict[str, float]]":
    """Count the objects of images that are still missing, then report."""
    metrics = OrderedDict()
    for kind, recall in recalls.items():
        nothing = np.empty((0, 4)) if kind == BOXES else []
        for image_id in coco.getImgIds():
            if image_id not in recall.images:
                recall.add(image_id, ground_truth(coco, image_id, kind), nothing, [])
        metrics[kind] = recall.summarize()
    return metrics


def ground_truth(coco: COCO, image_id: Hashable, kind: str) -> GroundTruth:
    """The objects of an image, in COCOeval's order: by category, which decides between equal IoUs.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        image_id: as there.
        kind: BOXES or MASKS.

    Raises:
        ValueError: the annotations do not have the image, or an annotation lacks an area or what `kind` asks for.
    """
    if image_id not in coco.imgs:
        raise UserError(f"image {image_id} is not in the annotations")
    annotations = sorted(coco.imgToAnns[image_id], key=lambda annotation: annotation.get("category_id") or 0)
    for annotation in annotations:
        needed = {BOXES: "bbox", MASKS: "segmentation"}[kind]
        for key in (needed, "area"):
            if key not in annotation or annotation[key] in ([], None):
                raise UserError(f"annotation {annotation.get('id')} of image {image_id} has no {key}")
    if kind == BOXES:
        regions = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    else:
        regions = _rles(coco, image_id, annotations, "annotation")
    return GroundTruth(
        regions,
        areas=np.array([annotation["area"] for annotation in annotations], dtype=np.float64),
        is_crowd=np.array([annotation.get("iscrowd") or 0 for annotation in annotations], dtype=bool),
    )


def _rles(coco: COCO, image_id: Hashable, entries: list, name: str) -> list:
    """The masks of annotations or results of an image, which messages call `name`; they have been checked."""
    size = image_size(coco, image_id)
    if size is None and any(isinstance(entry["segmentation"], list) for entry in entries):
        raise UserError(f"image {image_id} has no height and width in the annotations, which polygons need")
    rles = []
    for entry in entries:
        try:
            rles.append(to_rle(entry["segmentation"], size))
        except MaskError as error:
            which = f" {entry['id']}" if "id" in entry else ""
            raise UserError(f"{name}{which} of image {image_id}: its segmentation {error}") from None
    return rles
