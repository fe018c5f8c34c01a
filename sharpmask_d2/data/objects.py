"""The objects of an image as training targets, and their masks rendered into windows.

Shape letters: G objects, H W image, M side of the rendered mask.
"""

from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as mask_util

from ..errors import UserError
from ..structures.coco_masks import MaskError, check_masks, to_rle, whole_polygons


class ImageObjects(NamedTuple):
    """Objects of an image, crowds left out.

    boxes (G, 4) float32 XYXY in pixels; segmentations: G entries, each a list of polygons (x0, y0, x1, y1, ...), an RLE or an (H, W)
    bitmap; categories (G,) int64; targets (G,) bool: large enough to learn from; crowd_boxes (*, 4): regions full of unlisted objects.
    """

    boxes: np.ndarray
    segmentations: list
    categories: np.ndarray
    targets: np.ndarray
    crowd_boxes: np.ndarray


def read_objects(dataset_dict: dict, *, min_area: float, min_side: float) -> ImageObjects:
    """Objects of an image in Detectron2's dataset format.

    Args:
        dataset_dict: has "annotations" with bbox, bbox_mode, segmentation (polygons or RLE), iscrowd, category_id.
        min_area: smallest mask area, in square pixels, of an object that is a target.
        min_side: smallest side of its box.

    Raises:
        ValueError: an object without a mask, with a broken one or with nothing but degenerate polygons; the message names the image.
    """
    from detectron2.structures import BoxMode

    boxes, segmentations, numbers, categories, crowd_boxes = [], [], [], [], []
    for number, annotation in enumerate(dataset_dict.get("annotations", ())):
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        if annotation.get("iscrowd", 0):
            crowd_boxes.append(box)
            continue
        boxes.append(box)
        segmentations.append(annotation.get("segmentation"))
        numbers.append(number)
        categories.append(annotation["category_id"])
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    segmentations = _checked_masks(segmentations, numbers, dataset_dict)
    return ImageObjects(
        boxes=boxes,
        segmentations=segmentations,
        categories=np.asarray(categories, dtype=np.int64),
        targets=large_enough(boxes, segmentations, min_area=min_area, min_side=min_side),
        crowd_boxes=np.asarray(crowd_boxes, dtype=np.float32).reshape(-1, 4),
    )


def large_enough(boxes: np.ndarray, segmentations: list, *, min_area: float, min_side: float) -> np.ndarray:
    """Which objects, given by boxes (G, 4) XYXY and G segmentations, are large enough for a target: (G,) bool."""
    areas = np.array([_mask_area(segmentation) for segmentation in segmentations])
    return ((boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= min_side) & (areas >= min_area)


def _mask_area(segmentation) -> float:
    if isinstance(segmentation, dict):
        return float(mask_util.area(segmentation))
    if not isinstance(segmentation, list):
        return float(np.count_nonzero(segmentation))
    corners = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T for polygon in segmentation]
    return sum(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 for x, y in corners)


def _checked_masks(segmentations: list, numbers: list, dataset_dict: dict) -> list:
    """Segmentations of an image as `render_mask` takes them; `numbers` are those of their annotations."""

    def where(index: int) -> str:
        return f"annotation {numbers[index]} of image {dataset_dict.get('image_id')} ({dataset_dict.get('file_name')})"

    for index, segmentation in enumerate(segmentations):
        if not segmentation and not isinstance(segmentation, list):
            raise UserError(
                f"{where(index)} has no segmentation: SharpMask is trained on masks, leave boxes without masks out"
            )
    size = (dataset_dict["height"], dataset_dict["width"]) if {"height", "width"} <= dataset_dict.keys() else None
    try:
        check_masks(segmentations, [size] * len(segmentations))
    except MaskError as error:
        raise UserError(f"{where(error.index)} has a segmentation that {error}: mend or remove it") from None
    masks = []
    for index, segmentation in enumerate(segmentations):
        mask = whole_polygons(segmentation) if isinstance(segmentation, list) else to_rle(segmentation, size)
        if not mask:
            raise UserError(f"{where(index)} has no polygon with three points or more: remove it or give it a mask")
        masks.append(mask)
    return masks


def render_mask(segmentation, region: tuple, size: int) -> np.ndarray:
    """An object's mask inside a square region of the image.

    Args:
        segmentation: polygons, an RLE or an (H, W) bitmap.
        region: (x0, y0, side) in pixels of the image; may lie partly outside.
        size: M.

    Returns:
        (M, M) uint8 in {0, 1}.
    """
    x0, y0, side = region
    if isinstance(segmentation, list):
        scale = size / side
        offset = np.array([x0, y0])
        polygons = [((np.reshape(p, (-1, 2)) - offset) * scale).ravel() for p in segmentation]
        return mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, size, size)))
    bitmap = mask_util.decode(segmentation) if isinstance(segmentation, dict) else np.asarray(segmentation)
    # The matrix takes pixel centres of the rendered mask to pixel centres of the bitmap.
    step = side / size
    matrix = np.array([[step, 0, x0 + step / 2 - 0.5], [0, step, y0 + step / 2 - 0.5]])
    soft = cv2.warpAffine(
        bitmap.astype(np.float32), matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderValue=0
    )
    return (soft >= 0.5).astype(np.uint8)


def cut_region(image: np.ndarray, region: tuple, size: int, fill: float) -> np.ndarray:
    """A square region of an image, resized.

    Args:
        image: (H, W, 3) uint8.
        region: (x0, y0, side) whole pixels; may lie partly or wholly outside.
        size: side of the result.
        fill: value outside the image.

    Returns:
        (size, size, 3) uint8.
    """
    x0, y0, side = region
    inside = image[max(y0, 0) : max(y0 + side, 0), max(x0, 0) : max(x0 + side, 0)]
    if inside.shape[:2] != (side, side):
        if inside.size == 0:
            # Rounded, as copyMakeBorder does below.
            return np.full((size, size, 3), round(fill), dtype=np.uint8)
        top, left = max(-y0, 0), max(-x0, 0)
        bottom, right = side - top - inside.shape[0], side - left - inside.shape[1]
        inside = cv2.copyMakeBorder(inside, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(fill, fill, fill))
    return cv2.resize(inside, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
