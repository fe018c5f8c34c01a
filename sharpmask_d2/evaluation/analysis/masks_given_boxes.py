"""IoU of the masks that a model decodes from the true boxes, which measures masks independently of localisation and ranking.

Shape letters:
    G: objects of an image
    H, W: image height and width in pixels
"""

from collections.abc import Callable
from typing import Union

import numpy as np
import torch
from pycocotools import mask as mask_utils

from ...structures import WindowMasks
from ..recall import AREA_RANGES
from .image_proposals import ImageProposals, in_area_ranges
from .tables import Table, percent

# Decodes masks from boxes. Arguments: an image, (H, W, 3) uint8 BGR, and boxes, (G, 4) float64 XYXY in pixels of this image.
# Returns G masks in the frame of the image: `WindowMasks` or bitmaps, (G, H, W) bool.
BoxDecoder = Callable[[np.ndarray, np.ndarray], Union[WindowMasks, torch.Tensor, np.ndarray]]


def decode_boxes(decode: BoxDecoder, image: np.ndarray, boxes: np.ndarray) -> list[dict]:
    """Decode one mask per box and encode the masks as RLE.

    Args:
        decode: decodes masks from boxes; it is not called if there are no boxes.
        image: (H, W, 3) uint8, BGR.
        boxes: (G, 4) float64, XYXY in pixels of `image`.

    Returns:
        G masks as compressed RLE of size (H, W).

    Raises:
        ValueError: `decode` returns another number of masks than boxes, or masks of another size than the image.
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
            f"the decoder returned {len(rles)} masks of sizes {sorted(sizes)} for {len(boxes)} boxes in an image of size "
            f"{image.shape[:2]} (height, width)"
        )
    return rles


def iou_in_box(mask: np.ndarray, truth: np.ndarray, box: np.ndarray) -> float:
    """Compute the IoU of a mask, cropped to a box, with the whole true mask.

    Args:
        mask: (H, W) bool, the mask to crop. A pixel is kept if its centre lies in the box.
        truth: (H, W) bool, the true mask.
        box: (4,) XYXY in pixels; its right and bottom sides are exclusive.

    Returns:
        The IoU from 0 to 1; 0 if both masks are empty.
    """
    x0, y0, x1, y1 = np.ceil(box - 0.5).clip(0).astype(int)
    inside = np.s_[y0:y1, x0:x1]
    common = np.count_nonzero(mask[inside] & truth[inside])
    union = np.count_nonzero(mask[inside]) + np.count_nonzero(truth) - common
    return common / union if union else 0.0


class MasksGivenBoxes:
    """Collects the IoUs of the masks decoded from true boxes and, as a baseline, of the filled boxes."""

    def __init__(self) -> None:
        self._areas, self._mask_ious, self._box_ious = [], [], []

    def add(self, image: ImageProposals) -> None:
        """Measure the masks of one image.

        Args:
            image: an image with `masks_given_boxes`.
        """
        truth, boxes = image.objects
        for area, region, box, decoded in zip(truth.areas, truth.regions, boxes, image.masks_given_boxes):
            true_mask, mask = (mask_utils.decode(rle).astype(bool) for rle in (region, decoded))
            self._areas.append(area)
            self._mask_ious.append(iou_in_box(mask, true_mask, box))
            self._box_ious.append(iou_in_box(np.ones_like(true_mask), true_mask, box))

    def tables(self) -> list[Table]:
        """Report the mean IoU over all objects, in percent, by size of the object.

        Returns:
            One table, "given boxes".
        """
        ranges = in_area_ranges(np.array(self._areas))
        named = {"mask given the box": self._mask_ious, "filled box": self._box_ious}
        rows = [[name, *(percent(np.array(ious)[chosen]) for chosen in ranges)] for name, ious in named.items()]
        title = (
            "IoU given the true box: masks that the model decodes in the canonical windows of the true boxes, cropped to the boxes;\n"
            "and the filled boxes. Mean over the objects, in percent"
        )
        return [Table("given boxes", title, ["", *AREA_RANGES], rows)]
