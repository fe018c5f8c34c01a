"""Writes the masks that the page shows as files, in memory.

Shape letters: H W image.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..errors import UserError
from .photographs import Photograph
from .sessions import Mask

# Format -> its name on the page.
FORMATS = {"coco": "COCO JSON", "labelme": "labelme JSON", "png": "PNG label map", "cutouts": "Cut-outs (ZIP)"}
_LABEL = "object"


class File(NamedTuple):
    """A file to download."""

    name: str
    media_type: str
    content: bytes


def write(form: str, photograph: Photograph, masks: Sequence[Mask]) -> File:
    """Writes masks in a format.

    Args:
        form: "coco" (a dataset with compressed RLE), "labelme" (polygons, without holes), "png" (the number of the mask at each pixel, 0
            for none; masks of smaller area lie above) or "cutouts" (a ZIP of PNG files with transparency, one for each mask's box).
        photograph: the image of the masks.
        masks: numbered from 1 in this order.

    Raises:
        UserError: there is no mask.
    """
    if not masks:
        raise UserError("There is no mask to download: show some first.")
    stem = PurePath(photograph.name).stem
    if form == "coco":
        return File(f"{stem}_coco.json", "application/json", _json(_coco(photograph, masks)))
    if form == "labelme":
        return File(f"{stem}.json", "application/json", _json(_labelme(photograph, masks)))
    if form == "png":
        return File(f"{stem}_labels.png", "image/png", _png(_label_map(photograph, masks)))
    return File(f"{stem}_cutouts.zip", "application/zip", _cutouts(photograph, masks, stem))


def _coco(photograph: Photograph, masks: Sequence[Mask]) -> dict[str, Any]:
    height, width = photograph.pixels.shape[:2]
    return {
        "images": [{"id": 1, "file_name": photograph.name, "height": height, "width": width}],
        "annotations": [
            {
                "id": number,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": list(mask.box),
                "area": mask.area,
                "segmentation": {"size": [height, width], "counts": _text(mask.rle["counts"])},
                "score": mask.score,
            }
            for number, mask in enumerate(masks, start=1)
        ],
        "categories": [{"id": 1, "name": _LABEL}],
    }


def _labelme(photograph: Photograph, masks: Sequence[Mask]) -> dict[str, Any]:
    height, width = photograph.pixels.shape[:2]
    shapes = [
        {
            "label": _LABEL,
            "points": polygon,
            "group_id": number,
            "description": f"score {mask.score:.3f}",
            "shape_type": "polygon",
            "flags": {},
        }
        for number, mask in enumerate(masks, start=1)
        for polygon in _polygons(mask)
    ]
    return {
        "version": "5.0.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": photograph.name,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _polygons(mask: Mask) -> list[list[list[float]]]:
    x, y = mask.box[:2]
    doubled = cv2.resize(mask.crop(), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    outlines = [cv2.approxPolyDP(contour, 1, True)[:, 0] / 2 + 0.25 for contour in contours]
    return [(points + [x, y]).tolist() for points in outlines if len(points) > 2]


def _label_map(photograph: Photograph, masks: Sequence[Mask]) -> np.ndarray:
    """(H, W) uint8 or, for more than 255 masks, uint16."""
    labels = np.zeros(photograph.pixels.shape[:2], np.uint8 if len(masks) < 256 else np.uint16)
    for number in sorted(range(len(masks)), key=lambda i: -masks[i].area):
        labels[masks[number].bitmap() > 0] = number + 1
    return labels


def _cutouts(photograph: Photograph, masks: Sequence[Mask], stem: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number, mask in enumerate(masks, start=1):
            x, y, width, height = mask.box
            colours = photograph.pixels[y : y + height, x : x + width]
            archive.writestr(f"{stem}_{number:03}.png", _png(np.dstack([colours, mask.crop() * 255])))
    return file.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _text(counts: Any) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
