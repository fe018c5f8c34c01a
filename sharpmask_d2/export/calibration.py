"""The inputs of both graphs for photographs, from which the ranges of int8 values are measured.

Shape letters: H W height and width of an image in pixels.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.proposal_generator.sharpmask_fpn import PyramidFeatures, SharpMaskFPN
from ..windows.geometry import pyramid_sizes
from .graphs import EncoderGraph


class CalibrationImage(NamedTuple):
    """The inputs of the graphs for one image, in the order of their arguments."""

    encoder: tuple[Tensor, ...]
    decoder: tuple[Tensor, ...]


@torch.no_grad()
def calibration_images(
    generator: SharpMaskFPN, encoder: EncoderGraph, images: Iterable[Tensor], divisor: int
) -> list[CalibrationImage]:
    """Runs the encoder on images, and selects the windows that a runner would decode.

    Args:
        generator: of the exported model.
        encoder: of the exported model.
        images: (H, W, 3) uint8, resized, in the channel order of the model.
        divisor: number that the sides of a padded image are multiples of.
    """
    found = []
    for image in images:
        height, width = image.shape[:2]
        padded = F.pad(image, (0, 0, 0, -width % divisor, 0, -height % divisor))
        image_size = torch.tensor([height, width])
        scores, *tables = encoder(padded, image_size)
        sizes = pyramid_sizes(padded.shape[:2], generator.strides)
        (windows,) = generator.select(PyramidFeatures([(height, width)], [], scores[None], sizes, None))
        decoder = (*tables, image_size, windows.boxes[windows.refined], windows.boxes[~windows.refined])
        found.append(CalibrationImage((padded, image_size), decoder))
    return found
