"""One image with its objects and its proposals: the input of every analysis.

Shape letters:
    D: proposals (detections) of an image, sorted by descending score
    G: objects of an image, without crowds
"""

import os
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from ...data.coco import load_json
from ...errors import UserError
from ..coco_results import check_results
from ..ground_truth import BOXES, MASKS, ground_truth
from ..recall import AREA_RANGES, PROPOSAL_COUNTS, GroundTruth


class ImageObjects(NamedTuple):
    """The G objects of an image without its crowds."""

    # Masks, areas and crowd flags of the objects.
    truth: GroundTruth
    # (G, 4) float64, XYXY in pixels of the original image.
    boxes: np.ndarray


class ImageProposals(NamedTuple):
    """An image, its objects and its proposals."""

    image_id: Hashable
    objects: ImageObjects
    # D masks as compressed RLE in the frame of the original image, sorted by descending score.
    masks: list[dict]
    # (D, G) IoU of each proposal's mask with each object's mask.
    ious: np.ndarray
    # (D, 4) XYXY in pixels of the original image: the window of each mask. None if the windows are unknown.
    windows: Optional[np.ndarray] = None
    # G masks as compressed RLE, which a model decoded from the objects' true boxes. None without such a model.
    masks_given_boxes: Optional[list[dict]] = None
    # For each object three masks as compressed RLE, which a model made of one click, by descending score. None without such a model.
    masks_given_clicks: Optional[list[list[dict]]] = None


def image_objects(coco: COCO, image_id: Hashable) -> ImageObjects:
    """Read the objects of an image, without its crowds.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        image_id: identifier of the image in the annotations.

    Returns:
        The masks, areas and boxes of the objects.

    Raises:
        UserError: an annotation has no mask, no area or no box.
    """
    masks, boxes = (ground_truth(coco, image_id, kind) for kind in (MASKS, BOXES))
    chosen = np.flatnonzero(~masks.is_crowd)
    corners = boxes.regions[chosen]
    corners[:, 2:] += corners[:, :2]
    truth = GroundTruth([masks.regions[i] for i in chosen], masks.areas[chosen], masks.is_crowd[chosen])
    return ImageObjects(truth, corners)


def image_proposals(
    coco: COCO,
    image_id: Hashable,
    masks: list[dict],
    scores: Sequence[float],
    windows: Optional[np.ndarray] = None,
) -> ImageProposals:
    """Sort the proposals of an image by score, keep the 1000 best, and compute their IoUs with the objects.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        image_id: identifier of the image in the annotations.
        masks: masks of the proposals as compressed RLE in the frame of the original image, in any order.
        scores: one score per proposal, higher is better. Proposals of equal score keep their order.
        windows: (D, 4) XYXY in pixels of the original image, one window per proposal. Default: None, unknown.

    Returns:
        The image with at most 1000 proposals; `masks_given_boxes` is None.

    Raises:
        UserError: an annotation lacks a mask, an area or a box, or a mask has another size than the image.
    """
    objects = image_objects(coco, image_id)
    image = coco.imgs[image_id]
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")[: PROPOSAL_COUNTS[-1]]
    masks = [masks[i] for i in order]
    for mask in masks:
        # pycocotools returns an IoU of -1 for masks of different sizes and raises no error.
        if list(mask["size"]) != [image["height"], image["width"]]:
            raise UserError(
                f"image {image_id}: the mask of a proposal has the size (height, width) {tuple(mask['size'])}, but the annotations "
                f"give {(image['height'], image['width'])}"
            )
    ious = np.zeros((len(masks), len(objects.boxes)))
    if ious.size:
        ious = mask_utils.iou(masks, objects.truth.regions, [0] * len(objects.boxes))
    return ImageProposals(image_id, objects, masks, ious, None if windows is None else windows[order])


def images_of_results(coco: COCO, path: str) -> Iterator[ImageProposals]:
    """Read the proposals of all annotated images from a COCO result file; images without results have no proposals.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        path: path of a COCO result file (JSON) with segmentations.

    Yields:
        One `ImageProposals` per annotated image, without windows.

    Raises:
        UserError: the file is not a COCO result file, its results have no segmentation, or see `image_proposals`.
    """
    results = load_json(path)
    if not check_results(coco, results, os.fspath(path)):
        raise UserError(f"{os.fspath(path)}: its results have no segmentation, which the analyses need")
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    for image_id in coco.getImgIds():
        found = by_image[image_id]
        yield image_proposals(coco, image_id, [coco.annToRLE(r) for r in found], [r["score"] for r in found])


def in_area_ranges(areas: np.ndarray) -> np.ndarray:
    """Decide which areas lie in which of `AREA_RANGES`; both bounds belong to a range.

    Args:
        areas: (G,) in square pixels.

    Returns:
        (4, G) bool, one row per range.
    """
    bounds = np.array(list(AREA_RANGES.values()))
    return (areas >= bounds[:, :1]) & (areas <= bounds[:, 1:])
