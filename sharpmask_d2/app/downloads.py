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
from ..interop.coco import coco_dataset
from ..interop.labelled_images import LabelledImage, LabelledImages, LabelledMask
from ..interop.labelme import labelme_file
from .photographs import Photograph
from .sessions import Mask

# Format -> its name on the page.
FORMATS = {"coco": "COCO JSON", "labelme": "labelme JSON", "png": "PNG label map", "cutouts": "Cut-outs (ZIP)"}
_LABELS = {1: "object"}


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
        return File(
            f"{stem}_coco.json",
            "application/json",
            _json(coco_dataset(LabelledImages([_labelled(photograph, masks)], _LABELS))),
        )
    if form == "labelme":
        content = labelme_file(_labelled(photograph, masks), _LABELS, image_path=photograph.name, shape="polygon")
        return File(f"{stem}.json", "application/json", _json(content))
    if form == "png":
        return File(f"{stem}_labels.png", "image/png", _png(_label_map(photograph, masks)))
    return File(f"{stem}_cutouts.zip", "application/zip", _cutouts(photograph, masks, stem))


def _labelled(photograph: Photograph, masks: Sequence[Mask]) -> LabelledImage:
    """The photograph and its masks, as the writers of `interop` take them."""
    size = photograph.pixels.shape[:2]
    return LabelledImage(1, photograph.name, size, [LabelledMask(mask.rle, 1, mask.score) for mask in masks])


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
