"""Lowers the scores of proposals whose masks overlap those of better proposals (Matrix NMS).

Shape letters: N proposals.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .counting import common_pixels
from .window_masks import WindowMasks

# Longer side of the reduced image in pixels. For the packaged model's proposals, recall equals that of 112 at half the cost.
_REDUCED_SIDE = 80


def mask_overlaps(masks: WindowMasks) -> Tensor:
    """The IoU of all pairs of masks, measured on a reduced copy of the image.

    Args:
        masks: N masks of an image.

    Returns:
        (N, N) float32 in 0..1; 0 for a mask that has no pixel in the reduced image.
    """
    height, width = masks.image_size
    factor = min(1.0, _REDUCED_SIDE / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    bitmaps = masks.scale(size[1] / width, size[0] / height, size).pixels()
    intersection = common_pixels(bitmaps, bitmaps)
    areas = intersection.diagonal()
    union = areas[:, None] + areas - intersection
    return torch.where(union > 0, intersection / union.clamp(min=1), 0.0)


def matrix_nms(scores: Tensor, overlaps: Tensor, *, sigma: float = 2.0) -> Tensor:
    """Lower the scores of proposals that overlap better ones (Matrix NMS with a Gaussian kernel: SOLOv2, section 3.3).

    The probability of a proposal is multiplied by the minimum, over all better proposals, of exp(-sigma * (IoU^2 - max IoU'^2)). Here IoU
    is the overlap of the two proposals, and IoU' the overlap of the better proposal with proposals that are better still.

    Args:
        scores: (N,) logits, highest first.
        overlaps: (N, N) IoU in 0..1.
        sigma: of the kernel; 2.0 by default.

    Returns:
        (N,) logits in the order of the input.
    """
    better = overlaps.triu(diagonal=1)  # row i is better than column j
    # The largest overlap of each proposal with a better one.
    own = better.amax(dim=0, keepdim=True).T if len(scores) else better
    log_decay = (-sigma * (better**2 - own**2)).triu(diagonal=1).amin(dim=0) if len(scores) else scores
    return log_to_logit(F.logsigmoid(scores) + log_decay.clamp(max=0))


def log_to_logit(log_probability: Tensor) -> Tensor:
    """The logits of probabilities that are given by their logarithms.

    Args:
        log_probability: of any shape, floating point, at most 0.

    Returns:
        Logits of the same shape; finite for a probability of 1.
    """
    return log_probability - (-torch.expm1(log_probability)).clamp(min=torch.finfo(torch.float32).tiny).log()
