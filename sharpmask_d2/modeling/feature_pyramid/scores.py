"""Scores of all windows of a feature pyramid.

Shape letters: B images, C channels of the pyramid, Y X cells of a level, D kinds of windows (sides in cells), K side of a window in cells.
"""

import math

import torch
from torch import Tensor, nn


class WindowScores(nn.Module):
    """Computes the score of every window of a level from the cells of that window only."""

    def __init__(self, *, in_channels: int, channels: int, window_cells: list[int]):
        """
        Args:
            in_channels: C.
            channels: number of channels of the hidden layers.
            window_cells: K of each of the D kinds of windows, an odd number.
        """
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, channels, 1)
        # One template of the window per channel, because dense convolutions of this size would take more time than the backbone.
        self.templates = nn.ModuleList(
            nn.Conv2d(channels, channels, cells, padding=cells // 2, groups=channels) for cells in window_cells
        )
        self.predictors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, 1, 1)) for _ in window_cells
        )
        for predictor in self.predictors:
            # Untrained scores give every window a probability of 0.01, as a focal loss needs it (RetinaNet, section 3.3).
            nn.init.constant_(predictor[-1].bias, -math.log(99))

    def forward(self, feature: Tensor, inside: Tensor) -> Tensor:
        """Computes the scores of the windows of a level.

        Args:
            feature: (B, C, Y, X), the features of the level.
            inside: (B, 1, Y, X), 1 where a cell belongs to its image, else 0.

        Returns:
            (B, D, Y, X) logits.
        """
        x = self.reduce(feature).relu() * inside
        return torch.cat([predict(match(x).relu()) for match, predict in zip(self.templates, self.predictors)], dim=1)
