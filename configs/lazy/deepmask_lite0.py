"""Stage 1 of the small image-pyramid model: DeepMask on EfficientNet-Lite0 (configs/deepmask_lite0.yaml)."""

import torch
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import CosineParamScheduler
from sharpmask_d2.modeling.backbone import TimmTrunk
from sharpmask_d2.modeling.image_pyramid.heads import CoarseMask

from .common.base import dataloader, lr_multiplier, mapper, model, optimizer, train

network = model.pyramid.network
network.trunk = L(TimmTrunk)(
    name="tf_efficientnet_lite0",
    pretrained="package",
    norm="folded",
    # The ImageNet weights were trained with zero padding, which is also twice as fast here. A wider context keeps windows away from the
    # borders of patches.
    padding="zeros",
    out_features=["s16"],
    freeze_at=3,
)
network.in_feature = "s16"
network.head.in_channels = 112
network.head.reduced_channels = 96
network.head.embed_dim = 256
network.mask_branch = L(CoarseMask)(embed_dim="${..head.embed_dim}", mask_size=56)
network.pixel_mean = [127.0, 127.0, 127.0]
network.pixel_std = [128.0, 128.0, 128.0]
network.resizing = "antialiased"
model.score_loss_weight = 4.0

mapper.context = 64
# Twice the side of the coarse mask.
mapper.mask_size = 112
mapper.color_jitter = 0.2
mapper.sampler.shared_positives = True
mapper.sampler.near_negatives = 0.5
mapper.sampler.label_rule.negative_shift = 32.0
mapper.sampler.label_rule.negative_octaves = 1.0
dataloader.train.balance_categories = False

optimizer._target_ = torch.optim.AdamW
del optimizer.momentum
optimizer.weight_decay = 0.05
optimizer.params.trunk_multiplier = 0.3
lr_multiplier.scheduler = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
lr_multiplier.warmup_factor = 0.001
# 200 iterations
lr_multiplier.warmup_length = 200 / 3600

train.max_iter = 3600
train.checkpointer.period = 250
train.eval_period = 0
train.seed = 1
train.output_dir = "output/lazy_deepmask_lite0"
# LazyConfig must contain only the parts of a config.
del network
