"""The cells of a feature pyramid as rows of one table, from which windows of all levels and images are sampled in one operation.

Shape letters: B images, L levels, C channels, Y X cells of a level, N windows, M samples along a side of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class FeatureTable:
    """The cells of all levels and images as rows of C values. Features outside an image count as zero."""

    def __init__(self, rows: Tensor, sizes: Tensor, extents: Tensor, strides: Tensor):
        """
        Args:
            rows: (B * cells of all levels, C), from `table_rows`.
            sizes: (L, 2) int64, rows and columns of each level, which cover the padded batch and may thus be more than those of an image.
            extents: (B, L, 2) int64, number of rows and columns of each level that belong to each image (see
                `windows.geometry.pyramid_sizes`).
            strides: (L,) int64, strides of the levels in pixels.
        """
        self.rows, self.extents, self.strides = rows, extents, strides
        self.heights, self.widths = sizes[:, 0], sizes[:, 1]
        counts = extents.shape[0] * self.heights * self.widths
        self.first = counts.cumsum(0) - counts

    @classmethod
    def from_maps(cls, maps: list[Tensor], extents: Tensor, strides: list[int]) -> "FeatureTable":
        """The table of a feature pyramid.

        Args:
            maps: L maps (B, C, Y, X), fine to coarse.
            extents, strides: see the constructor.
        """
        device = maps[0].device
        sizes = torch.tensor([x.shape[2:] for x in maps], device=device)
        return cls(table_rows(maps), sizes, extents, torch.tensor(strides, device=device))

    def sample(self, images: Tensor, levels: Tensor, windows: Tensor, size: int) -> Tensor:
        """Samples windows bilinearly at the centres of M x M equal parts.

        Args:
            images: (N,) int64, index of the image of each window in the batch.
            levels: (N,) int64, level that each window is sampled on.
            windows: (N, 4) XYXY in pixels of the image.
            size: M.

        Returns:
            (N, C, M, M), channels last in memory.
        """
        steps = (torch.arange(size, device=windows.device) + 0.5) / size
        # In cells of the level; the centres of cells have whole numbers.
        corners = windows / self.strides[levels, None] - 0.5
        at = corners[:, :2, None] + (corners[:, 2:] - corners[:, :2])[:, :, None] * steps  # N x 2 x M
        low = at.floor()
        part = at - low
        # The two cells next to every sample along x and along y, and their weights: N x 2 x M x 2.
        cells = low.long()[..., None] + torch.arange(2, device=windows.device)
        sides = self.extents[images, levels].flip(1)[:, :, None, None]
        weights = torch.stack([1 - part, part], dim=-1) * ((cells >= 0) & (cells < sides))
        columns, rows = torch.minimum(cells.clamp(min=0), sides - 1).unbind(1)
        first = self.first[levels] + images * self.heights[levels] * self.widths[levels]
        rows = first[:, None, None] + rows * self.widths[levels, None, None]
        # The four cells around every sample: N x M x M x 4. They share one dimension, because loops over dimensions of two are slow.
        numbers = rows.repeat_interleave(2, dim=2)[:, :, None] + columns.repeat(1, 1, 2)[:, None]
        weights = weights[:, 1].repeat_interleave(2, dim=2)[:, :, None] * weights[:, 0].repeat(1, 1, 2)[:, None]
        sampled = F.embedding_bag(
            numbers.view(-1, 4),
            self.rows,
            per_sample_weights=weights.view(-1, 4).to(self.rows.dtype),
            mode="sum",
        )
        return sampled.view(windows.shape[0], size, size, self.rows.shape[1]).permute(0, 3, 1, 2)

    def sample_windows(self, images: Tensor, windows: Tensor, size: int) -> Tensor:
        """Samples each window on the level whose cells are closest in size to one of the M x M parts of the window: see `sample`.

        Args:
            images: (N,) int64, index of the image of each window in the batch.
            windows: (N, 4) XYXY squares in pixels of the image.
            size: M.

        Returns:
            (N, C, M, M), channels last in memory.
        """
        parts = (windows[:, 2] - windows[:, 0]) / size
        levels = (parts / self.strides[0]).clamp(min=1e-6).log2().round().long().clamp(0, self.strides.shape[0] - 1)
        return self.sample(images, levels, windows, size)


def table_rows(maps: list[Tensor]) -> Tensor:
    """The cells of a feature pyramid as rows, level by level and image by image.

    Args:
        maps: L maps (B, C, Y, X), fine to coarse.

    Returns:
        (B * cells of all levels, C).
    """
    return torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in maps])
