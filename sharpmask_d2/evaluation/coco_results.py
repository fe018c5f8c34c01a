"""Checks COCO results from files before they are evaluated.

Shape letters:
    D: results of an image
"""

import logging
import reprlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from ..data.coco import image_size
from ..errors import UserError
from ..structures.coco_masks import MaskError, check_masks

# A box does not fit its mask if its IoU with the mask's tight box is below `_MIN_IOU` and a coordinate differs by more than `_MIN_SHIFT`
# pixels.
_MIN_IOU, _MIN_SHIFT = 0.5, 2.0
# Maximum number of boxes per image that are compared with their masks; a file in another box format fails for any of them.
_MAX_COMPARED = 100


def check_results(coco: COCO, results: Sequence[dict], source: str) -> bool:
    """Check COCO results before they are evaluated. What looks wrong but can be evaluated is logged as a warning, with counts.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        results: the list of a COCO result file.
        source: what messages call the results, such as the path of the file.

    Returns:
        Whether the results have segmentations.

    Raises:
        UserError: a result is incomplete or broken, only some results have a segmentation, or none of the images of the results is in the
            annotations. The message names the first such result.
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
                f"{source}: result {i} has the image_id {reprlib.repr(result['image_id'])}, which is neither a number nor text"
            )
        by_image[result["image_id"]].append(i)
    warnings = _Warnings(source)
    for image_id, numbers in by_image.items():
        if image_id in coco.imgs:
            of_image = [results[i] for i in numbers]
            _check_image(of_image, numbers, image_size(coco, image_id), source, warnings)
        else:
            warnings.unknown_images.append((image_id, len(numbers)))
    if results and len(warnings.unknown_images) == len(by_image):
        raise UserError(
            f"{source}: none of its {len(by_image)} images is in the annotations, for example image {warnings.unknown_images[0][0]!r} of "
            "result 0: are these the results of another dataset?"
        )
    missing = [image_id for image_id in coco.getImgIds() if image_id not in by_image]
    warnings.log(len(results), len(coco.imgs), missing, sum(len(coco.imgToAnns[image_id]) for image_id in missing))
    return has_masks


class _Warnings:
    """Collects what looks wrong about results and logs it once, with counts."""

    def __init__(self, source: str):
        self.source = source
        self.unknown_images = []  # pairs of image id and number of results
        self.off_mask, self.outside = [], []  # indices of results
        self.compared = 0  # number of results whose box was compared with their mask

    def log(self, num_results: int, num_images: int, without_results: list[Any], num_missed: int) -> None:
        """Log one warning per kind of doubt.

        Args:
            num_results: number of all results.
            num_images: number of images in the annotations.
            without_results: ids of the annotated images that have no results.
            num_missed: number of objects in these images.
        """
        warn = logging.getLogger(__name__).warning
        other_form = "are they in the form x0, y0, x1, y1 instead of x, y, width, height?"
        if self.unknown_images:
            count = sum(count for _, count in self.unknown_images)
            warn(
                f"{self.source}: {count} of {num_results} results are ignored: their {len(self.unknown_images)} images are not in the "
                f"annotations, for example image {self.unknown_images[0][0]!r}"
            )
        if without_results:
            warn(
                f"{self.source}: {len(without_results)} of the {num_images} images of the annotations have no results, for example image "
                f"{without_results[0]!r}; their {num_missed} objects count as missed"
            )
        for numbers, of, what in (
            (self.off_mask, self.compared, "do not fit their masks"),
            (self.outside, num_results, "extend beyond their images"),
        ):
            if numbers:
                warn(
                    f"{self.source}: {len(numbers)} of {of} boxes {what}, for example the box of result {numbers[0]}: {other_form}"
                )


def _check_image(
    results: list[dict], numbers: list[int], size: Optional[tuple[int, int]], source: str, warnings: _Warnings
) -> None:
    """Check the results of one image; `numbers` are their indices among all results, `size` is (height, width)."""

    def broken(i: int, what: str) -> UserError:
        return UserError(f"{source}: result {numbers[i]}, of image {results[i]['image_id']}, {what}")

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
        warnings.outside += numbers[beyond.max(axis=1) > _MIN_SHIFT].tolist()
    if masks and len(numbers):
        rles = [masks[i] for i in with_box[:_MAX_COMPARED]]
        # The tight boxes of polygons would need a conversion to RLE.
        if all(isinstance(rle, dict) and not isinstance(rle["counts"], list) for rle in rles):
            warnings.compared += len(rles)
            differ = _differ(boxes[:_MAX_COMPARED], mask_utils.toBbox(rles))
            warnings.off_mask += numbers[:_MAX_COMPARED][differ].tolist()


def _scores(values: list[Any]) -> Optional[np.ndarray]:
    """Convert scores to (D,) float64; None if any of them is not a finite number."""
    try:
        scores = np.array(values)
    except (ValueError, OverflowError):
        return None
    if values and (scores.ndim != 1 or scores.dtype.kind not in "iuf" or not np.isfinite(scores).all()):
        return None
    return scores.astype(np.float64)


def _boxes(values: list[Any]) -> Optional[np.ndarray]:
    """Convert boxes to (D, 4) float64; None if any of them is not a box."""
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
    """Decide which boxes, (D, 4) XYWH, differ from the tight boxes of their masks, without empty masks: (D,) bool."""
    low = np.maximum(boxes[:, :2], tight[:, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], tight[:, :2] + tight[:, 2:])
    both = (high - low).clip(min=0).prod(axis=1)
    either = boxes[:, 2:].prod(axis=1) + tight[:, 2:].prod(axis=1) - both
    far = (both < _MIN_IOU * either) & (np.abs(boxes - tight).max(axis=1) > _MIN_SHIFT)
    return far & (tight[:, 2] > 0)
