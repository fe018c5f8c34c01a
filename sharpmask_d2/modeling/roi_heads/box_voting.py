"""Box voting: refines the boxes that remain after non-maximum suppression by the boxes that it removed.

Used by MultiPath at test time. Source: Gidaris and Komodakis, arXiv 1505.01749.

Shape letters:
    N: boxes that remain after suppression
    A: boxes before suppression
"""

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor


def vote_boxes(
    kept_boxes: Tensor, kept_classes: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor, iou: float
) -> Tensor:
    """Replace each remaining box by the mean of the boxes of its class that overlap it, weighted by their scores.

    Args:
        kept_boxes: (N, 4) XYXY in any frame, the boxes that remain after suppression.
        kept_classes: (N,) int64, their classes.
        boxes: (A, 4) XYXY in the same frame, all boxes before suppression, including the remaining ones.
        scores: (A,) probabilities of all boxes.
        classes: (A,) int64, classes of all boxes.
        iou: minimum IoU of a box with the remaining box that it contributes to.

    Returns:
        (N, 4) XYXY. A box without contributions, such as a box without area, is unchanged.
    """
    votes = (pairwise_iou(Boxes(kept_boxes), Boxes(boxes)) >= iou) & (kept_classes[:, None] == classes)
    weights = votes * scores
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights @ boxes / total.clamp(min=torch.finfo(total.dtype).tiny), kept_boxes)
