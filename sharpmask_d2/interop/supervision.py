"""Masks as `supervision.Detections`. It needs supervision: `pip install 'sharpmask_d2[interop]'`.

Shape letters: N masks.
"""

from typing import Any

import numpy as np
from detectron2.structures import Instances
from pycocotools import mask as mask_utils

from ..extras import INTEROP, import_extra
from .labelled_images import LabelledImage


def to_detections(image: LabelledImage, *, compact: bool = True) -> Any:
    """The masks of an image of a file.

    Args:
        image: with its masks.
        compact: keep the masks as `supervision.CompactMask`, which takes less memory than bitmaps, where this release of supervision has
            it. Default: True.

    Returns:
        `supervision.Detections` with xyxy, mask, class_id (category ids) and confidence, which is 1 for masks without a score.

    Raises:
        UserError: supervision is not installed.
    """
    rles = [mask.rle for mask in image.masks]
    scores = [1.0 if mask.score is None else mask.score for mask in image.masks]
    boxes = mask_utils.toBbox(rles).reshape(-1, 4) if rles else np.empty((0, 4))
    boxes[:, 2:] += boxes[:, :2]
    return _detections(rles, boxes, scores, [mask.category_id for mask in image.masks], image.size, compact)


def proposals_to_detections(proposals: Instances, *, compact: bool = True) -> Any:
    """The proposals of `ProposalPredictor`.

    Args:
        proposals: N proposals with proposal_boxes, objectness_logits and proposal_masks.
        compact: see `to_detections`.

    Returns:
        `supervision.Detections` in the order of the proposals. The confidence is a probability, and class_id is 1.

    Raises:
        UserError: supervision is not installed.
    """
    boxes = proposals.proposal_boxes.tensor.double().cpu().numpy()
    scores = proposals.objectness_logits.double().sigmoid().tolist()
    rles = proposals.proposal_masks.rle()
    return _detections(rles, boxes, scores, [1] * len(rles), proposals.image_size, compact)


def _detections(
    rles: list[dict], boxes: np.ndarray, scores: list[float], classes: list[int], size: tuple[int, int], compact: bool
) -> Any:
    library = import_extra("supervision", requirement=INTEROP)
    if not rles:
        return library.Detections.empty()
    if compact and hasattr(getattr(library, "CompactMask", None), "from_coco_rle"):
        # Its boxes include their last pixel.
        masks = library.CompactMask.from_coco_rle(rles, boxes - (0, 0, 1, 1), image_shape=size)
    else:
        masks = mask_utils.decode(rles).transpose(2, 0, 1).astype(bool)
    return library.Detections(
        xyxy=boxes.astype(np.float32),
        mask=masks,
        confidence=np.array(scores, dtype=np.float32),
        class_id=np.array(classes, dtype=int),
    )
