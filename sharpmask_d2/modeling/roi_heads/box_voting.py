"""Box voting: what non-maximum suppression removes still has a say in where the kept boxes lie (used by MultiPath at test time).

Shape letters: N kept boxes, A boxes before suppression.
"""

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor


def vote_boxes(
    kept_boxes: Tensor, kept_classes: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor, iou: float
) -> Tensor:
    """Replace each kept box by the mean, weighted by score, of the boxes of its class that overlap it.

    Args:
        kept_boxes, kept_classes: (N, 4) XYXY and (N,), those that survived suppression.
        boxes, scores, classes: (A, 4), (A,) and (A,), those before it, the kept ones among them.
        iou: least overlap of a box that votes.

    Returns:
        (N, 4) XYXY. A box for which nobody votes, as one without area, stays.
    """
    votes = (pairwise_iou(Boxes(kept_boxes), Boxes(boxes)) >= iou) & (kept_classes[:, None] == classes)
    weights = votes * scores
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights @ boxes / total.clamp(min=torch.finfo(total.dtype).tiny), kept_boxes)
