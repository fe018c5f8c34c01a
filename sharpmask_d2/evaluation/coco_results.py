"""Checks COCO results from files before they are evaluated.

Shape letters:
    D: results of an image
"""

import logging
import reprlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
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


class ResultChecks:
    """Checks COCO results one by one and image by image, so that they do not have to be in memory together.

    checks = ResultChecks(coco, "proposals.json")
    for i, result in enumerate(results):
        checks.check_entry(i, result)
    checks.check_images()
    for image_id in checks.counts:
        checks.check_image(image_id, results_of_image, their_indices)
    checks.log_warnings()
    """

    def __init__(self, coco: COCO, source: str) -> None:
        """
        Args:
            coco: annotations that `data.coco.check_annotations` has passed.
            source: what messages call the results, such as the path of the file.
        """
        self.source = source
        # Whether the results have segmentations; the first result decides.
        self.has_masks = False
        # Number of results of each image, in the order of the file.
        self.counts: dict[Hashable, int] = {}
        self._coco = coco
        self._num_results = 0
        self._warnings = _Warnings(source)

    def check_entry(self, i: int, result: Any) -> None:
        """Check which fields a result has.

        Args:
            i: its index; results are checked in their order.
            result: an entry of the file.

        Raises:
            UserError: it is not a dict, a field is missing, or it has a segmentation and the first result has none, or vice versa.
        """
        if not isinstance(result, dict):
            raise UserError(f"{self.source} is not a COCO result file: a list of dicts is expected")
        if not i:
            self.has_masks = "segmentation" in result
        missing = [key for key in ("image_id", "score") if key not in result]
        if not missing and "bbox" not in result and "segmentation" not in result:
            missing = ["bbox or segmentation"]
        if missing:
            raise UserError(f"{self.source}: result {i} has no {missing[0]}")
        if ("segmentation" in result) != self.has_masks:
            raise UserError(f"{self.source}: only some results have a segmentation; result {i} differs from the first")
        image_id = result["image_id"]
        if not isinstance(image_id, (int, str, float)):
            raise UserError(
                f"{self.source}: result {i} has the image_id {reprlib.repr(image_id)}, which is neither a number nor text"
            )
        self.counts[image_id] = self.counts.get(image_id, 0) + 1
        self._num_results += 1

    def check_images(self) -> None:
        """Check, after all entries, that the annotations list images of the results.

        Raises:
            UserError: they list none of them.
        """
        unknown = [(image_id, count) for image_id, count in self.counts.items() if image_id not in self._coco.imgs]
        if unknown and len(unknown) == len(self.counts):
            raise UserError(
                f"{self.source}: none of its {len(unknown)} images is in the annotations, for example image {unknown[0][0]!r} of "
                "result 0: are these the results of another dataset?"
            )
        self._warnings.unknown_images = unknown

    def check_image(self, image_id: Hashable, results: list[dict], numbers: list[int]) -> None:
        """Check scores, boxes and masks of the results of one image.

        Args:
            image_id: an image that the annotations list.
            results: all results of the image.
            numbers: their indices among all results.

        Raises:
            UserError: a score, a box or a mask is not valid; the message names the first such result.
        """
        _check_image(results, numbers, image_size(self._coco, image_id), self.source, self._warnings)

    def log_warnings(self) -> None:
        """Log, after all images, what looks wrong but can be evaluated, with counts."""
        missing = [image_id for image_id in self._coco.getImgIds() if image_id not in self.counts]
        num_missed = sum(len(self._coco.imgToAnns[image_id]) for image_id in missing)
        self._warnings.log(self._num_results, len(self._coco.imgs), missing, num_missed)


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
    checks = ResultChecks(coco, source)
    by_image = defaultdict(list)
    for i, result in enumerate(results):
        checks.check_entry(i, result)
        by_image[result["image_id"]].append(i)
    checks.check_images()
    for image_id, numbers in by_image.items():
        if image_id in coco.imgs:
            checks.check_image(image_id, [results[i] for i in numbers], numbers)
    checks.log_warnings()
    return checks.has_masks


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
