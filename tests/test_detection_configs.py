"""Every file in configs/detection/ builds its detector; trunks are the backbones of detectors."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from drawing import ROOT, draw_example
from sharpmask_d2 import add_sharpmask_config
from sharpmask_d2.engine.trainer import reads_proposal_masks
from sharpmask_d2.modeling.backbone import VGGTrunk

CONFIGS = ROOT / "configs" / "detection"
# Features of a BiFPN and of its trunk, and their strides.
BIFPN = {"s4": 4, "s8": 8, "s16": 16, "s32": 32, "p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
# Name -> RoI heads, strides of the features of the backbone.
MODELS = {
    "fast_rcnn_VGG16": ("ProposalMaskROIHeads", {"conv5": 16}),
    "multipath_VGG16": ("MultiPathROIHeads", {"conv3": 4, "conv4": 8, "conv5": 16}),
    "fast_rcnn_R_50_C4": ("ProposalMaskRes5ROIHeads", {"res4": 16}),
    "fast_rcnn_R_50_FPN": ("ProposalMaskROIHeads", {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}),
    "sharpmask_fpn_rcnn_R_50_FPN": ("ProposalMaskROIHeads", {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}),
    "fast_rcnn_lite0": ("ProposalMaskROIHeads", {"s16": 16}),
    "faster_rcnn_lite0": ("StandardROIHeads", {"s16": 16}),
    "multipath_lite0": ("MultiPathROIHeads", {"s8": 8, "s16": 16, "s32": 32}),
    "multipath_bifpn_lite0": ("MultiPathROIHeads", BIFPN),
    "mask_head_bifpn_lite0": ("StandardROIHeads", BIFPN),
    "sharpmask_head_bifpn_lite0": ("StandardROIHeads", BIFPN),
}


def load_yaml(name: str):
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    # The package with the weights may be missing.
    cfg.MODEL.TIMM.PRETRAINED = ""
    return cfg


def test_every_yaml_file_is_tested():
    names = {path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("Base-")}
    assert names == set(MODELS) | {"rpn_fpn_lite0", "mask_rcnn_agnostic_lite0"}


@pytest.mark.parametrize("name", MODELS)
def test_yaml_builds_its_detector(name):
    heads, strides = MODELS[name]
    cfg = load_yaml(name)
    # The layer fc6 of VGG has 100 million parameters.
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    model = build_model(cfg)
    assert type(model.roi_heads).__name__ == heads
    assert {k: v.stride for k, v in model.backbone.output_shape().items()} == strides
    assert model.roi_heads.num_classes == 80
    assert (model.proposal_generator is None) == cfg.MODEL.LOAD_PROPOSALS
    assert f"output/{name}" == cfg.OUTPUT_DIR


def test_masks_of_precomputed_proposals_are_read_for_heads_that_keep_them():
    read = {name for name in MODELS if reads_proposal_masks(load_yaml(name))}
    online = {
        "faster_rcnn_lite0",
        "mask_head_bifpn_lite0",
        "multipath_bifpn_lite0",
        "sharpmask_fpn_rcnn_R_50_FPN",
        "sharpmask_head_bifpn_lite0",
    }
    assert read == set(MODELS) - online


def test_schedule_of_the_multipath_paper():
    cfg = load_yaml("multipath_VGG16")
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, solver.STEPS) == (4, 0.001, 320000, (280000,))
    assert (cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION) == (64, 0.25)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((800,), 1000)
    assert (cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN, cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST) == (1000, 400)
    assert (cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE) == (0.3, 100)


def test_vgg_weights_of_torchvision_can_be_loaded(tmp_path):
    cfg = load_yaml("fast_rcnn_VGG16")
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    trunk = VGGTrunk(variant="D", padding="zeros", out_features=["conv5"])
    weights = {name: value.numpy() for name, value in trunk.state_dict().items()}
    path = tmp_path / "vgg16.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "torchvision", "matching_heuristics": True}))
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(path))
    for name, value in trunk.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value)
    frozen = {name for name, p in model.backbone.named_parameters() if not p.requires_grad}
    # Two convolutions in each of the first two stages.
    assert len(frozen) == 8


def test_levels_of_a_pyramid_on_a_timm_backbone():
    cfg = load_yaml("fast_rcnn_lite0")
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.TIMM.OUT_FEATURES = ["s8", "s16", "s32"]
    cfg.MODEL.FPN.IN_FEATURES = ["s8", "s16", "s32"]
    cfg.MODEL.FPN.OUT_CHANNELS = 24
    backbone = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 64, 96))
    assert {name: tuple(x.shape[1:]) for name, x in features.items()} == {
        "s8": (40, 8, 12),
        "s16": (112, 4, 6),
        "s32": (320, 2, 3),
        "p3": (24, 8, 12),
        "p4": (24, 4, 6),
        "p5": (24, 2, 3),
        "p6": (24, 1, 2),
    }


def test_peers_of_the_feature_pyramid_model_differ_by_their_heads_alone():
    rpn, mask_rcnn = (load_yaml(name) for name in ("rpn_fpn_lite0", "mask_rcnn_agnostic_lite0"))
    for section in ("INPUT", "SOLVER", "DATALOADER", "SEED"):
        assert mask_rcnn[section] == rpn[section]
    for section in ("BACKBONE", "FPN", "TIMM", "PIXEL_MEAN", "PIXEL_STD", "MASK_ON"):
        assert mask_rcnn.MODEL[section] == rpn.MODEL[section]
    shapes = {name: x.shape for name, x in build_model(rpn).backbone.state_dict().items()}
    model = build_model(mask_rcnn)
    assert {name: x.shape for name, x in model.backbone.state_dict().items()} == shapes
    assert (model.roi_heads.num_classes, mask_rcnn.TEST.DETECTIONS_PER_IMAGE) == (1, 1000)


def mask_rcnn_R_50_FPN():
    """Detectron2's Mask R-CNN on a ResNet-50 feature pyramid, with this package's mask head, as a `CfgNode`."""
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 2000, 1000
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 1000
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 2
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME, cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "SharpMaskHead", ""
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True
    cfg.MODEL.SHARPMASK.EMBED_DIM = 256
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 2
    return cfg


def test_the_lazy_config_of_the_mask_head_trains_and_detects_as_its_yaml_would():
    lazy = instantiate(LazyConfig.load(str(CONFIGS / "mask_rcnn_sharpmask_head_R_50_FPN.py")).model)
    torch.manual_seed(0)
    model = build_model(mask_rcnn_R_50_FPN())
    assert {name: type(part) for name, part in lazy.named_modules()} == {
        name: type(part) for name, part in model.named_modules()
    }
    lazy.load_state_dict(model.state_dict())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in lazy.named_parameters() if not p.requires_grad}
    image, gt = draw_example([(20, 20, 80, 60), (3, 2, 40, 90)], (96, 128), kind="bitmap")
    gt.gt_classes = torch.tensor([0, 79])
    inputs = [{"image": 255 * image, "instances": gt, "height": 96, "width": 128}]
    losses = []
    for detector in (model.train(), lazy.train()):
        torch.manual_seed(1)  # RPN and RoI heads sample
        with EventStorage():
            losses.append(detector(inputs))
    assert losses[1].keys() >= {"loss_mask", "loss_mask_dice", "loss_mask_side", "loss_rpn_cls", "loss_cls"}
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[1].items():
        assert loss.item() == pytest.approx(losses[0][name].item(), rel=1e-4), name
    sum(losses[1].values()).backward()
    assert all(p.grad is not None for p in lazy.roi_heads.mask_head.parameters())
    with torch.no_grad():
        windows = [x.eval().roi_heads.mask_head.canonical_windows(gt.gt_boxes.tensor) for x in (model, lazy)]
        assert torch.equal(*windows)
        found = lazy(inputs)[0]["instances"]
    assert found.pred_masks.shape == (len(found), 96, 128)


def test_the_lazy_config_of_the_mask_head_has_a_whole_training():
    cfg = LazyConfig.load(str(CONFIGS / "mask_rcnn_sharpmask_head_R_50_FPN.py"))
    cfg.optimizer.params.model = torch.nn.Linear(2, 2)
    optimizer = instantiate(cfg.optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.02
    multiplier = instantiate(cfg.lr_multiplier)
    assert [multiplier(step / cfg.train.max_iter) for step in (2000, 70000, 85000)] == [1.0, 0.1, 0.01]
    assert instantiate(cfg.dataloader.train.mapper).use_instance_mask
    assert cfg.dataloader.evaluator.dataset_name == cfg.dataloader.test.dataset.names == "coco_2017_val"


def test_peers_of_the_mask_head_differ_by_the_mask_head_alone():
    ours, peer = (load_yaml(name) for name in ("sharpmask_head_bifpn_lite0", "mask_head_bifpn_lite0"))
    assert (ours.MODEL.ROI_MASK_HEAD.NAME, ours.MODEL.ROI_MASK_HEAD.POOLER_TYPE) == ("SharpMaskHead", "")
    for cfg in (ours, peer):
        cfg.OUTPUT_DIR = cfg.MODEL.ROI_MASK_HEAD.NAME = cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
    assert ours == peer
