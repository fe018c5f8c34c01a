"""COCO results from outside, checked before anything is made of them.

Shape letters:
    D: results of an image
"""

import logging
import reprlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Optional

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from ..data.coco import image_size
from ..errors import UserError
from ..structures.coco_masks import MaskError, check_masks

# A box does not fit its mask if its IoU with the mask's tight box is below this, and a number of it is off by more pixels than this.
_LOWEST_IOU, _SMALLEST_SHIFT = 0.5, 2.0
# So many boxes of an image are compared with their masks: a file in another form is found by any of them.
_COMPARED = 100


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
        raise UserError(f"{source} is not a COCO result file: a list of dicts is expected")
    has_masks = bool(results) and "segmentation" in results[0]
    by_image = defaultdict(list)
    for i, result in enumerate(results):
        missing = [key for key in ("image_id", "score") if key not in result]
        if not missing and "bbox" not in result and "segmentation" not in result:
            missing = ["bbox or segmentation"]
        if missing:
            raise UserError(f"{source}: result {i} has no {missing[0]}")
        if ("segmentation" in result) != has_masks:
            raise UserError(f"{source}: only some results have a segmentation; result {i} differs from the first")
        if not isinstance(result["image_id"], (int, str, float)):
            raise UserError(
                f"{source}: result {i} has the image_id {reprlib.repr(result['image_id'])}, not a number or text"
            )
        by_image[result["image_id"]].append(i)
    doubts = _Doubts(source)
    for image_id, numbers in by_image.items():
        if image_id in coco.imgs:
            of_image = [results[i] for i in numbers]
            _check_image(of_image, numbers, image_size(coco, image_id), source, doubts)
        else:
            doubts.unknown_images.append((image_id, len(numbers)))
    if results and len(doubts.unknown_images) == len(by_image):
        raise UserError(
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
        self.compared = 0  # results whose box was compared with their mask

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
        for numbers, of, what in (
            (self.off_mask, self.compared, "do not fit their masks"),
            (self.outside, num_results, "reach beyond their images"),
        ):
            if numbers:
                warn(
                    f"{self.source}: {len(numbers)} of {of} boxes {what}, such as that of result {numbers[0]}: {other_form}"
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
        rles = [masks[i] for i in with_box[:_COMPARED]]
        # Those of polygons are left to what makes RLE of them.
        if all(isinstance(rle, dict) and not isinstance(rle["counts"], list) for rle in rles):
            doubts.compared += len(rles)
            doubts.off_mask += numbers[:_COMPARED][_differ(boxes[:_COMPARED], mask_utils.toBbox(rles))].tolist()


def _scores(values: list) -> Optional[np.ndarray]:
    """(D,) float64, or None if not all of them are finite numbers."""
    try:
        scores = np.array(values)
    except (ValueError, OverflowError):
        return None
    if values and (scores.ndim != 1 or scores.dtype.kind not in "iuf" or not np.isfinite(scores).all()):
        return None
    return scores.astype(np.float64)


def _boxes(values: list) -> Optional[np.ndarray]:
    """(D, 4) float64, or None if not all of them are boxes."""
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
