"""Stage 2 of the released SharpMask: train.init_checkpoint names the DeepMask model of stage 1."""

from .common.base import dataloader, lr_multiplier, mapper, model, optimizer, train  # noqa: F401

model.pyramid.network.freeze_feedforward = True
mapper.sampler.mask_fraction = 1.0

optimizer.momentum = 0.0
optimizer.weight_decay = 0.0
# lr / 2 from epoch 51, lr / 10 from epoch 81
lr_multiplier.scheduler.milestones = [200000, 320000, 1200000]

train.init_checkpoint = "output/lazy_deepmask_R_50/model_final.pth"
train.output_dir = "output/lazy_sharpmask_R_50"
