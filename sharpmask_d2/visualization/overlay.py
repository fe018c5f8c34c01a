"""Draws masks over an image, and selects masks that differ from one another.

Shape letters:
    N: masks
    H, W: image height and width in pixels
"""

import colorsys

import cv2
import numpy as np
from pycocotools import mask as mask_util


def choose_distinct(rles: list[dict], count: int, *, max_overlap: float = 0.5) -> list[int]:
    """Select the best masks that do not overlap much, by greedy non-maximum suppression.

    Args:
        rles: N masks as compressed RLE, sorted by descending score.
        count: maximum number of selected masks.
        max_overlap: maximum IoU of a selected mask with any mask selected before it. Default: 0.5.

    Returns:
        Indices into `rles`, in ascending order.
    """
    chosen = []
    overlaps = np.asarray(mask_util.iou(rles, rles, [0] * len(rles))) if rles else np.zeros((0, 0))
    for i in range(len(rles)):
        if len(chosen) == count:
            break
        if not chosen or overlaps[i, chosen].max() <= max_overlap:
            chosen.append(i)
    return chosen


def draw_masks(image: np.ndarray, rles: list[dict], *, opacity: float = 0.5) -> np.ndarray:
    """Draw masks in different colours with outlines over an image; smaller masks are drawn above larger ones.

    Args:
        image: (H, W, 3) uint8, in any channel order.
        rles: N masks of the size (H, W) as compressed RLE.
        opacity: opacity of the colours, from 0 to 1. Default: 0.5.

    Returns:
        A new image, (H, W, 3) uint8.
    """
    canvas = image.astype(np.float32)
    outlines = []
    order = sorted(range(len(rles)), key=lambda i: -float(mask_util.area(rles[i])))
    for i in order:
        mask = mask_util.decode(rles[i])
        # Hues that advance by the golden ratio differ clearly between consecutive masks.
        color = np.array(colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.9, 1.0)) * 255
        canvas[mask > 0] = (1 - opacity) * canvas[mask > 0] + opacity * color
        outlines.append((cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0], color))
    canvas = canvas.round().astype(np.uint8)
    for contours, color in outlines:
        cv2.drawContours(canvas, contours, -1, [float(c) for c in color], 2, cv2.LINE_AA)
    return canvas
