"""An image, its objects and its proposals, from wherever they come: what all analyses of proposals read.

Shape letters:
    D: proposals (detections) of an image, best first
    G: objects of an image, crowds left out
"""

import os
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from ..data.coco import load_json
from ..errors import UserError
from .coco_results import check_results
from .proposal_evaluation import BOXES, MASKS, ground_truth
from .recall import AREA_RANGES, PROPOSAL_COUNTS, GroundTruth


class ImageObjects(NamedTuple):
    """The objects of an image: masks and areas (G) as `GroundTruth` has them, and boxes (G, 4), XYXY in pixels of the image."""

    truth: GroundTruth
    boxes: np.ndarray


class ProposedImage(NamedTuple):
    """An image, its objects and its proposals.

    objects: of the image. masks: D RLEs, best first. ious: (D, G) of the masks with those of the objects. windows: (D, 4) XYXY in
    pixels of the image, of the proposals' masks; None where they are not known. given_boxes: G RLEs, the masks that a model makes of the
    objects when it is given their boxes; None where it was not asked.
    """

    image_id: Hashable
    objects: ImageObjects
    masks: list
    ious: np.ndarray
    windows: Optional[np.ndarray] = None
    given_boxes: Optional[list] = None


def image_objects(coco: COCO, image_id: Hashable) -> ImageObjects:
    """The objects of an image, crowds left out.

    Raises:
        ValueError: an annotation has no mask, no area or no box.
    """
    masks, boxes = (ground_truth(coco, image_id, kind) for kind in (MASKS, BOXES))
    chosen = np.flatnonzero(~masks.is_crowd)
    corners = boxes.regions[chosen]
    corners[:, 2:] += corners[:, :2]
    truth = GroundTruth([masks.regions[i] for i in chosen], masks.areas[chosen], masks.is_crowd[chosen])
    return ImageObjects(truth, corners)


def proposed_image(
    coco: COCO, image_id: Hashable, masks: list, scores: Sequence[float], windows: Optional[np.ndarray] = None
) -> ProposedImage:
    """What the analyses read of an image.

    Args:
        coco: annotations.
        image_id: as there.
        masks: RLEs of the proposals in the frame of the image, in any order.
        scores: of the proposals; of equal scores the first goes first.
        windows: (D, 4) XYXY of the proposals in pixels of the image, if they are known.

    Returns:
        ProposedImage of the 1000 best proposals.

    Raises:
        ValueError: see `image_objects`; or a mask is not of the image's size.
    """
    objects = image_objects(coco, image_id)
    image = coco.imgs[image_id]
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")[: PROPOSAL_COUNTS[-1]]
    masks = [masks[i] for i in order]
    for mask in masks:
        # pycocotools gives masks of different frames an IoU of -1 instead of an error.
        if list(mask["size"]) != [image["height"], image["width"]]:
            raise UserError(
                f"image {image_id}: a proposal's mask has the size (height, width) {tuple(mask['size'])}, the annotations say "
                f"{(image['height'], image['width'])}"
            )
    ious = np.zeros((len(masks), len(objects.boxes)))
    if ious.size:
        ious = mask_utils.iou(masks, objects.truth.regions, [0] * len(objects.boxes))
    return ProposedImage(image_id, objects, masks, ious, None if windows is None else windows[order])


def images_of_results(coco: COCO, path: str) -> Iterator[ProposedImage]:
    """All annotated images with the proposals that a COCO result file has of them, which may be none.

    Args:
        coco: annotations.
        path: of a COCO result file with segmentations.

    Raises:
        ValueError: the file is not of its format, it has no segmentations, or see `proposed_image`.
    """
    results = load_json(path)
    if not check_results(coco, results, os.fspath(path)):
        raise UserError(f"{os.fspath(path)}: its results have no segmentation, and it is masks that are analysed")
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    for image_id in coco.getImgIds():
        found = by_image[image_id]
        yield proposed_image(coco, image_id, [coco.annToRLE(r) for r in found], [r["score"] for r in found])


def in_area_ranges(areas: np.ndarray) -> np.ndarray:
    """Which areas belong to which of AREA_RANGES, both ends included: (G,) to (4, G) bool."""
    bounds = np.array(list(AREA_RANGES.values()))
    return (areas >= bounds[:, :1]) & (areas <= bounds[:, 1:])
