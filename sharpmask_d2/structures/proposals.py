"""Proposals of an image as Instances.

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
    """Proposals out of window masks and their scores.

    Args:
        scores: (N,) logits, highest first.
        masks: N masks.
        nms_thresh: IoU of boxes above which the lower score goes; 1 keeps all.
        stability: multiply the probability of a proposal by the stability of its mask (see `mask_stability`), and sort anew.
        mask_nms: lower the scores of proposals whose masks overlap better ones (see `mask_nms.matrix_nms`), and sort anew.

    Returns:
        Instances in the frame of the masks' image, best first: proposal_boxes (Boxes, tight), objectness_logits, proposal_masks
        (WindowMasks). Empty masks are left out.
    """
    if stability:
        scores = log_to_logit(F.logsigmoid(scores.float()) + mask_stability(masks).log())
        scores, order = scores.sort(descending=True)
        masks = masks[order]
    boxes = masks.boxes()
    # Beside finite scores: a training that diverges is for the losses to show.
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
    """Proposals in the frame of the image resized to another size.

    Args:
        proposals: proposal_boxes, proposal_masks (WindowMasks) and objectness_logits.
        height, width: in pixels; None leaves the side as it is.

    Returns:
        Instances with tight proposal_boxes of the masks; without those whose mask has no pixel there.
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
