"""Drawn masks that are hard for file formats, and COCO files of them."""

import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from drawing import compressed_rle
from pycocotools import mask as mask_utils
from sharpmask_d2.interop.labelled_images import LabelledImages, read_labelled_images

SIZE = (48, 70)
# Scores of the masks of image 1.
SCORES = {"disc": 0.9, "ring": 0.8, "two parts": 0.7, "edge": 0.6, "pixel": 0.5}


class Drawn(NamedTuple):
    """COCO files in a folder, and what they hold."""

    results: Path  # of images 1 and 2
    annotations: Path  # lists images 1, 2 and 3; 3 has no masks
    image_root: Path
    bitmaps: list  # (H, W) bool, those of image 1 by descending score


def draw_masks() -> list:
    """Bitmaps of a disc, a ring, a mask of two parts, one along an edge of the image, and one of a single pixel."""
    disc, ring, parts, edge, pixel = (np.zeros(SIZE, np.uint8) for _ in SCORES)
    cv2.circle(disc, (30, 20), 12, 1, -1)
    cv2.circle(ring, (40, 24), 18, 1, -1)
    cv2.circle(ring, (42, 24), 7, 0, -1)
    parts[5:20, 3:15] = parts[30:44, 40:66] = 1
    edge[40:] = 1
    pixel[47, 0] = 1
    return [bitmap.astype(bool) for bitmap in (disc, ring, parts, edge, pixel)]


def write_files(folder: Path) -> Drawn:
    """Write the files. Results are not in the order of their scores, and one of them is empty."""
    bitmaps = draw_masks()
    root = folder / "images"
    names = {1: "1.png", 2: "sub/2.jpg", 3: "3.png"}
    for name in names.values():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    results = [to_result(1, names, bitmap, score) for bitmap, score in zip(bitmaps, SCORES.values())]
    results = [*results[::-1], to_result(2, names, bitmaps[0], 0.4), to_result(1, names, np.zeros(SIZE, bool), 0.99)]
    (folder / "results.json").write_text(json.dumps(results))
    images = [{"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for i, name in names.items()]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
    (folder / "images.json").write_text(json.dumps(content))
    return Drawn(folder / "results.json", folder / "images.json", root, bitmaps)


def to_result(image_id: int, names: dict, bitmap: np.ndarray, score: float) -> dict:
    """A COCO result."""
    rle = compressed_rle(bitmap)
    return {
        "image_id": image_id,
        "file_name": names[image_id],
        "category_id": 1,
        "bbox": mask_utils.toBbox(rle).tolist(),
        "score": score,
        "segmentation": rle,
    }


def read_drawn(folder: Path) -> LabelledImages:
    """The drawn masks as `read_labelled_images` returns them, with the image without masks."""
    drawn = write_files(folder)
    return read_labelled_images(drawn.results, annotations=str(drawn.annotations))


def fill_holes(bitmap: np.ndarray) -> np.ndarray:
    """A bitmap (H, W) bool without holes."""
    outside = np.pad(bitmap, 1).astype(np.uint8)
    cv2.floodFill(outside, None, (0, 0), 2)
    return (outside != 2)[1:-1, 1:-1]


def differ_within(bitmap: np.ndarray, other: np.ndarray, pixels: int) -> bool:
    """Whether two bitmaps (H, W) bool differ only within a number of pixels from the edges of the first."""
    kernel = np.ones((2 * pixels + 1,) * 2, np.uint8)
    padded = np.pad(bitmap, pixels).astype(np.uint8)
    inside = np.s_[pixels:-pixels, pixels:-pixels]
    shrunk, grown = cv2.erode(padded, kernel)[inside], cv2.dilate(padded, kernel)[inside]
    return bool((shrunk.astype(bool) <= other).all() and (other <= grown.astype(bool)).all())
