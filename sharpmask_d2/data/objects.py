"""Reads the objects of an image as training targets, and renders their masks into windows.

Shape letters: G objects, C crowds, H W image, M side of the rendered mask.
"""

from typing import Any, NamedTuple, Optional, Union

import cv2
import numpy as np
from pycocotools import mask as mask_util

from ..errors import UserError
from ..structures.coco_masks import MaskError, check_masks, to_rle, whole_polygons

# Polygons (x0, y0, x1, y1, ... in pixels), an RLE or an (H, W) bitmap.
Segmentation = Union[list[list[float]], dict, np.ndarray]


class ImageObjects(NamedTuple):
    """The objects of an image, and its crowds: regions full of objects that are not listed one by one."""

    boxes: np.ndarray  # (G, 4) float32 XYXY in pixels of the image
    segmentations: list[Segmentation]  # G masks
    categories: np.ndarray  # (G,) int64, category_id
    targets: np.ndarray  # (G,) bool, large enough to be a training target
    crowd_boxes: np.ndarray  # (C, 4) float32 XYXY in pixels of the image


def read_objects(dataset_dict: dict[str, Any], *, min_area: float, min_side: float) -> ImageObjects:
    """The objects of an image in Detectron2's dataset format.

    Args:
        dataset_dict: with "annotations", each with bbox, bbox_mode, segmentation (polygons or RLE), iscrowd and category_id.
        min_area: minimum area of the mask of a training target, in square pixels.
        min_side: minimum length of the shorter side of its box, in pixels.

    Raises:
        UserError: an object has no mask, an invalid one, or only degenerate polygons; the message names the image and the annotation.
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


def large_enough(
    boxes: np.ndarray, segmentations: list[Segmentation], *, min_area: float, min_side: float
) -> np.ndarray:
    """Which objects are large enough to be training targets.

    Args:
        boxes: (G, 4) XYXY in pixels.
        segmentations: G masks.
        min_area: minimum area of the mask in square pixels.
        min_side: minimum length of the shorter side of the box in pixels.

    Returns:
        (G,) bool.
    """
    areas = np.array([_mask_area(segmentation) for segmentation in segmentations])
    return ((boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= min_side) & (areas >= min_area)


def _mask_area(segmentation: Segmentation) -> float:
    if isinstance(segmentation, dict):
        return float(mask_util.area(segmentation))
    if not isinstance(segmentation, list):
        return float(np.count_nonzero(segmentation))
    corners = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T for polygon in segmentation]
    return sum(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 for x, y in corners)


def _checked_masks(
    segmentations: list[Optional[Segmentation]], numbers: list[int], dataset_dict: dict[str, Any]
) -> list[Segmentation]:
    """The masks of an image for `render_mask`; `numbers` are those of their annotations."""

    def where(index: int) -> str:
        return f"annotation {numbers[index]} of image {dataset_dict.get('image_id')} ({dataset_dict.get('file_name')})"

    for index, segmentation in enumerate(segmentations):
        if not segmentation and not isinstance(segmentation, list):
            raise UserError(
                f"{where(index)} has no segmentation: SharpMask is trained on masks, so remove boxes without masks"
            )
    size = (dataset_dict["height"], dataset_dict["width"]) if {"height", "width"} <= dataset_dict.keys() else None
    try:
        check_masks(segmentations, [size] * len(segmentations))
    except MaskError as error:
        raise UserError(f"{where(error.index)} has a segmentation that {error}: correct or remove it") from None
    masks = []
    for index, segmentation in enumerate(segmentations):
        mask = whole_polygons(segmentation) if isinstance(segmentation, list) else to_rle(segmentation, size)
        if not mask:
            raise UserError(f"{where(index)} has no polygon with three points or more: remove it or give it a mask")
        masks.append(mask)
    return masks


def render_mask(segmentation: Segmentation, region: tuple[float, float, float], size: int) -> np.ndarray:
    """The mask of an object inside a square region of the image.

    Args:
        segmentation: of the object.
        region: (x0, y0, side) in pixels of the image; it may lie partly outside.
        size: M in pixels.

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
    # The matrix maps pixel centres of the rendered mask to pixel centres of the bitmap.
    step = side / size
    matrix = np.array([[step, 0, x0 + step / 2 - 0.5], [0, step, y0 + step / 2 - 0.5]])
    soft = cv2.warpAffine(
        bitmap.astype(np.float32), matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderValue=0
    )
    return (soft >= 0.5).astype(np.uint8)


def cut_region(image: np.ndarray, region: tuple[int, int, int], size: int, fill: float) -> np.ndarray:
    """A square region of an image, resized.

    Args:
        image: (H, W, 3) uint8.
        region: (x0, y0, side) in whole pixels of the image; it may lie partly or wholly outside.
        size: side of the result in pixels.
        fill: value of all channels outside the image, 0..255.

    Returns:
        (size, size, 3) uint8.
    """
    x0, y0, side = region
    inside = image[max(y0, 0) : max(y0 + side, 0), max(x0, 0) : max(x0 + side, 0)]
    if inside.shape[:2] != (side, side):
        if inside.size == 0:
            # Rounded as copyMakeBorder rounds it.
            return np.full((size, size, 3), round(fill), dtype=np.uint8)
        top, left = max(-y0, 0), max(-x0, 0)
        bottom, right = side - top - inside.shape[0], side - left - inside.shape[1]
        inside = cv2.copyMakeBorder(inside, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(fill, fill, fill))
    return cv2.resize(inside, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
