"""Foveal regions: several crops of different size around the centre of each RoI, each with its own layers (MultiPath, section 3.1).

Shape letters:
    N: boxes
    R: RoIs of all images
    C: channels
    P: side of a pooled crop in cells
    D: length of the feature vector of a tower
"""

from collections.abc import Sequence
from typing import Optional

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from torch import Tensor, nn


def foveal_boxes(boxes: Tensor, factor: float) -> Tensor:
    """Enlarge boxes around their centres. As in the released code, boxes are not clipped to the image.

    Args:
        boxes: (N, 4) XYXY in any frame.
        factor: factor of width and height; 1 returns bitwise equal boxes.

    Returns:
        (N, 4) XYXY in the same frame.
    """
    corners = boxes[:, :2], boxes[:, 2:]
    growth = (corners[1] - corners[0]) * ((factor - 1) / 2)
    return torch.cat([corners[0] - growth, corners[1] + growth], dim=1)


class FovealPooler(nn.Module):
    """Pools several crops of each RoI; it replaces the `ROIPooler` of `StandardROIHeads`."""

    def __init__(self, *, in_features: Sequence[str], factors: Sequence[float], poolers: Sequence[nn.Module]):
        """
        Args:
            in_features: names of the features in the order in which `forward` receives them.
            factors: factor of width and height of each crop; see `foveal_boxes`.
            poolers: one `SkipPooler` per crop.
        """
        super().__init__()
        self.in_features = list(in_features)
        self.factors = list(factors)
        self.poolers = nn.ModuleList(poolers)

    def forward(self, features: list[Tensor], boxes: list[Boxes]) -> list[Tensor]:
        """Pool all crops of all RoIs.

        Args:
            features: feature maps (B, C, height, width) of B images, in the order of `in_features`.
            boxes: RoIs, one `Boxes` per image, XYXY in pixels of the network's input.

        Returns:
            One tensor (R, C, P, P) per crop.
        """
        named = dict(zip(self.in_features, features))
        crops = []
        for factor, pooler in zip(self.factors, self.poolers):
            crops.append(pooler(named, [Boxes(foveal_boxes(b.tensor, factor)) for b in boxes]))
        return crops


class FovealTowers(nn.Module):
    """One tower of layers per crop, whose outputs are concatenated for the classifier; it replaces the box head of `StandardROIHeads`."""

    def __init__(self, *, towers: Sequence[nn.Module], regressor_tower: Optional[nn.Module] = None):
        """
        Args:
            towers: one box head of Detectron2 per crop.
            regressor_tower: box head of an additional crop, which only the box regressor uses. Default: None, the regressor uses the
                features of the classifier.
        """
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.regressor_tower = regressor_tower

    @property
    def output_shapes(self) -> tuple[ShapeSpec, ShapeSpec]:
        """Shapes of the features of the classifier and of the regressor."""
        classifier = ShapeSpec(channels=sum(_length(tower) for tower in self.towers))
        if self.regressor_tower is None:
            return classifier, classifier
        return classifier, ShapeSpec(channels=_length(self.regressor_tower))

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the features of all RoIs.

        Args:
            crops: one tensor (R, C, P, P) per tower; the crop of the regressor's tower, if there is one, is the last.

        Returns:
            The features of the classifier and of the regressor, (R, D) each; D may differ between them.
        """
        # `zip` stops before the crop of the regressor's tower.
        joined = torch.cat([tower(crop).flatten(1) for tower, crop in zip(self.towers, crops)], dim=1)
        if self.regressor_tower is None:
            return joined, joined
        return joined, self.regressor_tower(crops[-1]).flatten(1)


def _length(tower: nn.Module) -> int:
    shape = tower.output_shape
    return shape.channels * (shape.height or 1) * (shape.width or 1)
