"""The network of DeepMask and SharpMask: trunk, head and mask branch. Windows of a full image and patches take one path.

Shape letters: B images or patches, H W height and width in pixels, Y X grid of windows, E embedding, N windows, M mask side, P side of a
patch (window and context).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ...errors import UserError
from .heads import CoarseMask, WindowHead
from .refinement import MultiscaleRefinement, SharpMaskRefinement, SkipRefinement
from .resizing import RESIZINGS


class WindowGrid(NamedTuple):
    """What the network computes once per image of a level: its score for every window, and what masks of any windows are made from.

    Attributes:
        scores: (B, Y, X) score logits.
        embeddings: (B, E, Y, X).
        features: name -> (B, C, h, w), of the trunk.
    """

    scores: Tensor
    embeddings: Tensor
    features: dict[str, Tensor]

    def of_image(self, number: int) -> "WindowGrid":
        """The grid of image `number` of the batch, with B = 1."""
        own = slice(number, number + 1)
        return WindowGrid(self.scores[own], self.embeddings[own], {name: x[own] for name, x in self.features.items()})


class SharpMaskNetwork(nn.Module):
    """DeepMask, or SharpMask with a refinement path (SharpMask, sections 3.1 to 3.3)."""

    @configurable
    def __init__(
        self,
        *,
        trunk: Backbone,
        in_feature: str,
        head: WindowHead,
        mask_branch: nn.Module,
        window_size: int,
        context: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        resizing: str = "antialiased",
        freeze_feedforward: bool = False,
    ):
        """
        Args:
            trunk: backbone that returns `in_feature` and the mask branch's skip features.
            in_feature: name of the feature that the head reads.
            head: computes scores and embeddings.
            mask_branch: `CoarseMask` or one of the classes of `refinement`.
            window_size: side W of a window in pixels of its level, a multiple of the stride of `in_feature`.
            context: pixels of context around a patch, both sides together, a multiple of twice that stride.
            pixel_mean, pixel_std: 3 floats each, of the input in 0..255, in the network's channel order.
            resizing: "antialiased" (default) or "released" (see `resizing.resize`), for the images and masks of whoever holds this network.
            freeze_feedforward: train the mask branch only, the second stage of SharpMask's training; default: False.

        Raises:
            UserError: sizes that do not fit the strides, an unknown resizing, or nothing to train; the message names the config key.
        """
        super().__init__()
        self.trunk, self.head, self.mask_branch = trunk, head, mask_branch
        self.in_feature = in_feature
        self.window_size, self.context = window_size, context
        self.strides = {name: shape.stride for name, shape in trunk.output_shape().items()}
        self.stride = self.strides[in_feature]
        check_window_size(window_size, context, self.stride)
        if resizing not in RESIZINGS:
            raise UserError(f"MODEL.SHARPMASK.RESIZING is {resizing!r}: choose from {RESIZINGS}")
        self.resizing = resizing
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.freeze_feedforward = freeze_feedforward
        if freeze_feedforward:
            if not mask_branch.skip_features:
                raise UserError(
                    "MODEL.SHARPMASK.FREEZE_FEEDFORWARD is set, but REFINEMENT.NAME is 'none': nothing is left to train"
                )
            trunk.requires_grad_(False)
            head.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg, trunk=None):
        sharpmask = cfg.MODEL.SHARPMASK
        if trunk is None:
            trunk = BACKBONE_REGISTRY.get(sharpmask.TRUNK.NAME)(cfg, ShapeSpec(channels=3))
        shapes = trunk.output_shape()
        stride = shapes[sharpmask.IN_FEATURE].stride
        check_window_size(sharpmask.WINDOW_SIZE, sharpmask.CONTEXT, stride)
        head = WindowHead(
            variant=sharpmask.HEAD,
            in_channels=shapes[sharpmask.IN_FEATURE].channels,
            window_cells=sharpmask.WINDOW_SIZE // stride,
            reduced_channels=sharpmask.REDUCED_CHANNELS,
            embed_dim=sharpmask.EMBED_DIM,
            score_dim=sharpmask.SCORE_DIM,
        )
        return {
            "trunk": trunk,
            "in_feature": sharpmask.IN_FEATURE,
            "head": head,
            "mask_branch": _build_mask_branch(sharpmask, shapes),
            "window_size": sharpmask.WINDOW_SIZE,
            "context": sharpmask.CONTEXT,
            "pixel_mean": sharpmask.PIXEL_MEAN,
            "pixel_std": sharpmask.PIXEL_STD,
            "resizing": sharpmask.RESIZING,
            "freeze_feedforward": sharpmask.FREEZE_FEEDFORWARD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def size_divisibility(self) -> int:
        """What the sides of a full image, in pixels, have to be multiples of; 1 if every size works."""
        return max(1, self.trunk.size_divisibility)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.freeze_feedforward:
            # Frozen also means no dropout and no new running statistics.
            self.trunk.eval()
            self.head.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in 0..255, in the network's channel order, as the trunk reads them: (B, 3, H, W)."""
        mean, std = (_row(x, images.shape[3]) for x in (self.pixel_mean, self.pixel_std))
        return (images - mean).div_(std)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and masks of patches.

        Args:
            patches: (B, 3, P, P) in 0..255, in the network's channel order, each a window with its context around it.

        Returns:
            score logits (B,) and mask logits (B, M, M) of the windows, without the context.

        Raises:
            UserError: patches of another size.
        """
        side = self.window_size + self.context
        if patches.shape[-2:] != (side, side):
            raise UserError(
                f"patches are {tuple(patches.shape[-2:])} pixels, but window and context make {side} x {side}"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_feedforward):
            features = {name: self._crop_context(x, name) for name, x in self.trunk(self.normalize(patches)).items()}
            scores, embeddings = self.head(features[self.in_feature])
        # A patch is its own grid of one window, whose skip maps need no cutting.
        masks = self.mask_branch(embeddings.flatten(1), self.mask_branch.horizontal(features))
        return scores.flatten(), masks

    def _crop_context(self, x: Tensor, name: str) -> Tensor:
        crop = self.context // 2 // self.strides[name]
        return x[:, :, crop : x.shape[2] - crop, crop : x.shape[3] - crop]

    def grid(self, images: Tensor) -> WindowGrid:
        """Everything that the windows of full images share, except for the skip path.

        Args:
            images: (B, 3, H, W) in 0..255, in the network's channel order, with borders of half a window (see `levels.level_padding`); the
                sides are multiples of `size_divisibility`.

        Returns:
            WindowGrid, in which cell (y, x) is the window at pixels [S y, S y + W) x [S x, S x + W) of `images`, with S the network's
            `stride`.
        """
        return self.grid_from_features(self.trunk(self.normalize(images)))

    def grid_from_features(self, features: dict[str, Tensor]) -> WindowGrid:
        """The grid of images whose features are computed elsewhere, such as by a detector's backbone.

        Args:
            features: name -> (B, C, h, w), with borders of half a window in cells of the feature.

        Returns:
            WindowGrid (see `grid`).
        """
        if self.freeze_feedforward:
            # No gradient reaches a detector's features either.
            features = {name: x.detach() for name, x in features.items()}
        scores, embeddings = self.head(features[self.in_feature])
        return WindowGrid(scores, embeddings, features)

    @torch.no_grad()
    def rescore(self, grid: WindowGrid) -> WindowGrid:
        """A grid that was computed in training, with scores as in evaluation, without dropout.

        Args:
            grid: from `grid`.

        Returns:
            WindowGrid, of which only `scores` differ.
        """
        if not self.head.training:
            return grid
        with evaluating(self.head):
            return grid._replace(scores=self.head(grid.features[self.in_feature])[0])

    def masks(self, grid: WindowGrid, images: Tensor, ys: Tensor, xs: Tensor, *, windows_per_batch: int) -> Tensor:
        """Masks of chosen windows.

        Args:
            grid: from `grid`.
            images, ys, xs: (N,) int64, number of the image, row and column of each window.
            windows_per_batch: number of windows that are refined at a time, which bounds the memory.

        Returns:
            (N, M, M) mask logits.
        """
        masks = list(self.mask_batches(grid, images, ys, xs, windows_per_batch=windows_per_batch))
        if not masks:
            return grid.scores.new_zeros((0, self.mask_branch.mask_size, self.mask_branch.mask_size))
        return torch.cat(masks)

    def mask_batches(
        self, grid: WindowGrid, images: Tensor, ys: Tensor, xs: Tensor, *, windows_per_batch: int
    ) -> Iterator[Tensor]:
        """Iterate over the masks of chosen windows in batches (n, M, M), n <= `windows_per_batch`. Arguments: see `masks`."""
        cuts = [
            _window_view(skip, self.window_size // stride, self.stride // stride, grid.scores.shape[1:])
            for stride, skip in zip(self.mask_branch.skip_strides, self.mask_branch.horizontal(grid.features))
        ]
        for image, y, x in zip(*(index.split(windows_per_batch) for index in (images, ys, xs))):
            skips = [cut[image, y, x].permute(0, 3, 1, 2) for cut in cuts]
            # Indices around a slice put the window first: N x E.
            yield self.mask_branch(grid.embeddings[image, :, y, x], skips)


class GivenFeatures(Backbone):
    """Takes the place of a trunk where features are computed elsewhere, and declares them (see `SharpMaskNetwork.grid_from_features`)."""

    def __init__(self, shapes: dict[str, ShapeSpec]):
        """
        Args:
            shapes: name -> ShapeSpec of the features.
        """
        super().__init__()
        self._shapes = dict(shapes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError("this network has no trunk: it reads the features of a detector's backbone")

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


@contextmanager
def evaluating(module: nn.Module):
    """A context in which `module` is in evaluation mode; afterwards it is in the mode that it was in before."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _row(x: Tensor, width: int) -> Tensor:
    """(C, 1, 1) to (C, 1, width), channels last in memory: in this layout, loops over nothing but three channels are slow."""
    return x.expand(-1, 1, width).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _window_view(x: Tensor, size: int, step: int, grid_size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) as a view (B, Y, X, size, size, C): the part of the map under every window, whose rows are contiguous in memory."""
    short = [max(0, step * (cells - 1) + size - side) for cells, side in zip(grid_size, x.shape[2:])]
    if any(short):
        # The coarse grid covers up to a stride more than the image has; that part is border, and zero as in the released code.
        x = F.pad(x, (0, short[1], 0, short[0]))
    windows = x.unfold(2, size, step).unfold(3, size, step)  # B, C, Y, X, size, size
    return windows.permute(0, 2, 3, 4, 5, 1)


def check_window_size(window_size: int, context: int, stride: int) -> None:
    """Check that windows and context consist of whole cells of the grid.

    Args:
        window_size, context: in pixels of the level.
        stride: of the grid, in pixels of the level.

    Raises:
        UserError: they do not; the message names the config key.
    """
    if window_size % stride:
        raise UserError(
            f"MODEL.SHARPMASK.WINDOW_SIZE is {window_size}: it must be a multiple of the stride of IN_FEATURE, {stride}"
        )
    if context % (2 * stride):
        raise UserError(
            f"MODEL.SHARPMASK.CONTEXT is {context}: it must be a multiple of twice the stride of IN_FEATURE, {2 * stride}"
        )


def _build_mask_branch(sharpmask, shapes: dict) -> nn.Module:
    refinement = sharpmask.REFINEMENT
    if refinement.NAME == "none":
        return CoarseMask(embed_dim=sharpmask.EMBED_DIM, mask_size=sharpmask.COARSE_MASK_SIZE)
    common = {
        "features": {name: shapes[name] for name in refinement.SKIP_FEATURES},
        "embed_dim": sharpmask.EMBED_DIM,
        "window_size": sharpmask.WINDOW_SIZE,
    }
    if refinement.NAME == "skip":
        return SkipRefinement(**common)
    if refinement.NAME == "multiscale":
        return MultiscaleRefinement(**common)
    if refinement.NAME == "sharpmask":
        return SharpMaskRefinement(
            **common,
            channels=refinement.CHANNELS,
            schedule=refinement.SCHEDULE,
            vertical_convs=refinement.VERTICAL_CONVS,
            horizontal_convs=refinement.HORIZONTAL_CONVS,
            upsampling=refinement.UPSAMPLING,
        )
    raise UserError(
        f"MODEL.SHARPMASK.REFINEMENT.NAME is {refinement.NAME!r}: choose 'none', 'sharpmask', 'skip' or 'multiscale'"
    )
