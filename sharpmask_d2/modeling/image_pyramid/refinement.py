"""From a window's embedding to its mask with the help of skip features: SharpMask's refinement path and the baselines beside it.

Every form has two halves: `horizontal`, computed once per image, and `forward`, computed for the chosen windows only.

Shape letters: B images, N windows, E embedding, K window side in cells of the coarsest skip feature, k_f channels of a skip feature,
k = k_m = k_s channels of a module, m side of a module's input (K, 2K, 4K ...), M side of the mask.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...errors import UserError
from ..blocks import conv_blocks, conv_upsampled, from_blocks, to_blocks
from ..layers import MirroredConv2d

# Width of the first convolution on the skip path, as released; a stride-2 feature gets half.
_SKIP_WIDTH = 64
# Maps of at most so many channels are kept in blocks of 2 x 2 pixels.
_FEW_CHANNELS = 4


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return MirroredConv2d(nn.Conv2d(in_channels, out_channels, 3, padding=1))


def _chain(channels: list) -> nn.Sequential:
    """3x3 convolutions through the channel counts given, with ReLU between them and none after the last."""
    layers = []
    for before, after in zip(channels, channels[1:]):
        layers += [_conv3x3(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _skip_chain(feature: ShapeSpec, hidden: int, out_channels: int, num_convs: int) -> nn.Sequential:
    widths = [_SKIP_WIDTH if feature.stride > 2 else _SKIP_WIDTH // 2, hidden][3 - num_convs :]
    return _chain([feature.channels, *widths, out_channels])


def module_channels(channels: int, schedule: str, num_modules: int) -> list:
    """k of every module, and what the last one hands on: schedule (a) constant, (b) halved (SharpMask, section 3.2).

    Returns:
        list of `num_modules` + 1 ints.

    Raises:
        ValueError: unknown schedule, or channels that cannot be halved so often.
    """
    if schedule == "a":
        return [channels] * (num_modules + 1)
    if schedule != "b":
        raise UserError(f"MODEL.SHARPMASK.REFINEMENT.SCHEDULE is {schedule!r}: choose 'a' or 'b'")
    if channels % 2**num_modules:
        raise UserError(f"MODEL.SHARPMASK.REFINEMENT.CHANNELS is {channels}: {num_modules} modules cannot halve it")
    return [channels // 2**i for i in range(num_modules + 1)]


class RefinementModule(nn.Module):
    """One step of the refinement path: M' = R(M, F) at twice the resolution (SharpMask, section 3.2).

    The refactored form adds a convolution of the mask encoding and one of the skip feature; the concatenated form runs one convolution
    over both. They are the same function: see `concatenate`.
    """

    def __init__(
        self,
        feature: ShapeSpec,
        in_channels: int,
        out_channels: int,
        *,
        form: str,
        vertical_convs: int,
        horizontal_convs: int,
        upsampling: str,
    ):
        """
        Args:
            feature: channels and stride of the skip feature.
            in_channels, out_channels: k of this module and of the next.
            form: "refactored" or "concatenated".
            vertical_convs: 3x3 convolutions on the mask path, the last of which is shared in the concatenated form; 1 or 2.
            horizontal_convs: likewise on the skip path; 2 or 3.
            upsampling: "nearest" or "bilinear".
        """
        super().__init__()
        self.form, self.upsampling = form, upsampling
        vertical = _chain([in_channels] * vertical_convs + [out_channels])
        horizontal = _skip_chain(feature, in_channels, out_channels, horizontal_convs)
        if form == "concatenated":
            vertical, horizontal = vertical[:-1], horizontal[:-1]
            self.joint = _conv3x3(2 * in_channels, out_channels)
        # No Sequential: the first convolution may read a map that is not upsampled yet.
        self.vertical, self.horizontal = nn.ModuleList(vertical), horizontal

    def forward(self, encoding: Tensor, skip: Tensor, *, blocks: int = 1) -> Tensor:
        """
        Args:
            encoding: (N, k, m, m), M; or of half the side: what the module before gave, upsampled here.
            skip: (N, *, m, m), what `horizontal` made of F.
            blocks: 2 if the skip feature is in blocks of 2 x 2 pixels (`blocks.to_blocks`), and the result shall be: in the refactored
                form, where the encoding is upsampled by nearest neighbours.

        Returns:
            (N, k', m, m), not yet upsampled.
        """
        layers = list(self.vertical)
        if blocks > 1:
            encoding = conv_blocks(encoding, layers.pop(0), blocks=1, upsampled=True)
            for layer in layers:
                encoding = (
                    layer(encoding) if isinstance(layer, nn.ReLU) else conv_blocks(encoding, layer, blocks=blocks)
                )
            return (encoding + skip).relu_()
        if encoding.shape[-1] < skip.shape[-1]:
            encoding = _upsample(encoding, self.upsampling, then=layers.pop(0) if layers else None)
        for layer in layers:
            encoding = layer(encoding)
        if self.form == "concatenated":
            summed = self.joint(torch.cat([encoding, skip], dim=1))
        else:
            summed = encoding + skip
        return summed.relu_()


def _upsample(x: Tensor, mode: str, then=None) -> Tensor:
    """x (N, k, m, m) to (N, *, 2m, 2m), which the convolution `then` reads; by nearest neighbours it reads x itself."""
    if then is not None and mode == "nearest":
        return conv_upsampled(x, then)
    x = F.interpolate(x, scale_factor=2, mode=mode, **({"align_corners": False} if mode == "bilinear" else {}))
    return x if then is None else then(x)


@torch.no_grad()
def concatenate(refactored: RefinementModule, concatenated: RefinementModule) -> None:
    """Copy the weights of a refactored module into a concatenated one, which then computes the same.

    A convolution over concatenated maps is the sum of two convolutions, so the last ones of both paths are stacked and their biases added.
    """
    state = {k: v for k, v in refactored.state_dict().items() if k in concatenated.state_dict()}
    last = refactored.vertical[-1], refactored.horizontal[-1]
    state["joint.weight"] = torch.cat([conv.weight for conv in last], dim=1)
    state["joint.bias"] = last[0].bias + last[1].bias
    concatenated.load_state_dict(state)


class _FromEmbedding(nn.Module):
    """What all forms share: the linear layer from the embedding to the first maps, and the names of the skip features."""

    def __init__(self, features: dict, embed_dim: int, channels: int, window_size: int):
        super().__init__()
        specs = list(features.values())
        for name, coarse, fine in zip(list(features)[1:], specs, specs[1:]):
            if coarse.stride != 2 * fine.stride:
                raise UserError(
                    f"MODEL.SHARPMASK.REFINEMENT.SKIP_FEATURES: {name} has stride {fine.stride}, "
                    f"which is not half of the {coarse.stride} before it"
                )
        self.skip_features = tuple(features)
        self.strides = [spec.stride for spec in specs]
        self.side = window_size // specs[0].stride
        self.mask_size = 2 * window_size // specs[-1].stride
        self.start = nn.Linear(embed_dim, channels * self.side * self.side)

    @property
    def skip_strides(self) -> list:
        """Pixels of the image along a cell of each map that `horizontal` returns."""
        return self.strides

    def first(self, embeddings: Tensor) -> Tensor:
        """(N, E) -> (N, k, K, K)."""
        return self.start(embeddings).view(len(embeddings), -1, self.side, self.side)


class SharpMaskRefinement(_FromEmbedding):
    """The refinement path: a linear layer to M^1, a refinement module per skip feature, a 3x3 convolution to the mask."""

    def __init__(
        self,
        *,
        features: dict,
        embed_dim: int,
        window_size: int,
        channels: int,
        schedule: str,
        form: str,
        vertical_convs: int,
        horizontal_convs: int,
        upsampling: str,
    ):
        """
        Args:
            features: name -> ShapeSpec of the skip features, coarse to fine.
            embed_dim: E.
            window_size: window side in pixels of the level.
            channels, schedule: see `module_channels`.
            form, vertical_convs, horizontal_convs, upsampling: see `RefinementModule`.

        Raises:
            ValueError: an option that is none of those named there.
        """
        if form not in ("refactored", "concatenated"):
            raise UserError(f"MODEL.SHARPMASK.REFINEMENT.FORM is {form!r}: choose 'refactored' or 'concatenated'")
        if upsampling not in ("nearest", "bilinear"):
            raise UserError(f"MODEL.SHARPMASK.REFINEMENT.UPSAMPLING is {upsampling!r}: choose 'nearest' or 'bilinear'")
        if vertical_convs not in (1, 2) or horizontal_convs not in (2, 3):
            raise UserError("MODEL.SHARPMASK.REFINEMENT: VERTICAL_CONVS is 1 or 2, HORIZONTAL_CONVS is 2 or 3")
        widths = module_channels(channels, schedule, len(features))
        super().__init__(features, embed_dim, widths[0], window_size)
        options = {"vertical_convs": vertical_convs, "horizontal_convs": horizontal_convs, "upsampling": upsampling}
        self.steps = nn.ModuleList(
            RefinementModule(feature, k, k_next, form=form, **options)
            for feature, k, k_next in zip(features.values(), widths, widths[1:])
        )
        self.to_mask, self.upsampling = _conv3x3(widths[-1], 1), upsampling
        # The last module has the largest maps, of the fewest channels: they are kept in blocks of `blocks` pixels a side, 1 for not at all.
        can = form == "refactored" and upsampling == "nearest" and len(features) > 1
        self.blocks = 2 if can and widths[-2] <= _FEW_CHANNELS else 1

    @property
    def skip_strides(self) -> list:
        return [*self.strides[:-1], self.strides[-1] * self.blocks]

    def horizontal(self, features: dict) -> list:
        """Run the skip path, once per image.

        Args:
            features: name -> (B, k_f, h, w).

        Returns:
            list of (B, *, h, w), coarse to fine, cells of which are `skip_strides` pixels wide.
        """
        maps = [module.horizontal(features[name]) for name, module in zip(self.skip_features, self.steps)]
        return [*maps[:-1], to_blocks(maps[-1], self.blocks)]

    def forward(self, embeddings: Tensor, skips: list) -> Tensor:
        """
        Args:
            embeddings: (N, E).
            skips: list of (N, *, m, m), the windows cut out of what `horizontal` returned.

        Returns:
            (N, M, M) mask logits of the windows.
        """
        encoding = self.first(embeddings)
        for module, skip in zip(self.steps[:-1], skips):
            encoding = module(encoding, skip)
        encoding = self.steps[-1](encoding, skips[-1], blocks=self.blocks)
        if self.blocks > 1:
            masks = conv_blocks(encoding, self.to_mask, blocks=self.blocks, upsampled=True)
            return from_blocks(masks, 2 * self.blocks)[:, 0]
        return _upsample(encoding, self.upsampling, then=self.to_mask)[:, 0]


class SkipRefinement(_FromEmbedding):
    """Baseline "skip" of the paper's figure 1: a one-channel mask to which every skip feature adds; no convolution top-down."""

    def __init__(self, *, features: dict, embed_dim: int, window_size: int):
        """
        Args:
            features: name -> ShapeSpec of the skip features, coarse to fine.
            embed_dim: E.
            window_size: window side in pixels of the level.
        """
        super().__init__(features, embed_dim, 1, window_size)
        self.predictors = nn.ModuleList(_skip_chain(feature, 16, 1, 3) for feature in features.values())

    def horizontal(self, features: dict) -> list:
        """name -> (B, k_f, h, w) to a list of predictions (B, 1, h, w), coarse to fine."""
        return [predictor(features[name]) for name, predictor in zip(self.skip_features, self.predictors)]

    def forward(self, embeddings: Tensor, skips: list) -> Tensor:
        """(N, E) and a list of (N, 1, m, m) to (N, M, M) mask logits."""
        mask = self.first(embeddings)
        for skip in skips:
            mask = _upsample(mask + skip, "bilinear")
        return mask[:, 0]


class MultiscaleRefinement(SkipRefinement):
    """Baseline "multiscale" of the paper's figure 1: the coarse mask and independent predictions per layer, upsampled and averaged."""

    def forward(self, embeddings: Tensor, skips: list) -> Tensor:
        """(N, E) and a list of (N, 1, m, m) to (N, M, M) mask logits."""
        size = (self.mask_size, self.mask_size)
        maps = [self.first(embeddings), *skips]
        return torch.stack(
            [F.interpolate(x, size=size, mode="bilinear", align_corners=False)[:, 0] for x in maps]
        ).mean(0)
