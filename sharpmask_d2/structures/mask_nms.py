"""Proposals of the same object, by the overlap of their masks: lowered in score instead of left out.

Shape letters: N proposals, H W image, h w reduced image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .counting import common_pixels
from .window_masks import WindowMasks

# Longer side of the reduced image in pixels: recall is that of 112 on the packaged model's proposals, at half the cost.
_REDUCED_SIDE = 80


def mask_overlaps(masks: WindowMasks) -> Tensor:
    """IoU of all pairs of masks, measured on a reduced copy of the image.

    Args:
        masks: N masks.

    Returns:
        (N, N) float32 in 0..1; 0 for masks that the reduced image does not show.
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
    """Lower the scores of proposals that overlap better ones (Matrix NMS with the Gaussian kernel: SOLOv2, section 3.3).

    A proposal's probability is multiplied by exp(-sigma * IoU^2) for the better proposal that lowers it most, itself weighed by how
    much a still better one overlaps that one.

    Args:
        scores: (N,) logits, highest first.
        overlaps: (N, N) IoU.
        sigma: of the kernel.

    Returns:
        (N,) logits, not sorted.
    """
    better = overlaps.triu(diagonal=1)  # row i is better than column j
    # How much each proposal is itself overlapped by a better one.
    own = better.amax(dim=0, keepdim=True).T if len(scores) else better
    log_decay = (-sigma * (better**2 - own**2)).triu(diagonal=1).amin(dim=0) if len(scores) else scores
    return log_to_logit(F.logsigmoid(scores) + log_decay.clamp(max=0))


def log_to_logit(log_probability: Tensor) -> Tensor:
    """From the logarithm of a probability to its logit."""
    return log_probability - (-torch.expm1(log_probability)).clamp(min=torch.finfo(torch.float32).tiny).log()
