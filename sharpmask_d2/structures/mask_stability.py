"""Measures how certain the outline of a mask is from its logits alone.

Shape letters: N masks.
"""

import torch
from torch import Tensor

from .counting import count_pixels
from .window_masks import WindowMasks

# Minimum stability. A mask without a certain cell keeps a score: it is ranked behind the others, not removed.
_LEAST = 1e-3


def mask_stability(masks: WindowMasks, *, margin: float = 1.0) -> Tensor:
    """The IoU of a mask at a higher and at a lower threshold (Segment Anything, arXiv 2304.02643, section 4, where it is a filter).

    The mask at the higher threshold lies within the other, so that the IoU is the quotient of their areas, here counted in cells of the
    window's grid.

    Args:
        masks: N masks.
        margin: difference in logits of the two thresholds from the threshold of the masks; 1.0 by default.

    Returns:
        (N,) float32 in 0.001..1.
    """
    logits = masks.logits.flatten(1).float()
    sure, possible = (count_pixels((logits > masks.threshold + shift).to(torch.int8)) for shift in (margin, -margin))
    return torch.where(possible > 0, sure / possible.clamp(min=1), 0.0).clamp(min=_LEAST)
