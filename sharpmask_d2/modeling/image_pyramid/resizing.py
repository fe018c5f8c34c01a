"""Resizing of images and masks: pixels as areas, or corner on corner as in the released code.

Shape letters: B batch, C channels, H W height and width, h w those asked for.
"""

from torch import Tensor
from torch.nn.functional import interpolate

RESIZINGS = ("antialiased", "released")


def resize(x: Tensor, size: tuple, resizing: str) -> Tensor:
    """Resize images or maps bilinearly.

    Args:
        x: (B, C, H, W).
        size: (h, w).
        resizing: "antialiased": pixels are areas, and where the result is smaller all of them count; or "released": corner pixels stay in
            the corners, and each result pixel is made of its four neighbours alone (nnx.SpatialReSamplingEx).

    Returns:
        (B, C, h, w).
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if resizing == "released":
        return interpolate(x, size=size, mode="bilinear", align_corners=True)
    shrinks = size[0] < x.shape[2] or size[1] < x.shape[3]
    return interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
