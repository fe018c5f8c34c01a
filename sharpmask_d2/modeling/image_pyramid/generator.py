"""Segment proposals from an image pyramid (DeepMask, section 3.3; SharpMask, section 3.3).

Shape letters: B images, H W height and width of an image in pixels, h w of a level, N proposals, M mask side in cells.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.structures import Instances
from torch import Tensor

from ...data.patch_mapper import PADDING_VALUE
from ...errors import UserError
from ...windows.geometry import corner_aligned
from ..segment_generator import SegmentGenerator, Windows
from .levels import Level, cell_windows, grid_shifts, level_padding, pyramid_levels, split_cells
from .network import SharpMaskNetwork, WindowGrid
from .resizing import resize


class GridFeatures(NamedTuple):
    """What a generator on an image pyramid computes once per batch of equally sized images."""

    # Levels of the images.
    levels: list[Level]
    # One grid per level, of all images of the batch.
    grids: list[WindowGrid]
    # (H, W) of each image in pixels.
    image_sizes: list[tuple[int, int]]


class ImagePyramid(SegmentGenerator):
    """Segment proposals of images: one pass of the trunk per level, then masks for the windows of highest score over all levels.

    The stand-alone network and the proposal generator of detectors both hold one.
    """

    @configurable
    def __init__(self, *, network: SharpMaskNetwork, exponents: list[float], grid_stride: int, **settings):
        """
        Args:
            network: DeepMask or SharpMask.
            exponents: scales of the levels, as exponents of 2.
            grid_stride: distance of neighbouring windows in pixels of the level, a divisor of the network's stride.
            settings: see `SegmentGenerator`.

        Raises:
            UserError: see `SegmentGenerator`; or a grid stride that does not divide the network's; the message names the config key.
        """
        super().__init__(**settings)
        self.network = network
        self.exponents = list(exponents)
        self.shifts = grid_shifts(network.stride, grid_stride)

    @classmethod
    def from_config(cls, cfg, trunk=None):
        return {
            "network": SharpMaskNetwork(cfg, trunk=trunk),
            "exponents": cfg.MODEL.SHARPMASK.TEST.SCALES,
            "grid_stride": cfg.MODEL.SHARPMASK.GRID_STRIDE,
            **cls.test_settings(cfg),
        }

    def forward(self, images: Tensor) -> list[Instances]:
        """Generates proposals for a batch of equally sized images.

        Args:
            images: (B, 3, H, W) in 0..255, in the network's channel order.

        Returns:
            One `Instances` per image in the frame of the image: see `SegmentGenerator.postprocess`.

        Raises:
            UserError: the images have no pixels.
        """
        return self.propose(self.encode(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> GridFeatures:
        """Runs the network on all levels of a batch of equally sized images.

        Each level runs through the trunk once for the whole batch, so peak memory grows linearly with the batch size.

        Args:
            images: see `forward`.

        Raises:
            UserError: the images have no pixels.
        """
        height, width = images.shape[2:]
        if 0 in (height, width):
            raise UserError(f"the image has no pixels: its size is {(height, width)} (height, width)")
        levels = self.levels((height, width))
        # The largest level first: it needs the most memory, and nothing of the others is kept yet.
        grids = [self.level_grid(images, level) for level in reversed(levels)][::-1]
        return GridFeatures(levels, grids, [(height, width)] * len(images))

    def select(self, features: GridFeatures) -> list[Windows]:
        """Selects the windows of highest score over all levels: see `SegmentGenerator.select`."""
        network, selected = self.network, []
        for image in range(len(features.image_sizes)):
            scores = torch.cat([grid.scores[image].flatten() for grid in features.grids]).float()
            scores, cells = scores.topk(min(self.num_proposals, len(scores)))
            boxes = scores.new_empty((len(scores), 4))
            for level, (ys, xs), places in zip(features.levels, *_by_level(features, cells)):
                boxes[places] = cell_windows(level, ys, xs, network.window_size, network.stride)
            if network.resizing == "released":
                boxes = corner_aligned(boxes, network.mask_branch.mask_size)
            selected.append(Windows(boxes, scores, image, cells=cells))
        return selected

    def decode(self, features: GridFeatures, windows: Windows) -> Tensor:
        """Decodes the masks of windows that `select` returned: see `SegmentGenerator.decode`.

        Raises:
            UserError: windows that are not of the grids.
        """
        if windows.cells is None:
            raise UserError(
                "a network on an image pyramid decodes the windows of its grids only: use a model on a feature pyramid for other windows"
            )
        logits = None
        for grid, (ys, xs), places in zip(features.grids, *_by_level(features, windows.cells)):
            if len(ys) == 0:
                continue
            own = grid.of_image(windows.image)
            batches = self.network.mask_batches(
                own, torch.zeros_like(ys), ys, xs, windows_per_batch=self.windows_per_batch
            )
            for batch, batch_places in zip(batches, places.split(self.windows_per_batch)):
                logits = batch.new_empty((len(windows.cells), *batch.shape[1:])) if logits is None else logits
                logits[batch_places] = batch
        return logits

    def levels(self, image_size: tuple[int, int], octaves: float = 0.0) -> list[Level]:
        """The levels of an image.

        Args:
            image_size: (height, width) of the image in pixels.
            octaves: added to the exponent of every level; default: 0.

        Returns:
            list[Level] (see `levels.pyramid_levels`).
        """
        return pyramid_levels(image_size, [exponent + octaves for exponent in self.exponents], self.shifts)

    def level_grid(self, images: Tensor, level) -> WindowGrid:
        """Run the network on a level of images.

        Args:
            images: (B, 3, H, W) in 0..255, in the network's channel order.
            level: one of `levels`.

        Returns:
            WindowGrid.
        """
        return self.network.grid(self.level_image(images, level))

    def level_image(self, images: Tensor, level) -> Tensor:
        """Resize images to a level and add the border that its windows need.

        Args:
            images: (B, 3, H, W) in 0..255, in the network's channel order.
            level: one of `levels`.

        Returns:
            (B, 3, h, w) float32 in 0..255, channels last in memory.
        """
        resized = resize(images.float(), level.size, self.network.resizing)
        padding = level_padding(level, self.network.window_size, self.network.size_divisibility)
        padded = F.pad(resized, padding, value=PADDING_VALUE)
        return padded.contiguous(memory_format=torch.channels_last)


def _by_level(features: GridFeatures, cells: Tensor) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """Rows and columns of cells (N,), level by level, and the places in `cells` of each level's."""
    ascending, order = cells.sort()
    split = split_cells(ascending, [tuple(grid.scores.shape[1:]) for grid in features.grids])
    return split, order.split([len(ys) for ys, _ in split])
