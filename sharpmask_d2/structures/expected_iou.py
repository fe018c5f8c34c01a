"""Estimates from a mask's probabilities how well it fits its object.

Shape letters: N masks.
"""

from torch import Tensor

from .window_masks import WindowMasks


def expected_iou(masks: WindowMasks) -> Tensor:
    """The IoU of each mask with its object that the mask's own probabilities predict.

    With p the probability that a cell belongs to the object, it is the sum of p over the cells of the mask, divided by the number of these
    cells plus the sum of p over the other cells: the expected intersection over the expected union, counted in cells of the window's grid.

    Args:
        masks: N masks.

    Returns:
        (N,) float32 in 0..1; 0 for a mask without a cell.
    """
    logits = masks.logits.flatten(1).float()
    inside = logits > masks.threshold
    probabilities = logits.sigmoid()
    common = (probabilities * inside).sum(1)
    union = inside.sum(1) + probabilities.sum(1) - common
    return common / union.clamp(min=1e-6)
