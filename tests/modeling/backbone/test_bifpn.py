"""The BiFPN backbone against stored features of the original network, and its pooling against a slow reference."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import numpy as np
import pytest
import torch
from detectron2.modeling import build_backbone
from sharpmask_d2.modeling.backbone.bifpn import BiFPN, halved, load_pyramid

LEVELS = ["p2", "p3", "p4", "p5", "p6", "p7"]


@pytest.fixture
def cfg(tiny_cfg):
    cfg = tiny_cfg.clone()
    cfg.MODEL.BACKBONE.NAME = "build_timm_bifpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.TIMM.OUT_FEATURES = ["s4", "s8", "s16", "s32"]
    return cfg


@pytest.mark.parametrize("norm", ["folded", "FrozenBN"])
def test_features_equal_those_of_the_original_network(cfg, shared, norm):
    cfg.MODEL.TIMM.PRETRAINED = str(shared / "weights" / "efficientdet_lite0_coco.npz")
    cfg.MODEL.TIMM.NORM = norm
    backbone = build_backbone(cfg).eval()
    with np.load(shared / "weights" / "efficientdet_lite0_reference.npz") as reference:
        image = torch.from_numpy(reference["image"]).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            features = backbone((image - 127) / 128)
        for name in reference.files:
            if name != "image":
                np.testing.assert_allclose(features[name].numpy(), reference[name], atol=1e-3, err_msg=name)


def test_levels_have_the_declared_sizes_and_channels(cfg):
    cfg.MODEL.BIFPN.CHANNELS, cfg.MODEL.BIFPN.NUM_CELLS = 8, 2
    backbone = build_backbone(cfg).eval()
    shapes = backbone.output_shape()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 128, 256))
    assert [shapes[name].stride for name in LEVELS] == [4, 8, 16, 32, 64, 128]
    for name in ["s4", "s8", "s16", "s32", *LEVELS]:
        stride = shapes[name].stride
        assert features[name].shape == (1, shapes[name].channels, 128 // stride, 256 // stride), name


def test_every_level_depends_on_all_inputs():
    torch.manual_seed(0)
    bifpn = BiFPN(in_channels=[3, 4, 5], channels=6, num_cells=1)
    inputs = [torch.randn(1, c, 16 // 2**i, 16 // 2**i, requires_grad=True) for i, c in enumerate([3, 4, 5])]
    for number, level in enumerate(bifpn(*inputs)):
        gradients = torch.autograd.grad(level.sum(), inputs, retain_graph=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients), f"p{number + 3}"


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (5, 3), (1, 2)])
def test_halving_is_max_pooling_with_the_padding_of_tensorflow(size):
    x = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0))
    result = halved(x)
    assert result.shape[2:] == tuple(-(-side // 2) for side in size)
    # TensorFlow's "SAME" pads (outputs - 1) * 2 + 3 - side cells in total, the smaller half of them before the first cell.
    before = [((-(-side // 2) - 1) * 2 + 3 - side) // 2 for side in size]
    for row in range(result.shape[2]):
        for column in range(result.shape[3]):
            top, left = 2 * row - before[0], 2 * column - before[1]
            cells = x[0, :, max(top, 0) : top + 3, max(left, 0) : left + 3]
            torch.testing.assert_close(result[0, :, row, column], cells.flatten(1).amax(dim=1))


def test_a_file_that_does_not_fit_the_bifpn_is_named_with_the_array(tmp_path):
    bifpn = BiFPN(in_channels=[3, 4, 5], channels=6, num_cells=1)
    arrays = {f"bifpn.{k}": v.numpy() for k, v in bifpn.state_dict().items()}
    path = str(tmp_path / "weights.npz")
    np.savez(path, **arrays)
    load_pyramid(bifpn, path)
    with pytest.raises(ValueError, match=r"weights\.npz does not fit the BiFPN at bifpn\.cells\.1\.0"):
        load_pyramid(BiFPN(in_channels=[3, 4, 5], channels=6, num_cells=2), path)


def test_a_trunk_without_a_needed_feature_is_an_error(cfg):
    cfg.MODEL.TIMM.OUT_FEATURES = ["s8", "s16", "s32"]
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.OUT_FEATURES is .* add \['s4'\], which a BiFPN needs"):
        build_backbone(cfg)


def test_a_file_that_does_not_fit_the_trunk_is_named_with_the_array(cfg, tmp_path):
    np.savez(tmp_path / "weights.npz", **{"trunk.conv_stem.weight": np.zeros((1, 3, 3, 3), np.float32)})
    cfg.MODEL.TIMM.PRETRAINED = str(tmp_path / "weights.npz")
    with pytest.raises(ValueError, match=r"weights\.npz does not fit the trunk at trunk\.conv_stem\.weight"):
        build_backbone(cfg)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_pyramid_trains_no_level(cfg, frozen):
    cfg.MODEL.BIFPN.FROZEN = frozen
    backbone = build_backbone(cfg)
    pyramid = backbone.bifpn, backbone.lateral, backbone.finest
    assert {p.requires_grad for module in pyramid for p in module.parameters()} == {not frozen}


def test_a_frozen_pyramid_from_a_file_still_trains_the_level_of_stride_4(cfg, shared):
    """The file has no weights of this level."""
    cfg.MODEL.TIMM.PRETRAINED = str(shared / "weights" / "efficientdet_lite0_coco.npz")
    cfg.MODEL.BIFPN.FROZEN = True
    backbone = build_backbone(cfg)
    assert not any(p.requires_grad for p in backbone.bifpn.parameters())
    assert all(p.requires_grad for p in (*backbone.lateral.parameters(), *backbone.finest.parameters()))
