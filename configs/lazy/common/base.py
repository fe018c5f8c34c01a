"""Parts that all LazyConfig files share: the released SharpMask on ResNet-50, its data, and Detectron2's training settings.

`mapper` and the size of the windows are set once and referenced elsewhere. sharpmask_d2/config.py explains the values.
"""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.layers import ShapeSpec
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from sharpmask_d2.data import PatchMapper, WindowSampler, build_patch_train_loader
from sharpmask_d2.engine.trainer import optimizer_params
from sharpmask_d2.evaluation import ProposalEvaluator
from sharpmask_d2.modeling.backbone import ResNetTrunk
from sharpmask_d2.modeling.image_pyramid.heads import WindowHead
from sharpmask_d2.modeling.image_pyramid.network import SharpMaskNetwork
from sharpmask_d2.modeling.image_pyramid.refinement import SharpMaskRefinement
from sharpmask_d2.modeling.meta_arch import SharpMaskProposalNetwork
from sharpmask_d2.modeling.proposal_generator import ImagePyramid

mapper = L(PatchMapper)(
    sampler=L(WindowSampler)(
        window_size="${mapper.window_size}",
        exponents="${model.pyramid.exponents}",
        mask_fraction=0.5,
        shared_positives=False,
        near_negatives=0.0,
        label_rule={"positive_shift": 16.0, "positive_octaves": 0.25, "negative_shift": 48.0, "negative_octaves": 2.5},
    ),
    window_size=160,
    context=32,
    mask_size="${mapper.window_size}",
    patches_per_image=4,
    image_format="RGB",
    flip=True,
    min_area=100.0,
    min_side=5.0,
    # The loader sets the weights if it balances categories.
    category_weights={},
    color_jitter=0.0,
)

model = L(SharpMaskProposalNetwork)(
    pyramid=L(ImagePyramid)(
        network=L(SharpMaskNetwork)(
            trunk=L(ResNetTrunk)(
                depth=50,
                stride_in_1x1=False,
                norm="FrozenBN",
                padding="mirrored",
                out_features=["res4", "res3", "res2", "conv1"],
                freeze_at=0,
            ),
            in_feature="res4",
            head=L(WindowHead)(
                variant="C",
                in_channels=1024,
                # window_size / stride of in_feature
                window_cells=10,
                reduced_channels=128,
                embed_dim=512,
                score_dim=1024,
            ),
            mask_branch=L(SharpMaskRefinement)(
                features=L("builtins.dict")(
                    res4=L(ShapeSpec)(channels=1024, stride=16),
                    res3=L(ShapeSpec)(channels=512, stride=8),
                    res2=L(ShapeSpec)(channels=256, stride=4),
                    conv1=L(ShapeSpec)(channels=64, stride=2),
                ),
                embed_dim="${..head.embed_dim}",
                window_size="${mapper.window_size}",
                channels=32,
                schedule="b",
                vertical_convs=2,
                horizontal_convs=3,
                upsampling="nearest",
            ),
            window_size="${mapper.window_size}",
            context="${mapper.context}",
            pixel_mean=[123.675, 116.28, 103.53],
            pixel_std=[58.395, 57.12, 57.375],
            resizing="released",
            freeze_feedforward=False,
        ),
        exponents=[-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5],
        grid_stride=16,
        num_proposals=1000,
        mask_threshold=0.2,
        nms_thresh=1.0,
        windows_per_batch=128,
    ),
    mapper="${mapper}",
    flip_channels=False,
    mask_loss_weight=32.0,
    score_loss_weight=1.0,
)

dataloader = {
    "train": L(build_patch_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2014_train", filter_empty=True),
        mapper="${mapper}",
        total_batch_size=8,
        balance_categories=True,
        num_workers=2,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2014_minival", filter_empty=False),
        # Images are not resized, because the scales of the image pyramid refer to their original size.
        mapper=L(DatasetMapper)(is_train=False, augmentations=[], image_format="${mapper.image_format}"),
        num_workers=2,
    ),
    "evaluator": L(ProposalEvaluator)(dataset_name="${..test.dataset.names}"),
}

optimizer = L(torch.optim.SGD)(
    params=L(optimizer_params)(base_lr="${..lr}", trunk_multiplier=1.0, weight_decay="${..weight_decay}"),
    lr=0.001,
    momentum=0.9,
    weight_decay=0.0005,
)

# 300 epochs of 4000 batches; lr / 2 from epoch 51, lr / 10 from epoch 121.
lr_multiplier = L(WarmupParamScheduler)(
    # The last milestone is the end of the training. Another `train.max_iter` scales all milestones.
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.5, 0.1], milestones=[200000, 480000, 1200000]),
    warmup_factor=0.0,
    warmup_length=0.0,
)

train = {
    "output_dir": "./output",
    "init_checkpoint": "",
    "max_iter": 1200000,
    # Detectron2's trainer with mixed precision requires CUDA. With CUDA, train.amp.enabled=True is faster.
    "amp": {"enabled": False},
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "checkpointer": {"period": 4000, "max_to_keep": 100},
    "eval_period": 40000,
    "log_period": 20,
    "device": "cuda",
}
