"""The trunks as backbones of detectors, configured apart from a proposal generator's own trunk."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool

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


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """The same under a feature pyramid from MODEL.FPN: p2 .. p5 of s4 .. s32, and p6 by pooling."""
    fpn = cfg.MODEL.FPN
    return FPN(
        bottom_up=build_timm_backbone(cfg, input_shape),
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
