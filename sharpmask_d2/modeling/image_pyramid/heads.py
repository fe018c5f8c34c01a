"""Heads: a score and an embedding for every window from the trunk's features, and DeepMask's coarse mask from the embedding.

A head is a convolution as large as the window, so that a patch (one window) and a full image (a grid of windows) take one path.

Shape letters: B images, C channels of the trunk, h w its grid, K window side in cells of that grid, Y X grid of windows (h - K + 1,
w - K + 1), F reduced channels, E embedding, N windows, M side of the coarse mask.
"""

from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from ...errors import UserError

HEADS = ("original", "A", "B", "C")


class WindowHead(nn.Module):
    """Scores and embeddings of windows (DeepMask, section 3.1; SharpMask, section 3.3).

    All variants share the mask path: a 1x1 reduction with ReLU, then a linear layer over the window to the embedding. The score path is

    * `original`: 2x2 max pooling of the trunk's feature, a layer over the window to E units, `score_dim` units, the score (DeepMask, where
      F = E = 512);
    * `A`: a 1x1 reduction of its own to F channels, 2x2 max pooling, `score_dim` units, the score;
    * `B`: 2x2 max pooling of the map that the mask path reduced, `score_dim` units, the score;
    * `C`: `score_dim` units and the score, from the embedding itself (as in the released code).

    The paper shows A and B in a figure only; their layers here are this project's reading of it.
    """

    def __init__(
        self,
        *,
        variant: str,
        in_channels: int,
        window_cells: int,
        reduced_channels: int,
        embed_dim: int,
        score_dim: int,
    ):
        """
        Args:
            variant: of the score path, one of `HEADS`.
            in_channels: C.
            window_cells: K, even unless the variant is "C".
            reduced_channels: F.
            embed_dim: E.
            score_dim: hidden units of the score path.

        Raises:
            UserError: an unknown variant, or an odd K where the score path pools.
        """
        super().__init__()
        if variant not in HEADS:
            raise UserError(f"MODEL.SHARPMASK.HEAD is {variant!r}: choose from {HEADS}")
        if variant != "C" and window_cells % 2:
            raise UserError(
                f"head {variant} pools 2x2: a window of {window_cells} cells is odd, choose another WINDOW_SIZE"
            )
        self.variant = variant
        self.reduce = nn.Conv2d(in_channels, reduced_channels, 1)
        self.embed = nn.Conv2d(reduced_channels, embed_dim, window_cells)
        pooled_cells = window_cells // 2
        # Dilation 2: on a full image the pooling runs at stride 1, so that every window finds its own cells.
        over_pooled = {"kernel_size": pooled_cells, "dilation": 2}
        if variant == "original":
            first = [nn.Conv2d(in_channels, embed_dim, **over_pooled), nn.ReLU(), nn.Dropout(0.5)]
            first += [nn.Conv2d(embed_dim, score_dim, 1)]
        elif variant == "A":
            self.score_reduce = nn.Conv2d(in_channels, reduced_channels, 1)
            first = [nn.Conv2d(reduced_channels, score_dim, **over_pooled)]
        elif variant == "B":
            first = [nn.Conv2d(reduced_channels, score_dim, **over_pooled)]
        else:
            first = [nn.Dropout(0.5), nn.Conv2d(embed_dim, score_dim, 1)]
        self.score = nn.Sequential(*first, nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(score_dim, 1, 1))

    def forward(self, features: Tensor) -> tuple:
        """
        Args:
            features: (B, C, h, w), the trunk's feature.

        Returns:
            score logits (B, Y, X) and embeddings (B, E, Y, X), of all windows of the grid.
        """
        reduced = self.reduce(features).relu_()
        embeddings = self.embed(reduced)
        if self.variant == "C":
            source = embeddings
        else:
            source = features if self.variant == "original" else reduced
            if self.variant == "A":
                source = self.score_reduce(features).relu_()
            source = max_pool2d(source, kernel_size=2, stride=1)
        return self.score(source)[:, 0], embeddings


class CoarseMask(nn.Module):
    """DeepMask's mask: one linear layer from a window's embedding (DeepMask, section 3.1)."""

    skip_features = skip_strides = ()

    def __init__(self, *, embed_dim: int, mask_size: int):
        """
        Args:
            embed_dim: E.
            mask_size: M, in cells.
        """
        super().__init__()
        self.mask_size = mask_size
        self.predictor = nn.Linear(embed_dim, mask_size * mask_size)

    def horizontal(self, features: dict) -> list:
        """An empty list, as this mask branch reads no skip features."""
        return []

    def forward(self, embeddings: Tensor, skips: list) -> Tensor:
        """
        Args:
            embeddings: (N, E).
            skips: an empty list.

        Returns:
            (N, M, M) mask logits of the windows.
        """
        return self.predictor(embeddings).view(-1, self.mask_size, self.mask_size)
