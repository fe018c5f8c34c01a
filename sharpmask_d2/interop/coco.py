"""Writes masks as a COCO dataset: images, annotations and categories, not only results."""

from typing import Any

from pycocotools import mask as mask_utils

from .labelled_images import LabelledImages


def coco_dataset(content: LabelledImages, *, shape: str = "mask") -> dict[str, Any]:
    """A COCO dataset, which pycocotools, Detectron2 and most labelling tools read.

    Args:
        content: images with their masks.
        shape: "mask" for compressed RLE (default), "polygon" for polygons, whose holes are filled, or "box" for boxes alone.

    Returns:
        {"images", "annotations", "categories"}. Annotations are numbered from 1, with bbox (x, y, width, height in pixels), area (of the
        mask in pixels), iscrowd 0 and, where it is known, the score.
    """
    annotations: list[dict[str, Any]] = []
    for image in content.images:
        for mask in image.masks:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image.image_id,
                "category_id": mask.category_id,
                "iscrowd": 0,
                "bbox": mask_utils.toBbox(mask.rle).tolist(),
                "area": int(mask_utils.area(mask.rle)),
            }
            if shape == "mask":
                annotation["segmentation"] = _as_text(mask.rle)
            elif shape == "polygon":
                annotation["segmentation"] = [polygon.ravel().tolist() for polygon in mask.tight().polygons()]
            if mask.score is not None:
                annotation["score"] = mask.score
            annotations.append(annotation)
    return {
        "images": [
            {"id": image.image_id, "file_name": image.file_name, "height": image.size[0], "width": image.size[1]}
            for image in content.images
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in content.labels.items()],
    }


def _as_text(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }
