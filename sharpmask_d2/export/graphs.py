"""The two graphs of a SharpMask on a feature pyramid: the encoder runs once per image, the decoder on any windows of the image.

Shape letters: H W height and width of the padded image in pixels, L levels, T windows of the image, C channels of the pyramid, k channels of
the mask encoding, N windows whose masks are refined, K windows whose masks are coarse, M mask side in cells.
"""

import math

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..modeling.feature_pyramid.decoder import DecoderTables
from ..modeling.feature_pyramid.feature_table import FeatureTable, table_rows
from ..modeling.feature_pyramid.levels import add_coarser_levels, cells_inside
from ..modeling.layers import EvenSameConv2d, fold_batch_norm
from .atlas import Atlas, build_atlas

# How features are stored for the decoder. "atlas": see `atlas.py`, for ONNX. "rows": as in `FeatureTable`, for OpenVINO, which has its
# operator `embedding_bag` and is three times as fast with it as with `grid_sample`.
LAYOUTS = ("atlas", "rows")


class EncoderGraph(nn.Module):
    """From an image to the scores of all windows and to the features that masks are decoded from."""

    names = (["image", "image_size"], ["scores", "features", "coarse", "fine"])

    def __init__(self, model: nn.Module, layout: str):
        """
        Args:
            model: a `SegmentProposalNetwork` from `prepare_for_export`.
            layout: one of `LAYOUTS`.
        """
        super().__init__()
        self.backbone, self.generator, self.layout = model.backbone, model.proposal_generator, layout
        self.register_buffer("mean", model.pixel_mean)
        self.register_buffer("std", model.pixel_std)
        self.register_buffer("strides", torch.tensor(self.generator.strides))

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: (H, W, 3) uint8 in the channel order of the model, padded at the bottom and on the right, with any values, to the next
                multiples of the backbone's divisor.
            image_size: (2,) int64, height and width before padding.

        Returns:
            scores (T,), see `PyramidFeatures`; and the tables of the pyramid, C channels, and of the skip features of both refinement
            steps, k and k / 2 channels: (cells of all levels, channels) or (1, channels, rows, columns), by the layout.
        """
        pixels = (image.permute(2, 0, 1)[None].float() - self.mean) / self.std
        # Detectron2 pads the normalised image with zeros.
        pixels = pixels * cells_inside(pixels, image_size[None]).to(pixels.dtype)
        features = self.backbone(pixels)
        extents = _cells(image_size, self.strides[:, None])[None]
        levels = add_coarser_levels([features[name] for name in self.generator.in_features], extents)
        scores, tables = [], []
        insides = [cells_inside(x, extents[:, number]) for number, x in enumerate(levels)]
        for x, inside in zip(levels, insides):
            grid = self.generator.scores(x, inside.to(x.dtype))
            scores.append(grid.masked_fill(~inside, -math.inf).flatten())
        decoder = self.generator.decoder
        for path in (nn.Identity(), decoder.horizontal_coarse, decoder.horizontal_fine):
            maps = [path(x) for x in levels]
            if self.layout == "atlas":
                maps = [x * inside.to(x.dtype) for x, inside in zip(maps, insides)]
            tables.append(build_atlas(maps) if self.layout == "atlas" else table_rows(maps))
        return (torch.cat(scores), *tables)


class DecoderGraph(nn.Module):
    """From the features of an image and windows to the masks of the windows."""

    names = (
        ["features", "coarse", "fine", "image_size", "windows", "coarse_windows"],
        ["masks", "coarse_masks"],
    )

    def __init__(self, model: nn.Module, layout: str):
        """
        Args:
            model, layout: see `EncoderGraph`.
        """
        super().__init__()
        self.decoder, self.layout, self.divisor = (
            model.proposal_generator.decoder,
            layout,
            model.backbone.size_divisibility,
        )
        self.register_buffer("strides", torch.tensor(model.proposal_generator.strides))

    def forward(
        self,
        features: Tensor,
        coarse: Tensor,
        fine: Tensor,
        image_size: Tensor,
        windows: Tensor,
        coarse_windows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            features, coarse, fine: from the encoder.
            image_size: see `EncoderGraph`.
            windows: (N, 4) float32 XYXY squares in pixels of the resized image, whose masks are refined; N may be 0.
            coarse_windows: (K, 4), whose masks are not refined; K may be 0.

        Returns:
            (N, M, M) and (K, M, M) mask logits.
        """
        sizes = _cells(_cells(image_size, self.divisor) * self.divisor, self.strides[:, None])
        extents = _cells(image_size, self.strides[:, None])[None]
        kind = Atlas if self.layout == "atlas" else FeatureTable
        tables = DecoderTables(*(kind(x, sizes, extents, self.strides) for x in (features, coarse, fine)))
        first, last = (torch.zeros_like(x[:, 0], dtype=torch.long) for x in (windows, coarse_windows))
        return (
            self.decoder.masks(tables, first, windows),
            self.decoder.masks(tables, last, coarse_windows, refined=False),
        )


def _cells(size: Tensor, strides) -> Tensor:
    """Number of cells of a stride that cover an image, sides in pixels by strides."""
    # Both are positive, so that division may round down or towards zero, whatever a format has.
    return torch.div(size + strides - 1, strides, rounding_mode="floor")


def prepare_for_export(model: nn.Module) -> nn.Module:
    """Prepares a network in place: merges batch norms, and replaces convolutions that change their weights when they run.

    Args:
        model: any network of this package, with its weights, on the CPU.

    Returns:
        `model`, in evaluation mode and without gradients.
    """
    return _with_constant_weights(fold_batch_norm(model.eval()).requires_grad_(False))


def _with_constant_weights(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, EvenSameConv2d):
            weight = child.even_weight()
            conv = nn.Conv2d(
                child.in_channels,
                child.out_channels,
                weight.shape[2:],
                stride=child.stride,
                padding=child.even_padding,
                groups=child.groups,
                bias=child.bias is not None,
                device="meta",
            )
            conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), child.bias
            setattr(module, name, conv.eval())
        else:
            _with_constant_weights(child)
    return module


def dynamic_shapes(graph: nn.Module) -> tuple:
    """The dimensions of the inputs of a graph that are not fixed, as `torch.export.export` takes them."""
    if isinstance(graph, EncoderGraph):
        divisor = graph.backbone.size_divisibility
        return {0: divisor * Dim("height", min=1), 1: divisor * Dim("width", min=1)}, None
    if graph.layout == "atlas":
        table = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    else:
        table = {0: Dim.DYNAMIC}
    return (table, table, table, None, {0: Dim("windows")}, {0: Dim("coarse_windows")})
