"""How sure a mask is of its outline, without a network that was trained to say so.

Shape letters: N masks, M mask side.
"""

import torch
from torch import Tensor

from .counting import count_pixels
from .window_masks import WindowMasks

# A mask without a cell that is sure keeps a score: it goes behind the others, not away.
_LEAST = 1e-3


def mask_stability(masks: WindowMasks, *, margin: float = 1.0) -> Tensor:
    """IoU of a mask under a higher and under a lower threshold (Segment Anything, arXiv 2304.02643, section 4, there as a filter).

    The one lies within the other, so that it is the quotient of their areas, here in cells of the window.

    Args:
        masks: N masks.
        margin: logits that the thresholds lie above and below that of the masks.

    Returns:
        (N,) float32 in 0..1, not below 0.001.
    """
    logits = masks.logits.flatten(1).float()
    sure, possible = (count_pixels((logits > masks.threshold + shift).to(torch.int8)) for shift in (margin, -margin))
    return torch.where(possible > 0, sure / possible.clamp(min=1), 0.0).clamp(min=_LEAST)
