"""Foveal regions: each RoI is seen in several crops around its centre (MultiPath, section 3.1), each with layers of its own.

Shape letters: N boxes, R RoIs of all images, C channels, P side of a pooled crop, D features of a tower.
"""

from typing import Optional

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from torch import Tensor, nn


def foveal_boxes(boxes: Tensor, factor: float) -> Tensor:
    """Boxes enlarged around their centres, as the original does: parts beyond the image's border stay.

    Args:
        boxes: (N, 4) XYXY, in any frame.
        factor: of width and height; 1 returns equal boxes, to the bit.

    Returns:
        (N, 4) XYXY in the same frame, not clipped.
    """
    corners = boxes[:, :2], boxes[:, 2:]
    growth = (corners[1] - corners[0]) * ((factor - 1) / 2)
    return torch.cat([corners[0] - growth, corners[1] + growth], dim=1)


class FovealPooler(nn.Module):
    """Pools several crops of each RoI. It stands where StandardROIHeads has its ROIPooler."""

    def __init__(self, *, in_features: list, factors: list, poolers: list):
        """
        Args:
            in_features: names of the features that forward() gets, in this order.
            factors: of each crop.
            poolers: a SkipPooler for each crop.
        """
        super().__init__()
        self.in_features = list(in_features)
        self.factors = list(factors)
        self.poolers = nn.ModuleList(poolers)

    def forward(self, features: list, boxes: list) -> list:
        """
        Args:
            features: maps (images, C, height, width).
            boxes: Boxes of the RoIs of each image, in its pixels.

        Returns:
            (R, C, P, P) of each crop.
        """
        named = dict(zip(self.in_features, features))
        crops = []
        for factor, pooler in zip(self.factors, self.poolers):
            crops.append(pooler(named, [Boxes(foveal_boxes(b.tensor, factor)) for b in boxes]))
        return crops


class FovealTowers(nn.Module):
    """A tower of layers per crop, their outputs joined for the classifier. It stands where StandardROIHeads has its box head."""

    def __init__(self, *, towers: list, regressor_tower: Optional[nn.Module] = None):
        """
        Args:
            towers: of the crops, box heads of Detectron2 with `output_shape`.
            regressor_tower: of one more crop, for the box regressor alone; None: the regressor reads what the classifier reads.
        """
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.regressor_tower = regressor_tower

    @property
    def output_shapes(self) -> tuple:
        """ShapeSpec of what the classifier reads, and of what the regressor reads."""
        classifier = ShapeSpec(channels=sum(_length(tower) for tower in self.towers))
        if self.regressor_tower is None:
            return classifier, classifier
        return classifier, ShapeSpec(channels=_length(self.regressor_tower))

    def forward(self, crops: list) -> tuple:
        """
        Args:
            crops: (R, C, P, P) of each tower, the regressor's last.

        Returns:
            (R, D) for the classifier, (R, D) for the regressor.
        """
        # Without its own tower the regressor has no crop either.
        joined = torch.cat([tower(crop).flatten(1) for tower, crop in zip(self.towers, crops)], dim=1)
        if self.regressor_tower is None:
            return joined, joined
        return joined, self.regressor_tower(crops[-1]).flatten(1)


def _length(tower: nn.Module) -> int:
    shape = tower.output_shape
    return shape.channels * (shape.height or 1) * (shape.width or 1)
