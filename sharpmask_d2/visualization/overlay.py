"""Draws masks over an image, and selects masks that differ from one another.

Shape letters:
    N: masks
    H, W: image height and width in pixels
"""

import cv2
import numpy as np
from pycocotools import mask as mask_util

# The colours of Okabe and Ito without black (RGB), which people with any kind of colour vision can tell apart
# (https://jfly.uni-koeln.de/color/).
PALETTE = np.array(
    [(86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 158, 115), (230, 159, 0), (0, 114, 178), (213, 94, 0)],
    dtype=np.float32,
)


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


def draw_masks(image: np.ndarray, rles: list[dict], *, opacity: float = 0.45) -> np.ndarray:
    """Draw masks in different colours with outlines over an image; smaller masks are drawn above larger ones.

    Args:
        image: (H, W, 3) uint8, BGR.
        rles: N masks of the size (H, W) as compressed RLE; mask i has the colour i of `PALETTE`, which repeats.
        opacity: opacity of the colours, from 0 to 1. Default: 0.45.

    Returns:
        A new image, (H, W, 3) uint8, BGR.
    """
    canvas = image.copy()
    thickness = max(2, round(min(image.shape[:2]) / 300))
    for i in sorted(range(len(rles)), key=lambda i: -float(mask_util.area(rles[i]))):
        mask = mask_util.decode(rles[i])
        color = PALETTE[i % len(PALETTE)][::-1]
        inside = mask > 0
        canvas[inside] = ((1 - opacity) * canvas[inside] + opacity * color).round()
        contours = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
        # A dark line around each outline keeps it visible on a background of any colour.
        cv2.drawContours(canvas, contours, -1, (40, 40, 40), 2 * thickness, cv2.LINE_AA)
        cv2.drawContours(canvas, contours, -1, color.tolist(), thickness, cv2.LINE_AA)
    return canvas
