"""Stage 1 of the released SharpMask: DeepMask on ResNet-50."""

from detectron2.config import LazyCall as L
from sharpmask_d2.modeling.image_pyramid.heads import CoarseMask

from .common.base import dataloader, lr_multiplier, mapper, model, optimizer, train  # noqa: F401

model.pyramid.network.mask_branch = L(CoarseMask)(embed_dim="${..head.embed_dim}", mask_size=56)
model.pyramid.network.trunk.out_features = ["res4"]
# Twice the side of the coarse mask.
mapper.mask_size = 112

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "output/lazy_deepmask_R_50"
