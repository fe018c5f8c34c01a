"""Skip connections: RoIs are pooled from several layers of the network, normalised and mixed (MultiPath, section 3.2).

Shape letters:
    B: images
    R: RoIs of all images
    C: channels of a feature
    P: side of a pooled map in cells
    M: channels after mixing
"""

from collections.abc import Sequence
from typing import Optional

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from ...errors import UserError


def normalize_regions(pooled: Tensor) -> Tensor:
    """Divide the pooled map of each RoI by the L2 norm of its C * P * P values; maps of zeros remain zero.

    Args:
        pooled: (R, C, P, P).

    Returns:
        (R, C, P, P) float32.
    """
    # The squares of float16 features can overflow in float16.
    pooled = pooled.float()
    norms = pooled.flatten(1).norm(dim=1)[:, None, None, None]
    # Dividing maps of zeros by a small epsilon instead would make their gradients as large as 1 / epsilon.
    return pooled / norms.masked_fill(norms == 0, 1)


class SkipPooler(nn.Module):
    """Pools RoIs from several features, normalises and concatenates the maps, and mixes them by a 1x1 convolution.

    Without mixing it is plain RoI pooling of one feature.
    """

    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        levels: Sequence[str],
        resolution: int,
        sampling_ratio: int,
        pooler_type: str,
        mix_channels: Optional[int],
        scale: float = 1000.0,
    ):
        """
        Args:
            input_shape: shapes of the backbone's features, by name.
            levels: names of the features to pool.
            resolution: P.
            sampling_ratio: number of samples per bin and direction, 0 for adaptive; see Detectron2's `ROIPooler`.
            pooler_type: type of pooling, such as "ROIAlignV2"; see Detectron2's `ROIPooler`.
            mix_channels: M; None pools only the last of `levels`, without normalisation.
            scale: factor by which normalised maps are multiplied. Default: 1000.

        Raises:
            UserError: `levels` is empty, or contains a feature that the backbone does not have.
        """
        super().__init__()
        unknown = [name for name in levels if name not in input_shape]
        if unknown or not levels:
            raise UserError(
                f"RoIs cannot be pooled from the features {list(levels)}: choose from those of the backbone, {sorted(input_shape)}"
            )
        self.levels = list(levels) if mix_channels is not None else list(levels[-1:])
        self.poolers = nn.ModuleList(
            ROIPooler(resolution, (1 / input_shape[name].stride,), sampling_ratio, pooler_type) for name in self.levels
        )
        self.scale = scale
        channels = sum(input_shape[name].channels for name in self.levels)
        self.mix = None
        if mix_channels is not None:
            # The released code uses Torch7's default initialisation, which is also PyTorch's.
            self.mix = nn.Conv2d(channels, mix_channels, 1)
            channels = mix_channels
        self.output_shape = ShapeSpec(channels=channels, height=resolution, width=resolution)

    def forward(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """Pool all RoIs.

        Args:
            features: feature maps (B, C, height, width) by name.
            boxes: RoIs, one `Boxes` per image, XYXY in pixels of the network's input.

        Returns:
            (R, M, P, P) with mixing; (R, C, P, P) of the last level without.
        """
        # RoI pooling of half precision features would compute coordinates in half precision.
        pooled = [pooler([features[name].float()], boxes) for name, pooler in zip(self.levels, self.poolers)]
        if self.mix is None:
            return pooled[0]
        return self.mix(torch.cat([normalize_regions(level) for level in pooled], dim=1) * self.scale)
