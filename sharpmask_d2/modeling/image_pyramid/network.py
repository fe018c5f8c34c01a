"""The network: trunk, head and mask branch; windows of a full image and patches take the same path.

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
    """What is computed once per image: score logits (B, Y, X), embeddings (B, E, Y, X), and the trunk's features by name."""

    scores: Tensor
    embeddings: Tensor
    features: dict

    def of_image(self, number: int) -> "WindowGrid":
        """That of one image of the batch, B = 1."""
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
        pixel_mean: list,
        pixel_std: list,
        resizing: str = "antialiased",
        freeze_feedforward: bool = False,
    ):
        """
        Args:
            trunk: gives `in_feature` and the mask branch's skip features.
            in_feature: name of the feature that the head reads.
            head: scores and embeddings.
            mask_branch: `CoarseMask` or a refinement path.
            window_size: W in pixels.
            context: pixels of context around a patch, both sides together.
            pixel_mean, pixel_std: of the input in 0..255, in the network's channel order.
            resizing: "antialiased" or "released" (see `resizing.resize`); what holds this network resizes its images and masks so.
            freeze_feedforward: train the refinement path only.

        Raises:
            ValueError: sizes that do not fit the strides, an unknown resizing, or nothing to train.
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
        """What the sides of a full image have to be multiples of; 1 if anything goes."""
        return max(1, self.trunk.size_divisibility)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.freeze_feedforward:
            # Frozen also means no dropout and no new running statistics.
            self.trunk.eval()
            self.head.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..255, in the network's channel order, to the trunk's input."""
        mean, std = (_row(x, images.shape[3]) for x in (self.pixel_mean, self.pixel_std))
        return (images - mean).div_(std)

    def forward(self, patches: Tensor) -> tuple:
        """Scores and masks of patches.

        Args:
            patches: (B, 3, P, P) in 0..255, each a window with its context around it.

        Returns:
            score logits (B,) and mask logits (B, M, M).

        Raises:
            ValueError: patches of another size.
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
        """Everything of a full image that its windows share, but for the skip path.

        Args:
            images: (B, 3, H, W) in 0..255 with borders of half a window (see `windows.level_padding`), sides multiples of
                `size_divisibility`.

        Returns:
            WindowGrid, in which cell (y, x) is the window at pixels [stride y, stride y + W) x [stride x, stride x + W) of `images`.
        """
        return self.grid_from_features(self.trunk(self.normalize(images)))

    def grid_from_features(self, features: dict) -> WindowGrid:
        """The same from features that are there already.

        Args:
            features: name -> (B, C, h, w), with borders of half a window in cells of the feature.
        """
        if self.freeze_feedforward:
            # A detector's own features learn from nothing here either.
            features = {name: x.detach() for name, x in features.items()}
        scores, embeddings = self.head(features[self.in_feature])
        return WindowGrid(scores, embeddings, features)

    @torch.no_grad()
    def rescore(self, grid: WindowGrid) -> WindowGrid:
        """A grid made in training with the scores of evaluation, which know no dropout."""
        if not self.head.training:
            return grid
        with evaluating(self.head):
            return grid._replace(scores=self.head(grid.features[self.in_feature])[0])

    def masks(self, grid: WindowGrid, images: Tensor, ys: Tensor, xs: Tensor, *, windows_per_batch: int) -> Tensor:
        """Masks of chosen windows.

        Args:
            grid: from `grid`.
            images, ys, xs: (N,) image, row and column of each window.
            windows_per_batch: how many windows are refined at a time.

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
        """The same batch by batch: see `masks`."""
        cuts = [
            _window_view(skip, self.window_size // stride, self.stride // stride, grid.scores.shape[1:])
            for stride, skip in zip(self.mask_branch.skip_strides, self.mask_branch.horizontal(grid.features))
        ]
        for image, y, x in zip(*(index.split(windows_per_batch) for index in (images, ys, xs))):
            skips = [cut[image, y, x].permute(0, 3, 1, 2) for cut in cuts]
            # Indices around a slice put the window first: N x E.
            yield self.mask_branch(grid.embeddings[image, :, y, x], skips)


class GivenFeatures(Backbone):
    """In the place of a trunk: declares features that something else computes (see `SharpMaskNetwork.grid_from_features`)."""

    def __init__(self, shapes: dict):
        """
        Args:
            shapes: name -> ShapeSpec.
        """
        super().__init__()
        self._shapes = dict(shapes)

    def forward(self, x: Tensor) -> dict:
        raise NotImplementedError("this network has no trunk: it reads the features of a detector's backbone")

    def output_shape(self) -> dict:
        return self._shapes


@contextmanager
def evaluating(module: nn.Module):
    """A context in which the module is in evaluation mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _row(x: Tensor, width: int) -> Tensor:
    """(C, 1, 1) to (C, 1, width), channels last in memory: in that layout, loops over three channels alone are slow."""
    return x.expand(-1, 1, width).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _window_view(x: Tensor, size: int, step: int, grid_size: tuple) -> Tensor:
    """(B, C, h, w) -> a view (B, Y, X, size, size, C): the part of the map under every window, whose rows lie together in memory."""
    short = [max(0, step * (cells - 1) + size - side) for cells, side in zip(grid_size, x.shape[2:])]
    if any(short):
        # The coarse grid covers up to a stride more than the image has; that part is border, and empty as in the released code.
        x = F.pad(x, (0, short[1], 0, short[0]))
    windows = x.unfold(2, size, step).unfold(3, size, step)  # B, C, Y, X, size, size
    return windows.permute(0, 2, 3, 4, 5, 1)


def check_window_size(window_size: int, context: int, stride: int) -> None:
    """Raises ValueError unless windows and context are made of whole cells of the grid."""
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
            form=refinement.FORM,
            vertical_convs=refinement.VERTICAL_CONVS,
            horizontal_convs=refinement.HORIZONTAL_CONVS,
            upsampling=refinement.UPSAMPLING,
        )
    raise UserError(
        f"MODEL.SHARPMASK.REFINEMENT.NAME is {refinement.NAME!r}: choose 'none', 'sharpmask', 'skip' or 'multiscale'"
    )
