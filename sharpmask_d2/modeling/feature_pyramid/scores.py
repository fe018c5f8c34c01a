"""Scores of all windows of a feature pyramid.

Shape letters: B images, C channels of the pyramid, Y X cells of a level, D kinds of windows (numbers of cells), K cells along a window.
"""

import math

import torch
from torch import Tensor, nn


class WindowScores(nn.Module):
    """Scores of all windows of a level, each computed from the cells of its window alone."""

    def __init__(self, *, in_channels: int, channels: int, window_cells: list):
        """
        Args:
            in_channels: C.
            channels: of everything between.
            window_cells: K of each kind of window, odd.
        """
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, channels, 1)
        # A template of the window for every channel: dense convolutions of this size would cost more than the backbone.
        self.templates = nn.ModuleList(
            nn.Conv2d(channels, channels, cells, padding=cells // 2, groups=channels) for cells in window_cells
        )
        self.predictors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, 1, 1)) for _ in window_cells
        )
        for predictor in self.predictors:
            # Untrained scores say that one window in a hundred is positive, as a focal loss needs it (RetinaNet, section 3.3).
            nn.init.constant_(predictor[-1].bias, -math.log(99))

    def forward(self, feature: Tensor, inside: Tensor) -> Tensor:
        """
        Args:
            feature: (B, C, Y, X) of a level.
            inside: (B, 1, Y, X), 1 where a cell belongs to its image, else 0.

        Returns:
            (B, D, Y, X) logits.
        """
        x = self.reduce(feature).relu() * inside
        return torch.cat([predict(match(x).relu()) for match, predict in zip(self.templates, self.predictors)], dim=1)
