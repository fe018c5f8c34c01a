"""Levels of a feature pyramid: those of the backbone, and coarser ones that are computed from the last of them.

Shape letters: B images, L levels, C channels of the pyramid, Y X cells of a level.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor

from ...errors import UserError
from ...windows.geometry import pyramid_sizes


def common_channels(shapes: Iterable[ShapeSpec], key: str) -> int:
    """The number of channels that features have in common.

    Args:
        shapes: of the features.
        key: config key that names the features.

    Raises:
        UserError: the features differ in their channels; the message names the key.
    """
    channels = {shape.channels for shape in shapes}
    if len(channels) > 1:
        raise UserError(f"{key}: the features differ in their channels, {sorted(channels)}: one head reads them all")
    return channels.pop()


def cells_inside(feature: Tensor, extents: Tensor) -> Tensor:
    """Which cells of a level belong to their image.

    Args:
        feature: (B, C, Y, X).
        extents: (B, 2) int64, rows and columns of the level that belong to each image.

    Returns:
        (B, 1, Y, X) bool.
    """
    rows, columns = (torch.arange(side, device=feature.device) for side in feature.shape[2:])
    return (rows < extents[:, :1])[:, None, :, None] & (columns < extents[:, 1:])[:, None, None]


def pyramid_levels(features: list[Tensor], image_sizes: list[tuple[int, int]], strides: list[int]) -> tuple:
    """All levels of a batch, and how far each image reaches on them.

    Args:
        features: of the backbone, maps (B, C, Y, X), fine to coarse; at most L of them. The levels beyond them are computed.
        image_sizes: (H, W) of each image in pixels, without the padding of the batch.
        strides: of the L levels in pixels.

    Returns:
        L maps (B, C, Y, X); and (B, L, 2) int64, rows and columns of each level that belong to each image.
    """
    extents = torch.tensor([pyramid_sizes(size, strides) for size in image_sizes], device=features[0].device)
    return add_coarser_levels(features, extents), extents


def add_coarser_levels(features: list[Tensor], extents: Tensor) -> list[Tensor]:
    """All levels of a batch.

    Args:
        features: of the backbone, maps (B, C, Y, X), fine to coarse; at most L of them.
        extents: (B, L, 2) int64, rows and columns of each level that belong to each image.

    Returns:
        L maps (B, C, Y, X).
    """
    coarsest = features[-1]
    inside = cells_inside(coarsest, extents[:, len(features) - 1]).to(coarsest.dtype)
    return features + coarser_levels(coarsest, inside, extents.shape[1] - len(features))


def coarser_levels(feature: Tensor, inside: Tensor, count: int) -> list:
    """Further levels of a pyramid: each cell is the mean of the two by two before it, of those that are in the image.

    Args:
        feature: (B, C, Y, X), the coarsest level there is.
        inside: (B, 1, Y, X), 1 where a cell belongs to its image, else 0.
        count: of levels to make.

    Returns:
        `count` maps, each of half the size, rounded up.
    """
    levels = []
    total, weight = feature * inside, inside
    for _ in range(count):
        # Sums over padded squares, so that a cell at the border is not diluted by what is outside. Of even sides, the padding is not read.
        total, weight = (4 * F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2) for x in (total, weight))
        levels.append(total / weight.clamp(min=1))
        total, weight = levels[-1] * (weight > 0), (weight > 0).to(weight.dtype)
    return levels
