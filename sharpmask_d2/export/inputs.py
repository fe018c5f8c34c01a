"""Inputs of the graphs: those that they are traced with, and those that the ranges of int8 values are measured on.

Shape letters: H W height and width of an image in pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .graphs import EncoderGraph


def encoder_inputs(image: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """The inputs of the encoder.

    Args:
        image: (H, W, 3) uint8, resized, in the channel order of the model.
        divisor: number that the sides of a padded image are multiples of.

    Returns:
        The padded image, and (2,) int64, H and W.
    """
    height, width = image.shape[:2]
    return F.pad(image, (0, 0, 0, -width % divisor, 0, -height % divisor)), torch.tensor([height, width])


@torch.no_grad()
def example_inputs(encoder: EncoderGraph) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs of the encoder and of the decoder to trace them with. Their sizes stand for any others.

    Args:
        encoder: of the exported model.
    """
    image, image_size = encoder_inputs(torch.zeros(200, 300, 3, dtype=torch.uint8), encoder.backbone.size_divisibility)
    _, *tables = encoder(image, image_size)
    windows = torch.tensor([[10.0, 10.0, 90.0, 90.0]])
    # Different numbers of windows, so that they are not taken for one number.
    return (image, image_size), (*tables, image_size, windows.repeat(3, 1), windows.repeat(5, 1))
