"""Writes masks as text files for YOLO: one polygon per mask, or boxes.

Shape letters: P points of a polygon.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .labelled_images import LabelledImage


def yolo_labels(image: LabelledImage, classes: Mapping[int, int], *, shape: str = "polygon") -> str:
    """The text file of an image.

    Args:
        image: with its masks.
        classes: category id -> number of the class, from 0, as in `yolo_dataset`.
        shape: "polygon" (default) or "box".

    Returns:
        One line per mask: the class and x0 y0 x1 y1 ... of one polygon, or the class and the centre, width and height of the box, all in
        units of the width and height of the image. A line has one polygon only: parts of a mask are connected by bridges of width 0, and
        holes are filled.
    """
    height, width = image.size
    lines = []
    for mask in image.masks:
        tight = mask.tight()
        if shape == "box":
            x0, y0, x1, y1 = tight.box
            numbers = np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
        else:
            numbers = join_polygons(tight.polygons()).ravel()
        numbers = numbers.reshape(-1, 2) / (width, height)
        lines.append(f"{classes[mask.category_id]} " + " ".join(f"{number:.6g}" for number in numbers.ravel()) + "\n")
    return "".join(lines)


def yolo_dataset(labels: Mapping[int, str]) -> dict[str, Any]:
    """The content of data.yaml for a folder that holds images/ and labels/.

    Args:
        labels: category id -> name.

    Returns:
        Dict with the folders and the names of the classes, which are numbered from 0 in the order of `labels`.
    """
    return {"train": "images", "val": "images", "nc": len(labels), "names": list(labels.values())}


def join_polygons(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """One polygon that goes around several, connected by bridges of width 0 where two polygons are closest.

    Args:
        polygons: one or more arrays (P, 2) of x, y.

    Returns:
        (P, 2) of x, y.
    """
    joined, *others = polygons
    rest = list(others)
    while rest:
        # The polygon that is closest to those that are joined already.
        pairs = [_closest(joined, polygon) for polygon in rest]
        number = min(range(len(rest)), key=lambda i: pairs[i][0])
        _, here, there = pairs[number]
        around = np.roll(rest.pop(number), -there, axis=0)
        joined = np.concatenate([joined[: here + 1], around, around[:1], joined[here:]])
    return joined


def _closest(points: np.ndarray, others: np.ndarray) -> tuple[float, int, int]:
    """The squared distance of the two closest points of two polygons, and their numbers."""
    distances = ((points[:, None] - others) ** 2).sum(axis=2)
    here, there = np.unravel_index(int(distances.argmin()), distances.shape)
    return float(distances[here, there]), int(here), int(there)
