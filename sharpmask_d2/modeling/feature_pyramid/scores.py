"""Heads on a feature pyramid: scores of all windows, and masks of those that are chosen.

Shape letters: B images, L levels, C channels of the pyramid, Y X cells of a level, D kinds of windows (numbers of cells), N windows,
K cells along a window, E embedding, M mask side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import conv_upsampled
from ..image_pyramid.refinement import module_channels
from .feature_table import FeatureTable

# Side of a mask before refinement (FPN, section 6).
COARSE_SIDE = 14


class WindowScores(nn.Module):
    """Scores of windows, from the window's own cells alone: of all windows at once, or of some that were cut out, which is the same."""

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

    def start_rare(self) -> None:
        """Let untrained scores say that one window in a hundred is positive, as a focal loss needs it (RetinaNet, section 3.3)."""
        for predictor in self.predictors:
            nn.init.constant_(predictor[-1].bias, -math.log(99))

    def of_windows(self, cells: Tensor, inside: Tensor, kind: int) -> Tensor:
        """
        Args:
            cells: (N, K, K, C) of windows of one kind.
            inside: (N, K, K), 1 where a cell belongs to its image, else 0.
            kind: which.

        Returns:
            (N,) logits.
        """
        x = F.linear(cells, self.reduce.weight.flatten(1), self.reduce.bias).relu() * inside[..., None]
        template = self.templates[kind]
        x = (x * template.weight[:, 0].permute(1, 2, 0)).sum(dim=(1, 2)) + template.bias
        return self.predictors[kind](x.relu()[:, :, None, None])[:, 0, 0, 0]


class PyramidRefinement(nn.Module):
    """A refinement module in the refactored form (SharpMask, section 3.2) for a feature pyramid.

    Its skip path is 1x1 convolutions, as those of the pyramid have looked around already, and so is the same for every window. Borders are
    zeros: features end with the window here, which is no image.
    """

    def __init__(self, feature_channels: int, in_channels: int, out_channels: int):
        """
        Args:
            feature_channels: C.
            in_channels, out_channels: k of this module and of the next.
        """
        super().__init__()
        self.vertical = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.horizontal = nn.Sequential(
            nn.Conv2d(feature_channels, in_channels, 1), nn.ReLU(), nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, encoding: Tensor, skip: Tensor) -> Tensor:
        """
        Args:
            encoding: (N, k, m, m), or of half the side: what the module before gave, upsampled here.
            skip: (N, k', m, m), what `horizontal` made of the skip feature.

        Returns:
            (N, k', m, m), not yet upsampled.
        """
        halved = encoding.shape[-1] < skip.shape[-1]
        vertical = conv_upsampled(encoding, self.vertical) if halved else self.vertical(encoding)
        return (vertical + skip).relu_()


class WindowDecoder(nn.Module):
    """From the cells of a window to its embedding, and from there to its mask and to the mask's quality.

    The coarse mask is 14 x 14; each refinement module doubles it with skip features of a finer level, those of the window's own level
    halved once, twice ..., or of the finest.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        window_cells: list,
        embed_dim: int,
        num_refinements: int,
        channels: int,
        schedule: str,
        quality: bool,
    ):
        """
        Args:
            in_channels: C.
            window_cells: K of each kind of window, odd.
            embed_dim: E.
            num_refinements: refinement modules: 0, 1 or 2 for masks of 14, 28 or 56.
            channels, schedule: see `refinement.module_channels`.
            quality: predict the mask's IoU.
        """
        super().__init__()
        self.window_cells = list(window_cells)
        self.embed = nn.ModuleList(nn.Linear(cells * cells * in_channels, embed_dim) for cells in window_cells)
        widths = module_channels(channels, schedule, num_refinements) if num_refinements else [1]
        self.start = nn.Linear(embed_dim, widths[0] * COARSE_SIDE**2)
        self.steps = nn.ModuleList(PyramidRefinement(in_channels, k, k_next) for k, k_next in zip(widths, widths[1:]))
        self.to_mask = nn.Conv2d(widths[-1], 1, 3, padding=1) if num_refinements else None
        self.quality = None
        if quality:
            self.quality = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, 1))
        self.mask_size = COARSE_SIDE * 2**num_refinements

    def embeddings(self, cells: list) -> Tensor:
        """Embeddings of windows.

        Args:
            cells: for each kind of window (n, K, K, C); N windows together.

        Returns:
            (N, E), kind by kind.
        """
        return torch.cat([embed(x.flatten(1)) for x, embed in zip(cells, self.embed)]).relu()

    def horizontal(self, features: list, extents: Tensor, strides: list) -> list:
        """The skip path, once per image: a FeatureTable for each refinement module.

        Args:
            features: L maps (B, C, Y, X), fine to coarse.
            extents, strides: see `FeatureTable`.
        """
        # No window looks for skip features on the coarsest level, unless it is the only one.
        used = features[:-1] or features
        return [FeatureTable([step.horizontal(x) for x in used], extents, strides[: len(used)]) for step in self.steps]

    def masks(self, embeddings: Tensor, skips: list, images: Tensor, levels: Tensor, windows: Tensor) -> Tensor:
        """
        Args:
            embeddings: (N, E).
            skips: from `horizontal`.
            images, levels: (N,) int64.
            windows: (N, 4) XYXY in the frame of the image, in pixels.

        Returns:
            (N, M, M) logits.
        """
        encoding = self.start(embeddings).unflatten(1, (COARSE_SIDE, COARSE_SIDE, -1)).permute(0, 3, 1, 2)
        if self.to_mask is None:
            return encoding[:, 0]
        for number, (step, skip) in enumerate(zip(self.steps, skips)):
            finer = (levels - number - 1).clamp(min=0)
            encoding = step(encoding, skip.sample(images, finer, windows, COARSE_SIDE * 2**number))
        return conv_upsampled(encoding, self.to_mask)[:, 0]


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
        # Sums over padded squares, so that a cell at the border is not diluted by what is outside.
        odd = 0, total.shape[3] % 2, 0, total.shape[2] % 2
        total, weight = (4 * F.avg_pool2d(F.pad(x, odd), 2) for x in (total, weight))
        levels.append(total / weight.clamp(min=1))
        total, weight = levels[-1] * (weight > 0), (weight > 0).to(weight.dtype)
    return levels
