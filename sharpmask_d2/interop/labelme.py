"""Writes masks as JSON files of labelme."""

import base64
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from ..structures.tight_masks import TightMask
from .labelled_images import LabelledImage

# A release of labelme that reads the shapes below. Shapes of type "mask" exist since 5.2.
_VERSION = "5.2.0"


def labelme_file(
    image: LabelledImage, labels: Mapping[int, str], *, image_path: str, shape: str = "mask"
) -> dict[str, Any]:
    """The content of the JSON file of an image.

    Args:
        image: with its masks.
        labels: category id -> name.
        image_path: of the image, relative to the folder of the JSON file.
        shape: "mask" (default); "polygon", where the parts of a mask share a group_id and holes are filled; or "box".

    Returns:
        Dict that can be written as JSON. The image itself is not embedded. The description of a shape is its score.
    """
    shapes = []
    for number, mask in enumerate(image.masks, start=1):
        tight = mask.tight()
        for kind, points, more in _geometry(tight, shape):
            shapes.append(
                {
                    "label": labels[mask.category_id],
                    "points": points,
                    "group_id": number if kind == "polygon" else None,
                    "description": "" if mask.score is None else f"{mask.score:.3f}",
                    "shape_type": kind,
                    "flags": {},
                    "mask": None,
                    **more,
                }
            )
    return {
        "version": _VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": image.size[0],
        "imageWidth": image.size[1],
    }


def _geometry(mask: TightMask, shape: str) -> list[tuple[str, list[list[float]], dict[str, Any]]]:
    """(shape_type, points, further entries) of the shapes of a mask."""
    x0, y0, x1, y1 = mask.box
    if shape == "polygon":
        return [("polygon", polygon.tolist(), {}) for polygon in mask.polygons()]
    if shape == "box":
        return [("rectangle", [[x0, y0], [x1, y1]], {})]
    # The second point is the last pixel of the bitmap.
    return [("mask", [[x0, y0], [x1 - 1, y1 - 1]], {"mask": _png(mask.bitmap)})]


def _png(bitmap: np.ndarray) -> str:
    """A bitmap (h, w) bool as a PNG file in base64."""
    content = cv2.imencode(".png", bitmap.astype(np.uint8) * 255)[1]
    return base64.b64encode(content.tobytes()).decode("ascii")
