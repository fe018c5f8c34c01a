"""Feature tables as one map of all levels, an atlas, from which exported graphs sample windows. Its numbers are those of `FeatureTable`.

The levels lie below each other, each behind a row and a column of zeros, with further zeros at the end: samples beyond the border of a
level are zero without any condition. `layout` says how an atlas lies in memory, and which operator samples it.

Shape letters: L levels, C channels, Y X cells of a level, R Q rows and columns of the atlas, N windows, M samples along a side of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# "grid": (1, C, R, Q), sampled by `grid_sample`, which ONNX has. "rows": (R, Q, C), sampled by `embedding_bag`, which OpenVINO has and which
# is three times as fast there.
LAYOUTS = ("grid", "rows")


def build_atlas(maps: list[Tensor], layout: str) -> Tensor:
    """The atlas of a feature pyramid.

    Args:
        maps: L maps (1, C, Y, X), fine to coarse, zero in cells that do not belong to the image.
        layout: one of `LAYOUTS`.
    """
    width = maps[0].shape[3]
    tiles = [F.pad(x, (1, width + 1 - x.shape[3], 1, 0)) for x in maps]
    atlas = F.pad(torch.cat(tiles, dim=2), (0, 0, 0, 1))
    return atlas if layout == "grid" else atlas[0].permute(1, 2, 0).contiguous()


class Atlas:
    """The atlas of one image, with the method of `FeatureTable` that a decoder calls."""

    def __init__(self, atlas: Tensor, image_size: Tensor, *, strides: Tensor, divisor: int, layout: str):
        """
        Args:
            atlas: from `build_atlas`.
            image_size: (2,) int64, height and width of the image in pixels, without padding.
            strides: (L,) int64, of the levels in pixels.
            divisor: number that the sides of the padded image are multiples of, the next ones to `image_size`.
            layout: one of `LAYOUTS`.
        """
        self.atlas, self.layout, self.strides = atlas, layout, strides
        self.extents = sides(image_size, strides)
        heights = sides(sides(image_size[:1], divisor) * divisor, strides)[:, 0]
        # Row of the first cell of each level.
        self.first = (heights + 1).cumsum(0) - heights

    def sample_windows(self, images: None, windows: Tensor, size: int) -> Tensor:
        """Samples each window on the level whose cells are closest in size to one of the M x M parts of the window.

        Args:
            images: not read: an exported graph has one image.
            windows: (N, 4) XYXY squares in pixels of the image.
            size: M.

        Returns:
            (N, C, M, M).
        """
        parts = (windows[:, 2] - windows[:, 0]) / size
        levels = (parts / self.strides[0]).clamp(min=1e-6).log2().round().long().clamp(0, self.strides.shape[0] - 1)
        steps = (torch.arange(size, device=windows.device) + 0.5) / size
        corners = windows / self.strides[levels][:, None] - 0.5
        at = corners[:, :2, None] + (corners[:, 2:] - corners[:, :2])[:, :, None] * steps  # N x 2 x M
        # Everything that is further outside is zero, too.
        limits = self.extents[levels].flip(1)[:, :, None]
        at = torch.minimum(at.clamp(min=-1), limits.to(at.dtype))
        return (self._from_grid if self.layout == "grid" else self._from_rows)(at, limits, self.first[levels])

    def _from_grid(self, at: Tensor, limits: Tensor, first: Tensor) -> Tensor:
        count, _, size = at.shape
        rows, columns = self.atlas.shape[2:]
        x, y = at[:, 0] + 1, at[:, 1] + first[:, None]
        x, y = (2 * x + 1) / columns - 1, (2 * y + 1) / rows - 1
        x, y = x[:, None].expand(count, size, size), y[:, :, None].expand(count, size, size)
        grid = torch.stack([x, y], dim=-1).reshape(1, count * size, size, 2)
        sampled = F.grid_sample(self.atlas, grid, align_corners=False)[0]
        return sampled.reshape(-1, count, size, size).transpose(0, 1)

    def _from_rows(self, at: Tensor, limits: Tensor, first: Tensor) -> Tensor:
        count, _, size = at.shape
        columns, channels = self.atlas.shape[1:]
        # The cell before each sample, so that the one behind it is within the margin, too.
        low = torch.minimum(at.floor().long(), limits - 1)
        part = at - low
        weights = torch.stack([1 - part, part], dim=-1)  # N x 2 x M x 2
        cells = low[..., None] + torch.arange(2, device=at.device)
        x, y = cells[:, 0] + 1, (cells[:, 1] + first[:, None, None]) * columns
        numbers = y[:, :, None, :, None] + x[:, None, :, None, :]  # N x M x M x 2 x 2
        weights = weights[:, 1][:, :, None, :, None] * weights[:, 0][:, None, :, None, :]
        sampled = F.embedding_bag(
            numbers.reshape(-1, 4),
            self.atlas.reshape(-1, channels),
            per_sample_weights=weights.reshape(-1, 4),
            mode="sum",
        )
        return sampled.reshape(count, size, size, channels).permute(0, 3, 1, 2)


def sides(size: Tensor, strides) -> Tensor:
    """Numbers of cells that cover an image.

    Args:
        size: (2,) or (1,) int64, sides of the image in pixels.
        strides: (L,) int64, or a number.

    Returns:
        (L, 2) or (L, 1) int64; without the first dimension for a number.
    """
    strides = strides[:, None] if isinstance(strides, Tensor) else strides
    # Both are positive: a division that rounds down or towards zero is the same here, whatever a format has.
    return torch.div(size + strides - 1, strides, rounding_mode="floor")
