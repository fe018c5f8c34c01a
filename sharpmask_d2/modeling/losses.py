"""Losses of windows, and how good their masks are.

Shape letters: N windows, M mask side.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    # Not an index: an empty selection has to give 0 with a gradient.
    return (values * mask).sum() / mask.sum().clamp(min=1)


def mask_loss(logits: Tensor, targets: Tensor, paying: Tensor) -> Tensor:
    """Binary logistic loss of masks, mean over pixels and over the windows that pay (DeepMask, section 3.2).

    With y = +-1 this is log(1 + exp(-y f)), the released soft margin loss.

    Args:
        logits: (N, M, M).
        targets: (N, M, M) in {0, 1}.
        paying: (N,) bool.

    Returns:
        a scalar, 0 if no window pays.
    """
    losses = binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=(1, 2))
    return _mean_over(losses, paying)


def score_loss(logits: Tensor, labels: Tensor, paying: Tensor) -> Tensor:
    """Binary logistic loss of scores, mean over the windows that pay.

    Args:
        logits, labels: (N,), labels in {0, 1}.
        paying: (N,) bool.

    Returns:
        a scalar, 0 if no window pays.
    """
    return _mean_over(binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none"), paying)


@torch.no_grad()
def mask_iou(logits: Tensor, targets: Tensor, threshold: float = 0.0) -> Tensor:
    """IoU of each window's mask with its target.

    Args:
        logits: (N, M, M); a pixel above `threshold` (a logit) is foreground.
        targets: (N, M, M) in {0, 1}.

    Returns:
        (N,) in 0..1; 1 where both are empty.
    """
    predicted, targets = logits > threshold, targets > 0
    union = (predicted | targets).sum(dim=(1, 2))
    intersection = (predicted & targets).sum(dim=(1, 2))
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
