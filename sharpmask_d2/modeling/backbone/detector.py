"""Trunks as backbones of detectors, configured independently of a proposal generator's own trunk.

Shape letters:
    B: images
    C: channels of a feature
    H, W: image height and width in pixels
"""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor

from .timm import TimmTrunk
from .vgg import VGGTrunk


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmTrunk:
    """Build a timm trunk with zero padding.

    Args:
        cfg: config; `MODEL.TIMM` and `MODEL.BACKBONE.FREEZE_AT` are read.
        input_shape: shape of the input; unused, because images have three channels.

    Returns:
        The trunk.

    Raises:
        UserError: see `TimmTrunk`.
    """
    timm = cfg.MODEL.TIMM
    return TimmTrunk(
        name=timm.NAME,
        pretrained=timm.PRETRAINED,
        norm=timm.NORM,
        padding="zeros",
        out_features=timm.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


class TrunkAndPyramid(Backbone):
    """A trunk with a feature pyramid (FPN). It returns the features of both, so that a detector can also use those of the trunk."""

    def __init__(self, *, trunk: Backbone, **pyramid: Any):
        """
        Args:
            trunk: trunk whose features are the input of the pyramid.
            pyramid: arguments of Detectron2's `FPN` except `bottom_up`.
        """
        super().__init__()
        self.trunk = trunk
        self.pyramid = FPN(bottom_up=_Passthrough(trunk.output_shape()), **pyramid)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features of trunk and pyramid.

        Args:
            x: normalised images (B, 3, H, W).

        Returns:
            Feature maps (B, C, H / stride, W / stride) by name.
        """
        features = self.trunk(x)
        return {**features, **self.pyramid(features)}

    @property
    def size_divisibility(self) -> int:
        """Divisor of the sides of images."""
        return max(self.trunk.size_divisibility, self.pyramid.size_divisibility)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and strides of the features, by name."""
        return {**self.trunk.output_shape(), **self.pyramid.output_shape()}


class _Passthrough(Backbone):
    """The `bottom_up` network of an FPN whose input is the features themselves, which it returns unchanged."""

    def __init__(self, shapes: dict[str, ShapeSpec]):
        super().__init__()
        self._shapes = dict(shapes)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return x

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TrunkAndPyramid:
    """Build a timm trunk with zero padding and a feature pyramid on the features `MODEL.FPN.IN_FEATURES`.

    The features s4, s8, s16 and s32 give the levels p2 to p5; a further level, such as p6, is made by max pooling of the coarsest one.

    Args:
        cfg: config; `MODEL.TIMM`, `MODEL.FPN` and `MODEL.BACKBONE.FREEZE_AT` are read.
        input_shape: shape of the input; unused, because images have three channels.

    Returns:
        The backbone.

    Raises:
        UserError: see `TimmTrunk`.
    """
    fpn = cfg.MODEL.FPN
    return TrunkAndPyramid(
        trunk=build_timm_backbone(cfg, input_shape),
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGGTrunk:
    """Build a VGG trunk with zero padding.

    Args:
        cfg: config; `MODEL.VGG` and `MODEL.BACKBONE.FREEZE_AT` are read.
        input_shape: shape of the input; unused, because images have three channels.

    Returns:
        The trunk.

    Raises:
        UserError: see `VGGTrunk`.
    """
    vgg = cfg.MODEL.VGG
    return VGGTrunk(
        variant=vgg.VARIANT, padding="zeros", out_features=vgg.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
