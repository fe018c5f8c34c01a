"""A feature table as one map of all levels, an atlas, from which `grid_sample` samples windows. Its numbers are those of `FeatureTable`.

ONNX has no operator like `embedding_bag`, with which `FeatureTable` samples. The levels of an atlas lie below each other, each behind a row
and a column of zeros, with further zeros at the end: samples beyond the border of a level are zero without any condition.

Shape letters: L levels, C channels, Y X cells of a level, R Q rows and columns of the atlas, N windows, M samples along a side of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def build_atlas(maps: list[Tensor]) -> Tensor:
    """The atlas of a feature pyramid.

    Args:
        maps: L maps (1, C, Y, X), fine to coarse, zero in cells that do not belong to the image.

    Returns:
        (1, C, R, Q).
    """
    width = maps[0].shape[3]
    tiles = [F.pad(x, (1, width + 1 - x.shape[3], 1, 0)) for x in maps]
    return F.pad(torch.cat(tiles, dim=2), (0, 0, 0, 1))


class Atlas:
    """The atlas of one image, with the method of `FeatureTable` that a decoder calls."""

    def __init__(self, atlas: Tensor, sizes: Tensor, extents: Tensor, strides: Tensor):
        """
        Args:
            atlas: from `build_atlas`.
            sizes: (L, 2) int64, rows and columns of each level.
            extents: (1, L, 2) int64, number of rows and columns of each level that belong to the image.
            strides: (L,) int64, strides of the levels in pixels.
        """
        self.atlas, self.extents, self.strides = atlas, extents[0], strides
        # Row of the first cell of each level.
        self.first = (sizes[:, 0] + 1).cumsum(0) - sizes[:, 0]

    def sample_windows(self, images: Tensor, windows: Tensor, size: int) -> Tensor:
        """Samples each window on the level whose cells are closest in size to one of the M x M parts of the window.

        Args:
            images: not read, because there is one image.
            windows: (N, 4) XYXY squares in pixels of the image.
            size: M.

        Returns:
            (N, C, M, M).
        """
        count = windows.shape[0]
        parts = (windows[:, 2] - windows[:, 0]) / size
        levels = (parts / self.strides[0]).clamp(min=1e-6).log2().round().long().clamp(0, self.strides.shape[0] - 1)
        steps = (torch.arange(size, device=windows.device) + 0.5) / size
        corners = windows / self.strides[levels][:, None] - 0.5
        at = corners[:, :2, None] + (corners[:, 2:] - corners[:, :2])[:, :, None] * steps  # N x 2 x M
        # Everything that is further outside is zero, too.
        at = torch.minimum(at.clamp(min=-1), self.extents[levels].flip(1)[:, :, None].to(at.dtype))
        rows, columns = self.atlas.shape[2:]
        x, y = at[:, 0] + 1, at[:, 1] + self.first[levels][:, None]
        x, y = (2 * x + 1) / columns - 1, (2 * y + 1) / rows - 1
        x, y = x[:, None].expand(count, size, size), y[:, :, None].expand(count, size, size)
        grid = torch.stack([x, y], dim=-1).reshape(1, count * size, size, 2)
        sampled = F.grid_sample(self.atlas, grid, align_corners=False)[0]
        return sampled.reshape(-1, count, size, size).transpose(0, 1)
