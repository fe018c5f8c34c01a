"""Masks of windows from their embeddings and skip features: SharpMask's refinement path and the two baselines that the paper compares.

Every mask branch has two halves: `horizontal` runs once per image on whole maps, `forward` runs for the chosen windows only.

Shape letters: B images, h w height and width of a map, N windows, E embedding, K window side in cells of the coarsest skip feature, k_f
channels of a skip feature, k = k_m = k_s channels of a refinement module, m side of a module's maps in cells (K, 2K, 4K ...), M side of
the mask in cells.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...errors import UserError
from ..layers import MirroredConv2d, conv_upsampled

# Channels of the first convolution on the skip path, as in the released code; a stride-2 feature gets half.
_SKIP_CHANNELS = 64


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return MirroredConv2d(nn.Conv2d(in_channels, out_channels, 3, padding=1))


def _chain(channels: list[int]) -> nn.Sequential:
    """3x3 convolutions through the channel counts given, with ReLU between them and none after the last."""
    layers = []
    for before, after in zip(channels, channels[1:]):
        layers += [_conv3x3(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _skip_path(feature: ShapeSpec, hidden: int, out_channels: int, num_convs: int) -> nn.Sequential:
    hidden_channels = [_SKIP_CHANNELS if feature.stride > 2 else _SKIP_CHANNELS // 2, hidden][3 - num_convs :]
    return _chain([feature.channels, *hidden_channels, out_channels])


def module_channels(channels: int, schedule: str, num_modules: int) -> list[int]:
    """Channels k of every refinement module, and of the map that the last one returns (SharpMask, section 3.2).

    Args:
        channels: k of the first module.
        schedule: "a", the same k in every module; or "b", half as many from module to module.
        num_modules: number of modules.

    Returns:
        `num_modules` + 1 ints, coarse to fine.

    Raises:
        UserError: an unknown schedule, or channels that cannot be halved so often.
    """
    if schedule == "a":
        return [channels] * (num_modules + 1)
    if schedule != "b":
        raise UserError(f"MODEL.SHARPMASK.REFINEMENT.SCHEDULE is {schedule!r}: choose 'a' or 'b'")
    if channels % 2**num_modules:
        raise UserError(f"MODEL.SHARPMASK.REFINEMENT.CHANNELS is {channels}: {num_modules} modules cannot halve it")
    return [channels // 2**i for i in range(num_modules + 1)]


class RefinementModule(nn.Module):
    """One step of the refinement path: M' = R(M, F) at twice the resolution, in the refactored form (SharpMask, section 3.2).

    A convolution of the concatenated mask encoding and skip feature equals the sum of two convolutions, one of each. The one of the skip
    feature is the last of `horizontal`, which therefore runs once per image. Upsampling is left to the next module or to the last
    convolution of the path, which does it together with its first convolution.
    """

    def __init__(
        self,
        feature: ShapeSpec,
        in_channels: int,
        out_channels: int,
        *,
        vertical_convs: int,
        horizontal_convs: int,
        upsampling: str,
    ):
        """
        Args:
            feature: channels k_f and stride (in pixels) of the skip feature.
            in_channels: k of this module.
            out_channels: k of the next module.
            vertical_convs: number of 3x3 convolutions on the mask path: 1 in the paper, 2 in the released code.
            horizontal_convs: number of 3x3 convolutions on the skip path: 2 in the paper, 3 in the released code.
            upsampling: "nearest" (released code) or "bilinear" (paper), of an encoding that comes at half the resolution.
        """
        super().__init__()
        self.upsampling = upsampling
        # No Sequential: the first convolution may read a map that is not upsampled yet.
        self.vertical = nn.ModuleList(_chain([in_channels] * vertical_convs + [out_channels]))
        self.horizontal = _skip_path(feature, in_channels, out_channels, horizontal_convs)

    def forward(self, encoding: Tensor, skip: Tensor) -> Tensor:
        """
        Args:
            encoding: M, (N, k, m, m); or (N, k, m / 2, m / 2) as the module before returns it, which is upsampled here.
            skip: (N, k', m, m), the window cut out of what `horizontal` makes of the skip feature F.

        Returns:
            (N, k', m, m), M' before its upsampling.
        """
        first, *others = self.vertical
        if encoding.shape[-1] < skip.shape[-1]:
            encoding = _upsample_and_convolve(encoding, first, self.upsampling)
        else:
            encoding = first(encoding)
        for layer in others:
            encoding = layer(encoding)
        return (encoding + skip).relu_()


def _upsample_and_convolve(x: Tensor, conv: nn.Conv2d, upsampling: str) -> Tensor:
    """(N, k, m, m) to what `conv` makes of x at (N, k, 2m, 2m)."""
    if upsampling == "nearest":
        return conv_upsampled(x, conv)
    return conv(_upsample_bilinearly(x))


def _upsample_bilinearly(x: Tensor) -> Tensor:
    """(N, k, m, m) to (N, k, 2m, 2m)."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class _MaskBranch(nn.Module):
    """What the mask branches share: the linear layer from the embedding to the first map, and the names of the skip features."""

    def __init__(self, features: dict[str, ShapeSpec], embed_dim: int, channels: int, window_size: int):
        super().__init__()
        specs = list(features.values())
        for name, coarse, fine in zip(list(features)[1:], specs, specs[1:]):
            if coarse.stride != 2 * fine.stride:
                raise UserError(
                    f"MODEL.SHARPMASK.REFINEMENT.SKIP_FEATURES: {name} has stride {fine.stride}, "
                    f"which is not half of the {coarse.stride} before it"
                )
        self.skip_features = tuple(features)
        # Pixels of the level along a cell of each map that `horizontal` returns.
        self.skip_strides = [spec.stride for spec in specs]
        self.side = window_size // specs[0].stride
        self.mask_size = 2 * window_size // specs[-1].stride
        self.start = nn.Linear(embed_dim, channels * self.side * self.side)

    def first(self, embeddings: Tensor) -> Tensor:
        """(N, E) to the first map M^1, (N, k, K, K)."""
        return self.start(embeddings).view(len(embeddings), -1, self.side, self.side)


class SharpMaskRefinement(_MaskBranch):
    """The refinement path: a linear layer to M^1, a refinement module per skip feature, and a 3x3 convolution to the mask (SharpMask,
    section 3.2)."""

    def __init__(
        self,
        *,
        features: dict[str, ShapeSpec],
        embed_dim: int,
        window_size: int,
        channels: int,
        schedule: str,
        vertical_convs: int,
        horizontal_convs: int,
        upsampling: str,
    ):
        """
        Args:
            features: name -> ShapeSpec of the skip features, coarse to fine, each with half the stride of the one before.
            embed_dim: E.
            window_size: side of a window in pixels of its level.
            channels: k of the first module.
            schedule: "a" or "b" (see `module_channels`).
            vertical_convs, horizontal_convs, upsampling: see `RefinementModule`.

        Raises:
            UserError: an option that is none of those named there, or strides that are not halved; the message names the config key.
        """
        if upsampling not in ("nearest", "bilinear"):
            raise UserError(f"MODEL.SHARPMASK.REFINEMENT.UPSAMPLING is {upsampling!r}: choose 'nearest' or 'bilinear'")
        if vertical_convs not in (1, 2) or horizontal_convs not in (2, 3):
            raise UserError("MODEL.SHARPMASK.REFINEMENT: VERTICAL_CONVS is 1 or 2, HORIZONTAL_CONVS is 2 or 3")
        ks = module_channels(channels, schedule, len(features))
        super().__init__(features, embed_dim, ks[0], window_size)
        options = {"vertical_convs": vertical_convs, "horizontal_convs": horizontal_convs, "upsampling": upsampling}
        self.steps = nn.ModuleList(
            RefinementModule(feature, k, k_next, **options) for feature, k, k_next in zip(features.values(), ks, ks[1:])
        )
        self.to_mask, self.upsampling = _conv3x3(ks[-1], 1), upsampling

    def horizontal(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Run the skip path, once per image.

        Args:
            features: name -> (B, k_f, h, w).

        Returns:
            list of (B, k', h, w), coarse to fine, cells of which are `skip_strides` pixels wide.
        """
        return [step.horizontal(features[name]) for name, step in zip(self.skip_features, self.steps)]

    def forward(self, embeddings: Tensor, skips: list[Tensor]) -> Tensor:
        """
        Args:
            embeddings: (N, E).
            skips: list of (N, k', m, m), coarse to fine, the windows cut out of what `horizontal` returned.

        Returns:
            (N, M, M) mask logits of the windows.
        """
        encoding = self.first(embeddings)
        for step, skip in zip(self.steps, skips):
            encoding = step(encoding, skip)
        return _upsample_and_convolve(encoding, self.to_mask, self.upsampling)[:, 0]


class SkipRefinement(_MaskBranch):
    """Baseline "skip" of the paper's figure 1: a one-channel mask to which every skip feature adds, without convolutions top-down."""

    def __init__(self, *, features: dict[str, ShapeSpec], embed_dim: int, window_size: int):
        """
        Args:
            features: name -> ShapeSpec of the skip features, coarse to fine, each with half the stride of the one before.
            embed_dim: E.
            window_size: side of a window in pixels of its level.

        Raises:
            UserError: strides that are not halved.
        """
        super().__init__(features, embed_dim, 1, window_size)
        self.predictors = nn.ModuleList(_skip_path(feature, 16, 1, 3) for feature in features.values())

    def horizontal(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Predict a one-channel map from each skip feature, once per image.

        Args:
            features: name -> (B, k_f, h, w).

        Returns:
            list of (B, 1, h, w), coarse to fine.
        """
        return [predictor(features[name]) for name, predictor in zip(self.skip_features, self.predictors)]

    def forward(self, embeddings: Tensor, skips: list[Tensor]) -> Tensor:
        """
        Args:
            embeddings: (N, E).
            skips: list of (N, 1, m, m), coarse to fine, the windows cut out of what `horizontal` returned.

        Returns:
            (N, M, M) mask logits of the windows.
        """
        mask = self.first(embeddings)
        for skip in skips:
            mask = _upsample_bilinearly(mask + skip)
        return mask[:, 0]


class MultiscaleRefinement(SkipRefinement):
    """Baseline "multiscale" of the paper's figure 1: the coarse mask and independent predictions of the layers, upsampled and averaged."""

    def forward(self, embeddings: Tensor, skips: list[Tensor]) -> Tensor:
        """
        Args:
            embeddings: (N, E).
            skips: list of (N, 1, m, m), coarse to fine, the windows cut out of what `horizontal` returned.

        Returns:
            (N, M, M) mask logits of the windows.
        """
        size = (self.mask_size, self.mask_size)
        maps = [self.first(embeddings), *skips]
        return torch.stack(
            [F.interpolate(x, size=size, mode="bilinear", align_corners=False)[:, 0] for x in maps]
        ).mean(0)
