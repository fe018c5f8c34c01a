"""The images on which proposals are best and worst, beside their objects.

Shape letters: D proposals of an image, G objects of an image.
"""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from ..data.failed_images import FailedImages
from ..data.images import read_image
from ..structures.coco_masks import to_rle
from .overlay import draw_masks
from .pictures import write_picture


class ImageOverlap(NamedTuple):
    """How well the proposals of an image find its objects: mean over its G objects of the best IoU, objects as RLEs, and their best
    proposals as RLEs, None for an object that none touches."""

    image_id: int
    overlap: float
    objects: list
    found: list


def rank_images(coco: COCO, results: list, *, num_proposals: int = 100) -> list:
    """Images by the mean best overlap of their objects' masks, crowds left out, highest first.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        results: COCO results with segmentations that `evaluation.coco_results.check_results` has passed.
        num_proposals: how many of an image's best proposals count.

    Returns:
        list[ImageOverlap] of the images that have objects.
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
    coco: COCO, results: list, image_root: str, folder: str, *, failed: FailedImages, count: int = 4
) -> list:
    """Write pictures of the best and the worst images: their objects left, the best of 100 proposals for each right.

    Args:
        coco, results: see `rank_images`.
        image_root: folder of the images.
        folder: to write to; best_1.jpg is the best, worst_1.jpg the worst.
        failed: names the images that cannot be read or drawn, and counts them; the others have their pictures.
        count: pictures of each kind, at most.

    Returns:
        the paths that were written.
    """
    ranked = rank_images(coco, results)
    paths = []
    for kind, images in (("best", ranked[:count]), ("worst", ranked[::-1][:count])):
        for number, image in enumerate(images, start=1):
            source = Path(image_root) / coco.imgs[image.image_id]["file_name"]
            with failed.named(image.image_id, source, consequence=f"there is no {kind}_{number}.jpg"):
                pixels = read_image(source)
                # Colours go by number: what nobody found leaves its colour out.
                nothing = mask_util.encode(np.zeros(pixels.shape[:2], np.uint8, order="F"))
                found = [rle or nothing for rle in image.found]
                panels = [draw_masks(pixels, image.objects), draw_masks(pixels, found)]
                path = Path(folder) / f"{kind}_{number}.jpg"
                write_picture(path, np.concatenate(panels, axis=1))
                paths.append(str(path))
    return paths
