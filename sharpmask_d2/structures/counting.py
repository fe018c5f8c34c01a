"""Counting pixels of bitmaps, exactly.

Shape letters: N M bitmaps, P pixels.
"""

import torch
from torch import Tensor


def common_pixels(bitmaps: Tensor, others: Tensor) -> Tensor:
    """How many pixels are set in both.

    Args:
        bitmaps: (N, P) int8 of 0 and 1.
        others: (M, P), likewise.

    Returns:
        (N, M) float32.
    """
    if bitmaps.device.type == "cpu" and len(bitmaps):
        # Ten times as fast there as in float32, and as exact.
        return torch._int_mm(bitmaps, others.T).float()
    # Under autocast the numbers would be rounded.
    with torch.autocast(bitmaps.device.type, enabled=False):
        return bitmaps.float() @ others.T.float()


def count_pixels(bitmaps: Tensor) -> Tensor:
    """How many pixels are set in each bitmap: (N, P) int8 of 0 and 1 to (N,) float32."""
    # A sum makes them int64 or float32 first, which takes several times as long.
    return common_pixels(bitmaps, bitmaps.new_ones(1, bitmaps.shape[1]))[:, 0]
