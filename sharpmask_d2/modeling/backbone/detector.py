"""The trunks as backbones of detectors, configured apart from a proposal generator's own trunk."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor

from .timm import TimmTrunk
from .vgg import VGGTrunk


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmTrunk:
    """A timm backbone from MODEL.TIMM, with zero padding."""
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
    """A trunk and a feature pyramid on it, with the features of both: a detector may classify by those that the pyramid did not change."""

    def __init__(self, *, trunk: Backbone, **pyramid):
        """
        Args:
            trunk: gives the features that the pyramid reads.
            pyramid: the other arguments of Detectron2's FPN.
        """
        super().__init__()
        self.trunk = trunk
        self.pyramid = FPN(bottom_up=_Handover(trunk.output_shape()), **pyramid)

    def forward(self, x: Tensor) -> dict:
        """Normalised images (B, 3, H, W) to the features of trunk and pyramid."""
        features = self.trunk(x)
        return {**features, **self.pyramid(features)}

    @property
    def size_divisibility(self) -> int:
        return max(self.trunk.size_divisibility, self.pyramid.size_divisibility)

    def output_shape(self) -> dict:
        return {**self.trunk.output_shape(), **self.pyramid.output_shape()}


class _Handover(Backbone):
    """In the place of the network under a pyramid: hands on features that are there already."""

    def __init__(self, shapes: dict):
        super().__init__()
        self._shapes = dict(shapes)

    def forward(self, x: dict) -> dict:
        return x

    def output_shape(self) -> dict:
        return self._shapes


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> TrunkAndPyramid:
    """The same and a feature pyramid from MODEL.FPN: s4 .. s32 as in MODEL.TIMM.OUT_FEATURES, p2 .. p5 of them, and p6 by pooling."""
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
def build_vgg_backbone(cfg, input_shape: ShapeSpec) -> VGGTrunk:
    """A VGG backbone from MODEL.VGG, with zero padding."""
    vgg = cfg.MODEL.VGG
    return VGGTrunk(
        variant=vgg.VARIANT, padding="zeros", out_features=vgg.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
