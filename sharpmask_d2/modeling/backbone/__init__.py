"""Backbones: the trunks ResNet, VGG and timm, alone or with a feature pyramid (FPN or BiFPN)."""

from .bifpn import BiFPN, BiFPNBackbone, build_timm_bifpn_backbone
from .detector import build_timm_backbone, build_timm_fpn_backbone, build_vgg_backbone
from .features import trunk_features
from .resnet import ResNetTrunk, build_resnet_trunk
from .timm import TimmTrunk, build_timm_trunk
from .vgg import VGGTrunk, build_vgg_trunk

__all__ = [
    "BiFPN",
    "BiFPNBackbone",
    "ResNetTrunk",
    "TimmTrunk",
    "VGGTrunk",
    "build_resnet_trunk",
    "build_timm_backbone",
    "build_timm_bifpn_backbone",
    "build_timm_fpn_backbone",
    "build_timm_trunk",
    "build_vgg_backbone",
    "build_vgg_trunk",
    "trunk_features",
]
