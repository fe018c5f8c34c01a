"""Builds the proposals of an image as `Instances`, and rescales them with the image.

Shape letters: N proposals.
"""

from typing import Optional

import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import nms

from .mask_nms import log_to_logit, mask_overlaps, matrix_nms
from .mask_stability import mask_stability
from .window_masks import WindowMasks


def build_proposals(
    scores: Tensor, masks: WindowMasks, *, nms_thresh: float, stability: bool = False, mask_nms: bool = False
) -> Instances:
    """The proposals of an image, from window masks and their scores.

    Args:
        scores: (N,) logits, highest first.
        masks: N masks of the image.
        nms_thresh: IoU of two boxes above which non-maximum suppression removes the proposal with the lower score; 1 keeps all.
        stability: multiply the probability of each proposal by the stability of its mask (see `mask_stability`) and sort again; False by
            default.
        mask_nms: lower the scores of proposals whose masks overlap those of better ones (see `mask_nms.matrix_nms`) and sort again; False
            by default.

    Returns:
        Instances in the frame of the masks' image, highest score first: proposal_boxes (Boxes, tight), objectness_logits, proposal_masks
        (WindowMasks). Proposals with an empty mask or a score that is not finite are left out.
    """
    if stability:
        scores = log_to_logit(F.logsigmoid(scores.float()) + mask_stability(masks).log())
        scores, order = scores.sort(descending=True)
        masks = masks[order]
    boxes = masks.boxes()
    # Scores that are not finite are left out: a training that diverges is reported by its losses.
    keep = boxes.nonempty() & scores.isfinite()
    if nms_thresh < 1:
        candidates = keep.nonzero()[:, 0]
        keep = candidates[nms(boxes.tensor[candidates], scores[candidates], nms_thresh)]
    elif mask_nms:
        keep = keep.nonzero()[:, 0]
    if mask_nms:
        lowered = matrix_nms(scores[keep], mask_overlaps(masks[keep]))
        lowered, order = lowered.sort(descending=True)
        keep = keep[order]
        scores = scores.index_copy(0, keep, lowered)
    proposals = Instances(masks.image_size)
    proposals.proposal_boxes = boxes[keep]
    proposals.objectness_logits = scores[keep]
    proposals.proposal_masks = masks[keep]
    return proposals


def rescale_proposals(proposals: Instances, height: Optional[int], width: Optional[int]) -> Instances:
    """Proposals in the frame of the resized image.

    Args:
        proposals: with proposal_boxes, proposal_masks (WindowMasks) and objectness_logits.
        height, width: of the resized image in pixels; None keeps the side.

    Returns:
        Instances in the frame of the resized image, with the tight boxes of the resized masks. Proposals whose mask has no pixel there are
        left out.
    """
    old_height, old_width = proposals.image_size
    size = height or old_height, width or old_width
    if size == (old_height, old_width):
        return proposals
    masks = proposals.proposal_masks.scale(size[1] / old_width, size[0] / old_height, size)
    rescaled = Instances(size)
    rescaled.proposal_boxes = masks.boxes()
    rescaled.objectness_logits = proposals.objectness_logits
    rescaled.proposal_masks = masks
    return rescaled[rescaled.proposal_boxes.nonempty()]
