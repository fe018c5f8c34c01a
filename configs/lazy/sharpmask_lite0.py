"""Stage 2 of the small image-pyramid model (configs/sharpmask_lite0.yaml); train.init_checkpoint names the DeepMask model of stage 1."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from .common.base import model as released
from .deepmask_lite0 import dataloader, lr_multiplier, mapper, model, optimizer, train  # noqa: F401

model.pyramid.network.mask_branch = released.pyramid.network.mask_branch
model.pyramid.network.mask_branch.features = L("builtins.dict")(
    s16=L(ShapeSpec)(channels=112, stride=16),
    s8=L(ShapeSpec)(channels=40, stride=8),
    s4=L(ShapeSpec)(channels=24, stride=4),
    s2=L(ShapeSpec)(channels=16, stride=2),
)
model.pyramid.network.trunk.out_features = ["s16", "s8", "s4", "s2"]
model.pyramid.network.freeze_feedforward = True
mapper.mask_size = "${mapper.window_size}"
mapper.sampler.mask_fraction = 1.0
dataloader.train.total_batch_size = 4

lr_multiplier.warmup_length = 200 / 4000
train.max_iter = 4000
train.init_checkpoint = "output/lazy_deepmask_lite0/model_final.pth"
train.output_dir = "output/lazy_sharpmask_lite0"
del released
