"""Pictures of masks.

Shape letters: N masks, H W image.
"""

import colorsys

import cv2
import numpy as np
from pycocotools import mask as mask_util


def choose_distinct(rles: list, count: int, *, max_overlap: float = 0.5) -> list:
    """The best proposals that show different things.

    Args:
        rles: N masks in pycocotools' RLE, best first.
        count: most that are chosen.
        max_overlap: IoU with a chosen mask above which a mask is passed over.

    Returns:
        list[int]: indices into `rles`, best first.
    """
    chosen = []
    overlaps = np.asarray(mask_util.iou(rles, rles, [0] * len(rles))) if rles else np.zeros((0, 0))
    for i in range(len(rles)):
        if len(chosen) == count:
            break
        if not chosen or overlaps[i, chosen].max() <= max_overlap:
            chosen.append(i)
    return chosen


def draw_masks(image: np.ndarray, rles: list, *, opacity: float = 0.5) -> np.ndarray:
    """Masks in colours with outlines over an image; small ones above large ones.

    Args:
        image: (H, W, 3) uint8.
        rles: N masks of the image's size in pycocotools' RLE.
        opacity: of the colours, 0 to 1.

    Returns:
        (H, W, 3) uint8, a new image.
    """
    canvas = image.astype(np.float32)
    outlines = []
    order = sorted(range(len(rles)), key=lambda i: -float(mask_util.area(rles[i])))
    for i in order:
        mask = mask_util.decode(rles[i])
        # Steps of the golden ratio keep the hues of neighbours apart.
        color = np.array(colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.9, 1.0)) * 255
        canvas[mask > 0] = (1 - opacity) * canvas[mask > 0] + opacity * color
        outlines.append((cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0], color))
    canvas = canvas.round().astype(np.uint8)
    for contours, color in outlines:
        cv2.drawContours(canvas, contours, -1, [float(c) for c in color], 2, cv2.LINE_AA)
    return canvas
