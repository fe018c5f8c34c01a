"""Resizing of images and masks, with antialiasing or as in the released code.

Shape letters: B batch, C channels, H W height and width of the input, h w of the output.
"""

from torch import Tensor
from torch.nn.functional import interpolate

RESIZINGS = ("antialiased", "released")


def resize(x: Tensor, size: tuple, resizing: str) -> Tensor:
    """Resize images or maps bilinearly.

    Args:
        x: (B, C, H, W) floating point.
        size: (h, w) in pixels.
        resizing: "antialiased": pixels are areas, and an output that is smaller averages all of them; or "released": the centres of the
            corner pixels coincide, and each output pixel is interpolated from its four neighbours only (nnx.SpatialReSamplingEx).

    Returns:
        (B, C, h, w); `x` itself if it has that size.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if resizing == "released":
        return interpolate(x, size=size, mode="bilinear", align_corners=True)
    shrinks = size[0] < x.shape[2] or size[1] < x.shape[3]
    return interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
