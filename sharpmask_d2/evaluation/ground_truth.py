"""Reads the objects of an image from COCO annotations, as recall needs them."""

from collections.abc import Hashable

import numpy as np
from pycocotools.coco import COCO

from ..data.coco import image_size
from ..errors import UserError
from ..structures.coco_masks import MaskError, to_rle
from .recall import GroundTruth

# The kinds of regions, named as in COCOeval's `iouType`.
BOXES, MASKS = "bbox", "segm"


def ground_truth(coco: COCO, image_id: Hashable, kind: str) -> GroundTruth:
    """Read the objects of an image in COCOeval's order: by category, which decides between equal IoUs.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        image_id: identifier of the image in the annotations.
        kind: `BOXES` or `MASKS`, the regions to read.

    Returns:
        The objects, including crowds.

    Raises:
        UserError: the annotations do not contain the image, or an annotation lacks its area or the region of this kind.
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
        regions = encode_segmentations(coco, image_id, annotations, "annotation")
    return GroundTruth(
        regions,
        areas=np.array([annotation["area"] for annotation in annotations], dtype=np.float64),
        is_crowd=np.array([annotation.get("iscrowd") or 0 for annotation in annotations], dtype=bool),
    )


def encode_segmentations(coco: COCO, image_id: Hashable, entries: list[dict], name: str) -> list[dict]:
    """Encode the segmentations of annotations or results of one image as RLE.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed; they give the size of the image.
        image_id: identifier of the image in the annotations.
        entries: annotations or results that have a "segmentation": polygons, or compressed or uncompressed RLE.
        name: what error messages call an entry, such as "annotation".

    Returns:
        One compressed RLE per entry.

    Raises:
        UserError: a segmentation is broken, or polygons belong to an image without height and width.
    """
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
