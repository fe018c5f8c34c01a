"""Recall of proposals on a dataset in COCO format: `ProposalEvaluator` for Detectron2, and a function for COCO result files.

Shape letters:
    D: proposals (detections) of an image
"""

import json
import logging
import math
import os
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, Optional, Union

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from tabulate import tabulate

from ..console import progress
from ..data.coco import check_annotations, load_annotations
from ..errors import UserError
from ..io.outputs import write_output
from .coco_results import check_results
from .ground_truth import BOXES, MASKS, encode_segmentations, ground_truth
from .recall import AREA_RANGES, IOU_THRESHOLDS, PRECISION_IOUS, PROPOSAL_COUNTS, RecallAccumulator
from .result_file import ResultFile

# One flat dict of figures per kind of region: {"segm": {"AR@10": ...}, "bbox": {...}}.
Metrics = dict[str, dict[str, float]]


class ProposalEvaluator(DatasetEvaluator):
    """Evaluates class-agnostic proposals in Detectron2: AR, AUC, and recall by object size and IoU, of boxes and, if present, masks.

    The figures equal those of `COCOeval` with `useCats = 0`. The objects of an image that has no proposals or was not processed count as
    missed (Detectron2's own AR of box proposals ignores such images).
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        output_dir: Optional[str] = None,
        max_proposals: int = PROPOSAL_COUNTS[-1],
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset whose metadata names a COCO annotation file (`json_file`).
            distributed: gather the results of all processes; only the main process then reports. Default: True.
            output_dir: folder in which `proposal_metrics.json` is written. Default: None, no file.
            max_proposals: maximum number of proposals per image; only the best ones are evaluated. Default: 1000.

        Raises:
            UserError: the metadata of the dataset has no `json_file`, or this file is not a COCO annotation file.
        """
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_proposals = max_proposals
        metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(metadata, "json_file"):
            raise UserError(f"dataset {dataset_name} has no json_file in its metadata: register it in COCO format")
        self._coco = load_annotations(PathManager.get_local_path(metadata.json_file))
        self._logger = logging.getLogger(__name__)
        self.reset()

    def reset(self) -> None:
        """Discard the results of all images."""
        self._recalls = _accumulators((MASKS, BOXES), self._max_proposals)
        self._without_masks = []  # ids of images whose proposals have no masks

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Match the proposals of a batch of images; only ranks are stored.

        Args:
            inputs: one dict per image with "image_id".
            outputs: one dict per image with "proposals": `Instances` in the frame of the original image. Fields: `proposal_boxes` (`Boxes`,
                (D, 4) XYXY in pixels), `objectness_logits` ((D,), in any order) and, to evaluate masks, `proposal_masks`, an object
                whose method `rle()` returns D masks as compressed RLE.

        Raises:
            UserError: the annotations do not contain the image, an annotation has no mask, or a mask has another size than the image.
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
        """Compute the figures over all images of the dataset.

        Returns:
            {"segm": figures, "bbox": figures}, each as in `RecallAccumulator.summarize`, in percent. "segm" is absent if no proposals had
            masks. The result is empty in all processes except the main process.

        Raises:
            UserError: the proposals of some images have masks and those of others do not.
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
            raise UserError(
                f"image {without_masks[0]}: its proposals have no proposal_masks, but those of other images have"
            )
        num_images = len(self._coco.getImgIds())
        num_missing = num_images - len(recalls[BOXES].images)
        if num_missing:
            self._logger.warning(
                f"{num_missing} of the {num_images} images of {self._dataset_name} were not processed; "
                "their objects count as missed"
            )
        metrics = summarize(self._coco, recalls)
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
    precision: bool = False,
) -> "OrderedDict[str, dict[str, float]]":
    """Compute the figures of `ProposalEvaluator` from COCO results.

    Categories are ignored. The objects of images without results count as missed, and results of images that are not in the annotations
    are ignored. Warnings are logged for both, and for boxes that do not fit their masks or extend beyond their images.

    Args:
        annotations: path of a COCO annotation file, or the `COCO` object of pycocotools.
        proposals: path of a COCO result file, or its list of dicts with "image_id", "score" and at least one of "bbox" (XYWH in pixels of
            the original image) and "segmentation" (RLE or polygons). If "bbox" is missing, the tight box of the mask is used.
        max_proposals: maximum number of proposals per image; only the best ones are evaluated. Default: 1000.
        precision: add the figures of `RecallAccumulator.summarize_precision`. They say something of results that were selected, such as the
            masks of `sharpmask segment`. Default: False.

    Returns:
        {"segm": figures, "bbox": figures} in percent; "segm" is absent if the results have no segmentations.

    Raises:
        FileNotFoundError: a file does not exist.
        UserError: a file is not JSON or has another format, a result is incomplete or broken, none of the images of the results is in the
            annotations, or only some results have a segmentation.
    """
    if isinstance(annotations, COCO):
        coco = annotations
        check_annotations(coco.dataset, "annotations")
    else:
        coco = load_annotations(annotations)
    if isinstance(proposals, (str, os.PathLike)):
        with ResultFile(proposals, coco) as file:
            recalls = _accumulators((MASKS, BOXES) if file.has_masks else (BOXES,), max_proposals)
            total = sum(image_id in coco.imgs for image_id in file.image_ids())
            for image_id, results in progress(file.images(), total=total, desc="evaluating"):
                add_results(recalls, coco, image_id, results)
    else:
        has_masks = check_results(coco, proposals, "proposals")
        by_image = defaultdict(list)
        for result in proposals:
            by_image[result["image_id"]].append(result)
        recalls = _accumulators((MASKS, BOXES) if has_masks else (BOXES,), max_proposals)
        for image_id in coco.getImgIds():
            if results := by_image.get(image_id):
                add_results(recalls, coco, image_id, results)
    metrics = summarize(coco, recalls)
    if precision:
        for kind, recall in recalls.items():
            metrics[kind].update(recall.summarize_precision())
    return metrics


def add_results(
    recalls: dict[str, RecallAccumulator], coco: COCO, image_id: Hashable, results: Sequence[dict]
) -> list[dict]:
    """Match the results of one image.

    Args:
        recalls: accumulators by kind of region, `BOXES` and `MASKS`; the results are added to each of them.
        coco: annotations that `data.coco.check_annotations` has passed.
        image_id: identifier of the image in the annotations.
        results: all results of the image, which `coco_results.ResultChecks` has passed.

    Returns:
        The masks of the results as compressed RLE; none if `recalls` has no `MASKS`.

    Raises:
        UserError: an annotation lacks its area or the region, or a polygon has no size of an image to be drawn in.
    """
    scores = [result["score"] for result in results]
    masks = encode_segmentations(coco, image_id, list(results), "a result") if MASKS in recalls else []
    if MASKS in recalls:
        recalls[MASKS].add(image_id, ground_truth(coco, image_id, MASKS), masks, scores)
    boxes = [r["bbox"] if "bbox" in r else mask_utils.toBbox(masks[i]) for i, r in enumerate(results)]
    boxes = np.array(boxes, dtype=np.float64)
    recalls[BOXES].add(image_id, ground_truth(coco, image_id, BOXES), boxes, scores)
    return masks


def format_table(metrics: Metrics) -> str:
    """Format figures as Markdown tables: AR by number of proposals and object size, recall by IoU and, if present, precision.

    Args:
        metrics: the result of `evaluate_proposal_json` or `ProposalEvaluator.evaluate`.

    Returns:
        The tables, separated by empty lines.
    """
    recall_rows, threshold_rows, precision_rows = [], [], []
    precision_keys = [f"{name}-IoU{iou}" for iou in PRECISION_IOUS for name in ("Precision", "Recall")]
    for kind, values in metrics.items():
        for area in AREA_RANGES:
            suffix = "" if area == "all" else f"-{area}"
            row = [values[f"AR@{count}{suffix}"] for count in PROPOSAL_COUNTS]
            recall_rows.append([kind, area] + row + ([values["AUC"]] if area == "all" else []))
        for count in PROPOSAL_COUNTS:
            row = [values[f"Recall@{count}-IoU{round(100 * threshold)}"] for threshold in IOU_THRESHOLDS]
            threshold_rows.append([kind, count] + row)
        if "Results-per-image" in values:
            precision_rows.append([kind, values["Results-per-image"]] + [values[key] for key in precision_keys])
    recall_header = ["", "objects"] + [f"AR@{count}" for count in PROPOSAL_COUNTS] + ["AUC"]
    threshold_header = ["recall", "N"] + [f"IoU {threshold:.2f}" for threshold in IOU_THRESHOLDS]
    tables = [(recall_rows, recall_header), (threshold_rows, threshold_header)]
    if precision_rows:
        header = ["all results", "per image"] + [key.replace("-", " ") for key in precision_keys]
        tables.append((precision_rows, header))
    return "\n\n".join(tabulate(rows, header, tablefmt="pipe", floatfmt=".2f") for rows, header in tables)


def write_json(content: Any, path: Union[str, os.PathLike]) -> None:
    """Write a JSON file atomically. nan, which JSON does not have, is written as null.

    Args:
        content: nested dicts, lists, tuples, text and numbers.
        path: path of the file.

    Raises:
        OutputError: the file cannot be written, for example because the disk is full.
    """
    write_output(path, json.dumps(without_nan(content), allow_nan=False).encode())


def without_nan(content: Any) -> Any:
    """Replace nan, which JSON does not have.

    Args:
        content: nested dicts, lists, tuples, text and numbers.

    Returns:
        A copy in which each nan is None and each tuple is a list.
    """
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def _accumulators(kinds: Sequence[str], max_proposals: int) -> dict[str, RecallAccumulator]:
    return {kind: RecallAccumulator(max_proposals=max_proposals) for kind in kinds}


def summarize(coco: COCO, recalls: dict[str, RecallAccumulator]) -> "OrderedDict[str, dict[str, float]]":
    """Add the images that were not evaluated, without proposals, and compute the figures.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        recalls: accumulators by kind of region; the images that they lack are added to them.

    Returns:
        The figures by kind of region, each as in `RecallAccumulator.summarize`.

    Raises:
        UserError: an annotation of an added image lacks its area or its region.
    """
    metrics = OrderedDict()
    for kind, recall in recalls.items():
        nothing = np.empty((0, 4)) if kind == BOXES else []
        for image_id in coco.getImgIds():
            if image_id not in recall.images:
                recall.add(image_id, ground_truth(coco, image_id, kind), nothing, [])
        metrics[kind] = recall.summarize()
    return metrics
