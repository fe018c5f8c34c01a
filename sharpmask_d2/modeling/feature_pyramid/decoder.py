"""Decodes the mask of any window of a feature pyramid. Features are sampled on a grid inside the window, which need not lie on cells.

Shape letters: B images, L levels, C channels of the pyramid, N windows, E embedding, k channels of the mask encoding, K classes of masks,
M mask side.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...windows.geometry import square_windows
from ..layers import conv_upsampled
from .feature_table import FeatureTable

# Side of the grid on which a window is sampled for its embedding, and side of the coarse mask, in cells.
_EMBED_SIDE, _COARSE_SIDE = 7, 14


class DecoderTables(NamedTuple):
    """What the decoder computes once per batch of images."""

    # Features of the pyramid, C channels.
    features: FeatureTable
    # Skip features of the first refinement step, k channels.
    coarse: FeatureTable
    # Skip features of the second refinement step, k / 2 channels.
    fine: FeatureTable


class SampledDecoder(nn.Module):
    """Decodes the masks of square windows, 56 x 56 cells each.

    The embedding of a window is computed from its features. The coarse mask of 14 x 14 cells is a linear function of the embedding, as in
    DeepMask. Two refinement steps, at 14 x 14 and at 28 x 28 cells, start from another linear function of the embedding, with k channels;
    each has a skip path that is computed once per image (SharpMask, section 3.2).
    """

    def __init__(self, *, in_channels: int, embed_dim: int, channels: int, num_classes: int = 1):
        """
        Args:
            in_channels: C.
            embed_dim: E.
            channels: k at 14 x 14 cells; half of it at 28 x 28 cells.
            num_classes: K, number of classes that have refined masks of their own; default: 1, masks do not depend on a class.
        """
        super().__init__()
        half = channels // 2
        self.embed = nn.Linear(_EMBED_SIDE**2 * in_channels, embed_dim)
        self.coarse_mask = nn.Linear(embed_dim, _COARSE_SIDE**2)
        self.start = nn.Linear(embed_dim, channels * _COARSE_SIDE**2)
        self.horizontal_coarse = _skip_path(in_channels, channels)
        self.horizontal_fine = _skip_path(in_channels, half)
        self.refine_coarse = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.widen = nn.Conv2d(channels, half, 3, padding=1)
        self.refine_fine = nn.ModuleList(nn.Conv2d(half, half, 3, padding=1) for _ in range(2))
        self.to_mask = nn.Conv2d(half, num_classes, 3, padding=1)
        # Masks of the three intermediate encodings, for deep supervision in training.
        self.side_masks = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in (channels, channels, half))
        self.mask_size, self.num_classes = 4 * _COARSE_SIDE, num_classes

    @classmethod
    def from_config(cls, cfg, in_channels: int, num_classes: int = 1) -> "SampledDecoder":
        """The decoder that MODEL.SHARPMASK of a config describes.

        Args:
            cfg: a config, of which EMBED_DIM and REFINEMENT.CHANNELS are read.
            in_channels, num_classes: see the constructor.
        """
        sharpmask = cfg.MODEL.SHARPMASK
        return cls(
            in_channels=in_channels,
            embed_dim=sharpmask.EMBED_DIM,
            channels=sharpmask.REFINEMENT.CHANNELS,
            num_classes=num_classes,
        )

    def tables(self, features: list[Tensor], extents: Tensor, strides: list[int]) -> DecoderTables:
        """Computes the features that windows are decoded from, once per batch of images.

        Args:
            features: L maps (B, C, Y, X), fine to coarse.
            extents, strides: see `FeatureTable`.
        """
        return DecoderTables(
            FeatureTable.from_maps(features, extents, strides),
            FeatureTable.from_maps([self.horizontal_coarse(x) for x in features], extents, strides),
            FeatureTable.from_maps([self.horizontal_fine(x) for x in features], extents, strides),
        )

    def forward(self, tables: DecoderTables, images: Tensor, windows: Tensor, classes: Optional[Tensor] = None) -> list:
        """
        Args:
            tables: from `tables`.
            images: (N,) int64, index of the image of each window in the batch.
            windows: (N, 4) XYXY squares in the frame of the resized image, in pixels; they may lie partly or wholly outside.
            classes: (N,) int64 of 0 .. K - 1, whose refined mask is returned; default: that of class 0.

        Returns:
            Five tensors of mask logits, from coarse to fine: the coarse masks (N, 14, 14); the masks of the encodings before and after the
            first step, both (N, 14, 14), and after the second step, (N, 28, 28); and the refined masks (N, 56, 56).
        """
        embeddings = self._embed(tables, images, windows)
        start = self._start(embeddings, tables, images, windows)
        coarse = _residuals(start, self.refine_coarse)
        fine = self._refine_fine(coarse, tables, images, windows)
        sides = [layer(encoding)[:, 0] for layer, encoding in zip(self.side_masks, (start, coarse, fine))]
        return [self._coarse_masks(embeddings), *sides, self._last_mask(fine, classes)]

    def masks(
        self,
        tables: DecoderTables,
        images: Tensor,
        windows: Tensor,
        *,
        refined: bool = True,
        classes: Optional[Tensor] = None,
    ) -> Tensor:
        """Masks for inference.

        Args:
            tables, images, windows: see `forward`.
            refined: False leaves the refinement out, which takes most of the time: the coarse masks are interpolated.
            classes: see `forward`; coarse masks do not depend on it.

        Returns:
            (N, 56, 56) logits.
        """
        embeddings = self._embed(tables, images, windows)
        if refined:
            coarse = _residuals(self._start(embeddings, tables, images, windows), self.refine_coarse)
            return self._last_mask(self._refine_fine(coarse, tables, images, windows), classes)
        masks = self._coarse_masks(embeddings)[:, None]
        return F.interpolate(masks, size=(self.mask_size,) * 2, mode="bilinear", align_corners=False)[:, 0]

    def _embed(self, tables: DecoderTables, images: Tensor, windows: Tensor) -> Tensor:
        """The embeddings of windows, (N, E)."""
        sampled = tables.features.sample_windows(images, windows, _EMBED_SIDE)
        return self.embed(sampled.permute(0, 2, 3, 1).flatten(1)).relu()

    def _coarse_masks(self, embeddings: Tensor) -> Tensor:
        """(N, 14, 14) logits."""
        return self.coarse_mask(embeddings).unflatten(1, (_COARSE_SIDE, _COARSE_SIDE))

    def _start(self, embeddings: Tensor, tables: DecoderTables, images: Tensor, windows: Tensor) -> Tensor:
        """What refinement starts from, (N, k, 14, 14): a function of the embedding with the first skip features added."""
        encoding = self.start(embeddings).unflatten(1, (_COARSE_SIDE, _COARSE_SIDE, -1)).permute(0, 3, 1, 2)
        return (encoding + tables.coarse.sample_windows(images, windows, _COARSE_SIDE)).relu()

    def _refine_fine(self, coarse: Tensor, tables: DecoderTables, images: Tensor, windows: Tensor) -> Tensor:
        """The second refinement step, from (N, k, 14, 14) to (N, k / 2, 28, 28), with the second skip features added."""
        fine = conv_upsampled(coarse, self.widen) + tables.fine.sample_windows(images, windows, 2 * _COARSE_SIDE)
        return _residuals(fine.relu(), self.refine_fine)

    def _last_mask(self, fine: Tensor, classes: Optional[Tensor]) -> Tensor:
        masks = conv_upsampled(fine, self.to_mask)
        return masks[:, 0] if classes is None else masks[torch.arange(len(masks), device=masks.device), classes]


def _residuals(encoding: Tensor, convs: nn.ModuleList) -> Tensor:
    """Applies convolutions whose results are added to their inputs, with a ReLU after each."""
    for conv in convs:
        encoding = (encoding + conv(encoding)).relu()
    return encoding


def _skip_path(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.ReLU(), nn.Conv2d(out_channels, out_channels, 1))


def jittered_windows(
    boxes: Tensor,
    *,
    count: int,
    share: float,
    shift: float,
    octaves: float,
    generator: Optional[torch.Generator] = None,
) -> tuple[Tensor, Tensor]:
    """Draws windows around objects with random positions and sizes.

    Args:
        boxes: (G, 4) XYXY of the objects in pixels.
        count: number of windows; the numbers of windows of two objects differ by at most 1.
        share: larger side of an object as a share of the side of its canonical window.
        shift: maximum distance of the centre of a window from that of its object along each axis, as a share of the side of the window.
        octaves: maximum difference in size between a window and the canonical window, in octaves.
        generator: source of all random numbers, on the device of the boxes. Default: None, that of torch.

    Returns:
        The windows, (count, 4) XYXY in the frame of the boxes; and (count,) int64, index of the object of each window. Both are empty if
        there is no object.
    """
    if len(boxes) == 0:
        return boxes.new_zeros(0, 4), torch.zeros(0, dtype=torch.long, device=boxes.device)
    order = torch.randperm(len(boxes), device=boxes.device, generator=generator)
    objects = order.repeat(-(-count // len(boxes)))[:count]
    canonical = square_windows(boxes[objects], share)
    sides = (canonical[:, 2:] - canonical[:, :2]) * 2.0 ** (octaves * _symmetric(count, 1, boxes, generator))
    centres = (canonical[:, :2] + canonical[:, 2:]) / 2 + shift * sides * _symmetric(count, 2, boxes, generator)
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1), objects


def _symmetric(rows: int, columns: int, like: Tensor, generator: Optional[torch.Generator]) -> Tensor:
    """Random numbers from -1 to 1, with the device and type of `like`."""
    return 2 * torch.rand(rows, columns, device=like.device, dtype=like.dtype, generator=generator) - 1
