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
    DeepMask. Two refinement steps follow, at 14 x 14 and at 28 x 28 cells, each with a skip path that is computed once per image
    (SharpMask, section 3.2).
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
        self.start = nn.Linear(embed_dim, channels * _COARSE_SIDE**2)
        self.horizontal_coarse = _skip_path(in_channels, channels)
        self.horizontal_fine = _skip_path(in_channels, half)
        self.refine_coarse = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.widen = nn.Conv2d(channels, half, 3, padding=1)
        self.refine_fine = nn.Conv2d(half, half, 3, padding=1)
        self.to_mask = nn.Conv2d(half, num_classes, 3, padding=1)
        # Masks of the intermediate encodings, for deep supervision in training.
        self.side_masks = nn.ModuleList([nn.Conv2d(channels, 1, 1), nn.Conv2d(half, 1, 1)])
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
            FeatureTable(features, extents, strides),
            FeatureTable([self.horizontal_coarse(x) for x in features], extents, strides),
            FeatureTable([self.horizontal_fine(x) for x in features], extents, strides),
        )

    def forward(self, tables: DecoderTables, images: Tensor, windows: Tensor, classes: Optional[Tensor] = None) -> list:
        """
        Args:
            tables: from `tables`.
            images: (N,) int64, index of the image of each window in the batch.
            windows: (N, 4) XYXY squares in the frame of the resized image, in pixels; they may lie partly or wholly outside.
            classes: (N,) int64 of 0 .. K - 1, whose refined mask is returned; default: that of class 0.

        Returns:
            Three tensors of mask logits, after the first step, after the second step and at the end: (N, 14, 14), (N, 28, 28) and
            (N, 56, 56).
        """
        encoding = self._encode(tables, images, windows)
        fine = self._refine(encoding, tables, images, windows)
        return [self.side_masks[0](encoding)[:, 0], self.side_masks[1](fine)[:, 0], self._last_mask(fine, classes)]

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
            refined: False leaves the refinement out, which takes most of the time: the coarse mask is interpolated.
            classes: see `forward`; coarse masks do not depend on it.

        Returns:
            (N, 56, 56) logits.
        """
        encoding = self._encode(tables, images, windows)
        if refined:
            return self._last_mask(self._refine(encoding, tables, images, windows), classes)
        coarse = self.side_masks[0](encoding)
        return F.interpolate(coarse, size=(self.mask_size,) * 2, mode="bilinear", align_corners=False)[:, 0]

    def _encode(self, tables: DecoderTables, images: Tensor, windows: Tensor) -> Tensor:
        """The encodings after the first refinement step, (N, k, 14, 14): k coarse masks with the first skip features added."""
        sampled = tables.features.sample_windows(images, windows, _EMBED_SIDE)
        embeddings = self.embed(sampled.permute(0, 2, 3, 1).flatten(1)).relu()
        encoding = self.start(embeddings).unflatten(1, (_COARSE_SIDE, _COARSE_SIDE, -1)).permute(0, 3, 1, 2)
        encoding = (encoding + tables.coarse.sample_windows(images, windows, _COARSE_SIDE)).relu()
        for conv in self.refine_coarse:
            encoding = (encoding + conv(encoding)).relu()
        return encoding

    def _refine(self, encoding: Tensor, tables: DecoderTables, images: Tensor, windows: Tensor) -> Tensor:
        """The second refinement step, from (N, k, 14, 14) to (N, k / 2, 28, 28), with the second skip features added."""
        fine = conv_upsampled(encoding, self.widen) + tables.fine.sample_windows(images, windows, 2 * _COARSE_SIDE)
        return self.refine_fine(fine.relu()).relu()

    def _last_mask(self, fine: Tensor, classes: Optional[Tensor]) -> Tensor:
        masks = conv_upsampled(fine, self.to_mask)
        return masks[:, 0] if classes is None else masks[torch.arange(len(masks), device=masks.device), classes]


def _skip_path(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.ReLU(), nn.Conv2d(out_channels, out_channels, 1))


def jittered_windows(boxes: Tensor, *, count: int, share: float, shift: float, octaves: float) -> tuple[Tensor, Tensor]:
    """Draws windows around objects with random positions and sizes, with the random numbers of torch.

    Args:
        boxes: (G, 4) XYXY of the objects in pixels.
        count: number of windows; the numbers of windows of two objects differ by at most 1.
        share: larger side of an object as a share of the side of its canonical window.
        shift: maximum distance of the centre of a window from that of its object along each axis, as a share of the side of the window.
        octaves: maximum difference in size between a window and the canonical window, in octaves.

    Returns:
        The windows, (count, 4) XYXY in the frame of the boxes; and (count,) int64, index of the object of each window. Both are empty if
        there is no object.
    """
    if len(boxes) == 0:
        return boxes.new_zeros(0, 4), torch.zeros(0, dtype=torch.long, device=boxes.device)
    order = torch.randperm(len(boxes), device=boxes.device)
    objects = order.repeat(-(-count // len(boxes)))[:count]
    canonical = square_windows(boxes[objects], share)
    sides = (canonical[:, 2:] - canonical[:, :2]) * 2.0 ** (octaves * _symmetric(count, 1, boxes))
    centres = (canonical[:, :2] + canonical[:, 2:]) / 2 + shift * sides * _symmetric(count, 2, boxes)
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1), objects


def _symmetric(rows: int, columns: int, like: Tensor) -> Tensor:
    """Random numbers from -1 to 1, with the device and type of `like`."""
    return 2 * torch.rand(rows, columns, device=like.device, dtype=like.dtype) - 1
