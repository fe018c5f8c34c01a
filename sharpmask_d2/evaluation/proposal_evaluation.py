"""Recall of segment proposals on a COCO-format data set: from a network as it runs, or from a COCO result JSON.

Shape letters:
    D: proposals (detections) of an image
"""

import contextlib
import json
import logging
import math
import os
import reprlib
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

from ..data.coco import check_annotations, load_annotations, load_json
from ..outputs import write_output
from ..structures.coco_masks import MaskError, check_masks, to_rle
from .recall import AREA_RANGES, IOU_THRESHOLDS, PROPOSAL_COUNTS, GroundTruth, RecallAccumulator

# One flat dict of figures per IoU type: {"segm": {"AR@10": ...}, "bbox": {...}}.
Metrics = dict[str, dict[str, float]]

BOXES, MASKS = "bbox", "segm"

# A box does not fit its mask if its IoU with the mask's tight box is below this, and a number of it is off by more pixels than this.
_LOWEST_IOU, _SMALLEST_SHIFT = 0.5, 2.0


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
            raise ValueError(f"data set {dataset_name} has no json_file in its metadata: register it in COCO format")
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
            raise ValueError(
                f"image {without_masks[0]}: its proposals have no proposal_masks, those of other images do"
            )
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
        masks = [_rle(coco, result, "a result") for result in results] if has_masks else []
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
        raise ValueError(f"image {image_id} is not in the annotations")
    annotations = sorted(coco.imgToAnns[image_id], key=lambda annotation: annotation.get("category_id") or 0)
    for annotation in annotations:
        needed = {BOXES: "bbox", MASKS: "segmentation"}[kind]
        for key in (needed, "area"):
            if key not in annotation or annotation[key] in ([], None):
                raise ValueError(f"annotation {annotation.get('id')} of image {image_id} has no {key}")
    if kind == BOXES:
        regions = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    else:
        regions = [_rle(coco, annotation, f"annotation {annotation.get('id')}") for annotation in annotations]
    return GroundTruth(
        regions,
        areas=np.array([annotation["area"] for annotation in annotations], dtype=np.float64),
        is_crowd=np.array([annotation.get("iscrowd") or 0 for annotation in annotations], dtype=bool),
    )


def _rle(coco: COCO, entry: dict, name: str) -> dict:
    """The mask of an annotation or a result, which messages call `name`; both have been checked."""
    size = _image_size(coco, entry["image_id"])
    if size is None and isinstance(entry["segmentation"], list):
        raise ValueError(f"image {entry['image_id']} has no height and width in the annotations, which polygons need")
    try:
        return to_rle(entry["segmentation"], size)
    except MaskError as error:
        raise ValueError(f"{name} of image {entry['image_id']}: its segmentation {error}") from None


def _image_size(coco: COCO, image_id: Hashable) -> Optional[tuple]:
    """(height, width), or None if the annotations do not have it."""
    image = coco.imgs[image_id]
    return (image["height"], image["width"]) if image.get("height") and image.get("width") else None


def check_results(coco: COCO, results: Sequence[dict], source: str) -> bool:
    """Check COCO results before anything is made of them; what is no error but strange is logged as a warning, with counts.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        results: as a COCO result file has them.
        source: what messages call them.

    Returns:
        whether they have masks.

    Raises:
        ValueError: the first result that is incomplete or broken, or none is of an image of the annotations.
    """
    if not isinstance(results, (list, tuple)) or not all(isinstance(result, dict) for result in results):
        raise ValueError(f"{source} is not a COCO result file: a list of dicts is expected")
    has_masks = bool(results) and "segmentation" in results[0]
    by_image = defaultdict(list)
    for i, result in enumerate(results):
        missing = [key for key in ("image_id", "score") if key not in result]
        if not missing and "bbox" not in result and "segmentation" not in result:
            missing = ["bbox or segmentation"]
        if missing:
            raise ValueError(f"{source}: result {i} has no {missing[0]}")
        if ("segmentation" in result) != has_masks:
            raise ValueError(f"{source}: only some results have a segmentation; result {i} differs from the first")
        if not isinstance(result["image_id"], (int, str, float)):
            raise ValueError(
                f"{source}: result {i} has the image_id {reprlib.repr(result['image_id'])}, not a number or text"
            )
        by_image[result["image_id"]].append(i)
    doubts = _Doubts(source)
    for image_id, numbers in by_image.items():
        if image_id in coco.imgs:
            of_image = [results[i] for i in numbers]
            _check_image(of_image, numbers, _image_size(coco, image_id), source, doubts)
        else:
            doubts.unknown_images.append((image_id, len(numbers)))
    if results and len(doubts.unknown_images) == len(by_image):
        raise ValueError(
            f"{source}: none of its {len(by_image)} images is in the annotations, image {doubts.unknown_images[0][0]!r} of result 0 is "
            "not: are they the results of another data set?"
        )
    missing = [image_id for image_id in coco.getImgIds() if image_id not in by_image]
    doubts.log(len(results), len(coco.imgs), missing, sum(len(coco.imgToAnns[image_id]) for image_id in missing))
    return has_masks


class _Doubts:
    """What is strange about results, collected image by image."""

    def __init__(self, source: str):
        self.source = source
        self.unknown_images = []  # image id and number of results
        self.off_mask, self.outside = [], []  # numbers of results

    def log(self, num_results: int, num_images: int, without_results: list, num_missed: int) -> None:
        warn = logging.getLogger(__name__).warning
        other_form = "are they x0, y0, x1, y1 instead of x, y, width, height?"
        if self.unknown_images:
            count = sum(count for _, count in self.unknown_images)
            warn(
                f"{self.source}: {count} of {num_results} results are left out: they are of {len(self.unknown_images)} images that the "
                f"annotations do not have, such as {self.unknown_images[0][0]!r}"
            )
        if without_results:
            warn(
                f"{self.source}: {len(without_results)} of the {num_images} images of the annotations have no results, such as "
                f"{without_results[0]!r}; their {num_missed} objects count as missed"
            )
        for numbers, what in (
            (self.off_mask, "do not fit their masks"),
            (self.outside, "reach beyond their images"),
        ):
            if numbers:
                warn(
                    f"{self.source}: {len(numbers)} of {num_results} boxes {what}, such as that of result {numbers[0]}: {other_form}"
                )


def _check_image(results: list, numbers: list, size: Optional[tuple], source: str, doubts: _Doubts) -> None:
    """Check the results of an image of (height, width) `size`, whose numbers among all results are given."""

    def broken(i: int, what: str) -> ValueError:
        return ValueError(f"{source}: result {numbers[i]}, of image {results[i]['image_id']}, {what}")

    with_box = [i for i, result in enumerate(results) if "bbox" in result]
    boxes = None
    for key, chosen, convert, expected in (
        ("score", range(len(results)), _scores, "a finite number"),
        ("bbox", with_box, _boxes, "four finite numbers, x, y, width and height, the last two not negative"),
    ):
        values = [results[i][key] for i in chosen]
        boxes = convert(values)
        if boxes is None:
            i = next(i for i in chosen if convert([results[i][key]]) is None)
            raise broken(i, f"has the {key} {reprlib.repr(results[i][key])}, not {expected}")
    masks = [result["segmentation"] for result in results if "segmentation" in result]
    try:
        check_masks(masks, [size] * len(masks))
    except MaskError as error:
        raise broken(error.index, f"has a segmentation that {error}") from None
    numbers = np.asarray(numbers)[with_box]
    if size is not None and len(numbers):
        beyond = np.concatenate([-boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - size[::-1]], axis=1)
        doubts.outside += numbers[beyond.max(axis=1) > _SMALLEST_SHIFT].tolist()
    if masks and len(numbers):
        # Those of polygons are left to what makes RLE of them.
        rles = [masks[i] for i in with_box]
        if all(isinstance(rle, dict) and not isinstance(rle["counts"], list) for rle in rles):
            doubts.off_mask += numbers[_differ(boxes, mask_utils.toBbox(rles))].tolist()


def _scores(values: list) -> Optional[np.ndarray]:
    """(N,) float64, or None if not all of them are finite numbers."""
    try:
        scores = np.array(values)
    except (ValueError, OverflowError):
        return None
    if values and (scores.ndim != 1 or scores.dtype.kind not in "iuf" or not np.isfinite(scores).all()):
        return None
    return scores.astype(np.float64)


def _boxes(values: list) -> Optional[np.ndarray]:
    """(N, 4) float64, or None if not all of them are boxes."""
    try:
        boxes = np.array(values)
    except (ValueError, OverflowError):
        return None
    if not values:
        return np.empty((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "iuf" or not np.isfinite(boxes).all():
        return None
    return None if (boxes[:, 2:] < 0).any() else boxes.astype(np.float64)


def _differ(boxes: np.ndarray, tight: np.ndarray) -> np.ndarray:
    """Which boxes, (D, 4) XYWH, are not near the tight ones of their masks, that have pixels: (D,) bool."""
    low = np.maximum(boxes[:, :2], tight[:, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], tight[:, :2] + tight[:, 2:])
    both = (high - low).clip(min=0).prod(axis=1)
    either = boxes[:, 2:].prod(axis=1) + tight[:, 2:].prod(axis=1) - both
    far = (both < _LOWEST_IOU * either) & (np.abs(boxes - tight).max(axis=1) > _SMALLEST_SHIFT)
    return far & (tight[:, 2] > 0)
