"""How good masks are where finding and ranking play no part: IoU of the masks that a model makes when it is given the true boxes.

Shape letters:
    G: objects of an image
    H, W: image height and width
"""

from collections.abc import Callable
from typing import Union

import numpy as np
import torch
from pycocotools import mask as mask_utils

from ..structures import WindowMasks
from .proposed_image import ProposedImage, in_area_ranges
from .recall import AREA_RANGES
from .tables import Table, percent

# Makes masks of given boxes: image (H, W, 3), uint8, BGR, and boxes (G, 4), float64, XYXY in pixels of the image, to G masks in the
# frame of the image, WindowMasks or bitmaps (G, H, W) bool.
BoxDecoder = Callable[[np.ndarray, np.ndarray], Union[WindowMasks, torch.Tensor, np.ndarray]]


def decode_boxes(decode: BoxDecoder, image: np.ndarray, boxes: np.ndarray) -> list:
    """Masks of given boxes as G compressed RLEs.

    Args:
        decode: makes them.
        image: (H, W, 3), uint8, BGR.
        boxes: (G, 4) XYXY in pixels of the image; without any, nothing is asked of `decode`.

    Raises:
        ValueError: the number of masks or their size is another one.
    """
    if not len(boxes):
        return []
    masks = decode(image, boxes)
    if isinstance(masks, WindowMasks):
        rles = masks.rle()
    else:
        bitmaps = masks.cpu().numpy() if isinstance(masks, torch.Tensor) else masks
        rles = [mask_utils.encode(np.asfortranarray(bitmap, dtype=np.uint8)) for bitmap in bitmaps]
    sizes = {tuple(rle["size"]) for rle in rles}
    if len(rles) != len(boxes) or sizes != {image.shape[:2]}:
        raise ValueError(
            f"{len(boxes)} boxes in an image of size {image.shape[:2]} gave {len(rles)} masks of sizes {sorted(sizes)}"
        )
    return rles


def iou_in_box(mask: np.ndarray, truth: np.ndarray, box: np.ndarray) -> float:
    """IoU of a mask, of which only pixels with their centre in the box count, with the whole true mask.

    Args:
        mask, truth: (H, W) bool.
        box: XYXY in pixels; the right and the lower side do not belong to it.

    Returns:
        0 to 1; 0 where both are empty.
    """
    x0, y0, x1, y1 = np.ceil(box - 0.5).clip(0).astype(int)
    inside = np.s_[y0:y1, x0:x1]
    common = np.count_nonzero(mask[inside] & truth[inside])
    union = np.count_nonzero(mask[inside]) + np.count_nonzero(truth) - common
    return common / union if union else 0.0


class GivenBoxes:
    """Collects, image by image, the IoU of the masks of given boxes, and of the filled boxes."""

    def __init__(self) -> None:
        self._areas, self._of_masks, self._of_boxes = [], [], []

    def add(self, image: ProposedImage) -> None:
        """
        Args:
            image: with masks of given boxes.
        """
        truth, boxes = image.objects
        for area, region, box, given in zip(truth.areas, truth.regions, boxes, image.given_boxes):
            true_mask, mask = (mask_utils.decode(rle).astype(bool) for rle in (region, given))
            self._areas.append(area)
            self._of_masks.append(iou_in_box(mask, true_mask, box))
            self._of_boxes.append(iou_in_box(np.ones_like(true_mask), true_mask, box))

    def tables(self) -> list:
        """Mean IoU in percent, by the size of the objects."""
        ranges = in_area_ranges(np.array(self._areas))
        named = {"mask given the box": self._of_masks, "filled box": self._of_boxes}
        rows = [[name, *(percent(np.array(ious)[chosen]) for chosen in ranges)] for name, ious in named.items()]
        title = (
            "IoU given the true box: masks that the model makes in the canonical windows of the true boxes, cut to the boxes; and the\n"
            "filled boxes. Mean over the objects, in percent"
        )
        return [Table("given boxes", title, ["", *AREA_RANGES], rows)]
