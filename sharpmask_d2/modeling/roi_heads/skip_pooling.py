"""Skip connections: a RoI is pooled from several layers of the network, brought to one scale and mixed (MultiPath, section 3.2).

Shape letters: R RoIs of all images, L levels, C channels of a level, P side of the pooled map, M channels after mixing.
"""

from typing import Optional

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn

from ...errors import UserError


def normalize_regions(pooled: Tensor) -> Tensor:
    """Each RoI's map divided by the L2 norm of all its C * P * P values; maps of zeros stay zero.

    Args:
        pooled: (R, C, P, P).

    Returns:
        (R, C, P, P), float32.
    """
    # In float32 the squares of half precision features do not overflow.
    pooled = pooled.float()
    norms = pooled.flatten(1).norm(dim=1)[:, None, None, None]
    # Divided by a small number instead, maps of zeros would send back gradients as large as its inverse.
    return pooled / norms.masked_fill(norms == 0, 1)


class SkipPooler(nn.Module):
    """RoI pooling of several levels, normalised, joined, scaled and mixed by a 1x1 convolution; or plain RoI pooling of one level."""

    def __init__(
        self,
        input_shape: dict,
        *,
        levels: list,
        resolution: int,
        sampling_ratio: int,
        pooler_type: str,
        mix_channels: Optional[int],
        scale: float = 1000.0,
    ):
        """
        Args:
            input_shape: name -> ShapeSpec of the backbone's features.
            levels: names of the features to pool.
            resolution: P.
            sampling_ratio, pooler_type: as of Detectron2's ROIPooler.
            mix_channels: M; None pools the last level alone and leaves it as it is.
            scale: factor on the normalised maps.

        Raises:
            ValueError: no level, or one that the backbone does not have.
        """
        super().__init__()
        unknown = [name for name in levels if name not in input_shape]
        if unknown or not levels:
            raise UserError(f"cannot pool {list(levels)}: the backbone's features are {sorted(input_shape)}")
        self.levels = list(levels) if mix_channels is not None else list(levels[-1:])
        self.poolers = nn.ModuleList(
            ROIPooler(resolution, (1 / input_shape[name].stride,), sampling_ratio, pooler_type) for name in self.levels
        )
        self.scale = scale
        channels = sum(input_shape[name].channels for name in self.levels)
        self.mix = None
        if mix_channels is not None:
            # PyTorch's initialisation of convolutions is Torch7's, which the released code leaves as it is.
            self.mix = nn.Conv2d(channels, mix_channels, 1)
            channels = mix_channels
        self.output_shape = ShapeSpec(channels=channels, height=resolution, width=resolution)

    def forward(self, features: dict, boxes: list) -> Tensor:
        """
        Args:
            features: name -> (images, C, height, width).
            boxes: Boxes of the RoIs of each image, in its pixels.

        Returns:
            (R, M, P, P), or (R, C, P, P) of the last level.
        """
        # RoI pooling in half precision would place its samples by coordinates of half precision.
        pooled = [pooler([features[name].float()], boxes) for name, pooler in zip(self.levels, self.poolers)]
        if self.mix is None:
            return pooled[0]
        return self.mix(torch.cat([normalize_regions(level) for level in pooled], dim=1) * self.scale)
