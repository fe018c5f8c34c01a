"""Pictures of the images on which proposals are best and worst.

Shape letters:
    D: proposals of an image
    G: objects of an image, without crowds
"""

from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from ..data.failed_images import FailedImages
from ..data.images import read_image
from ..structures.coco_masks import to_rle
from .overlay import draw_masks
from .pictures import write_picture


class ImageOverlap(NamedTuple):
    """How well the proposals of an image cover its objects."""

    image_id: Hashable
    # Mean over the objects of the highest IoU with any proposal, from 0 to 1.
    overlap: float
    # G masks of the objects as compressed RLE.
    objects: list[dict]
    # G masks of the proposals with the highest IoU as compressed RLE; None if no proposal overlaps the object.
    found: list[Optional[dict]]


def rank_images(coco: COCO, results: list[dict], *, num_proposals: int = 100) -> list[ImageOverlap]:
    """Sort images by the mean over their objects of the highest mask IoU with a proposal (mean best overlap).

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        results: COCO results with segmentations that `evaluation.coco_results.check_results` has passed.
        num_proposals: maximum number of proposals per image; the best ones are used. Default: 100.

    Returns:
        The images that have objects, best first.
    """
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    ranked = []
    for image_id in coco.getImgIds():
        size = coco.imgs[image_id].get("height"), coco.imgs[image_id].get("width")
        objects = [to_rle(a["segmentation"], size) for a in coco.imgToAnns[image_id] if not a.get("iscrowd", 0)]
        if not objects:
            continue
        best = sorted(by_image[image_id], key=lambda result: -result["score"])[:num_proposals]
        proposals = [to_rle(result["segmentation"], size) for result in best]
        ious = np.zeros((1, len(objects)))
        if proposals:
            ious = mask_util.iou(proposals, objects, [0] * len(objects))  # D x G
        highest = ious.max(axis=0)
        found = [proposals[i] if iou > 0 else None for i, iou in zip(ious.argmax(axis=0), highest)]
        ranked.append(ImageOverlap(image_id, float(highest.mean()), objects, found))
    return sorted(ranked, key=lambda image: -image.overlap)


def write_extremes(
    coco: COCO, results: list[dict], image_root: str, folder: str, *, failed: FailedImages, count: int = 4
) -> list[str]:
    """Write pictures of the images with the best and the worst proposals.

    Each picture shows the objects on the left, and on the right the proposal with the highest IoU for each object, among the 100 best
    proposals of the image.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        results: COCO results with segmentations that `evaluation.coco_results.check_results` has passed.
        image_root: path of the folder with the images.
        folder: path of the output folder. best_1.jpg shows the best image, worst_1.jpg the worst.
        failed: logs and counts images that cannot be read or drawn; they are skipped.
        count: maximum number of pictures of each kind. Default: 4.

    Returns:
        Paths of the written pictures.

    Raises:
        OutputError: a picture cannot be written.
    """
    ranked = rank_images(coco, results)
    paths = []
    for kind, images in (("best", ranked[:count]), ("worst", ranked[::-1][:count])):
        for number, image in enumerate(images, start=1):
            source = Path(image_root) / coco.imgs[image.image_id]["file_name"]
            with failed.named(image.image_id, source, consequence=f"there is no {kind}_{number}.jpg"):
                pixels = read_image(source)
                # The colour of a mask depends on its index, so an empty mask stands for an object that is not found.
                empty = mask_util.encode(np.zeros(pixels.shape[:2], np.uint8, order="F"))
                found = [rle or empty for rle in image.found]
                panels = [draw_masks(pixels, image.objects), draw_masks(pixels, found)]
                path = Path(folder) / f"{kind}_{number}.jpg"
                write_picture(path, np.concatenate(panels, axis=1))
                paths.append(str(path))
    return paths
