"""Fused kernels, compared with plain layers, and the test that excludes missing or wrong kernels."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import logging
import re

import pytest
import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from sharpmask_d2.inference.fused import FusedConv2d, FusedLinear, can_fuse, fuse_layers
from sharpmask_d2.inference.preparation import autocast, prepare_for_inference
from sharpmask_d2.modeling.backbone.resnet import ResNetTrunk
from sharpmask_d2.modeling.backbone.timm import TimmTrunk
from sharpmask_d2.modeling.image_pyramid.refinement import RefinementModule
from sharpmask_d2.modeling.layers import MirroredConv2d, fold_batch_norm
from torch import nn

pytestmark = pytest.mark.skipif(not can_fuse(torch.float32), reason="needs oneDNN")
needs_bfloat16 = pytest.mark.skipif(not can_fuse(torch.bfloat16), reason="needs a processor with bfloat16")


def _trunk(kind: str, padding: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "lite0":
        features = ["s2", "s4", "s8", "s16"]
        trunk = TimmTrunk(
            name="tf_efficientnet_lite0", pretrained="", norm="folded", padding=padding, out_features=features
        )
    else:
        features = ["conv1", "res2", "res3", "res4"]
        depth = int(kind[1:])
        trunk = ResNetTrunk(depth=depth, stride_in_1x1=True, norm="FrozenBN", padding=padding, out_features=features)
    for name, tensor in trunk.state_dict().items():
        if name.endswith("bias"):
            tensor.normal_(0, 0.1)
    return fold_batch_norm(trunk.eval()).requires_grad_(False)


def _fused(module: nn.Module) -> list:
    return [m for m in module.modules() if isinstance(m, FusedConv2d)]


@pytest.mark.parametrize("kind", ["R50", "R18", "lite0"])
@pytest.mark.parametrize("padding", ["mirrored", "zeros"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_trunks_compute_the_features_of_plain_layers(kind, padding, layout):
    trunk = _trunk(kind, padding)
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    given = images.clone()
    expected = trunk(images)
    names = set(trunk.state_dict())
    found = fuse_layers(trunk)(images)
    assert torch.equal(images, given)
    # The test fails if a block overwrites a feature that is returned.
    for name, feature in expected.items():
        assert feature.abs().max() > 0.1
        torch.testing.assert_close(found[name], feature, atol=1e-4 * float(feature.abs().max()), rtol=1e-4)
    assert _fused(trunk)
    assert set(trunk.state_dict()) == names


@needs_bfloat16
@pytest.mark.parametrize("kind", ["R50", "lite0"])
def test_fused_trunks_in_bfloat16_are_as_exact_as_autocast(kind):
    trunk = _trunk(kind, "mirrored")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    exact = trunk(images)
    with autocast(torch.device("cpu"), "bfloat16"):
        rounded = trunk(images)
        found = prepare_for_inference(trunk, "bfloat16")(images)
    for name, feature in exact.items():
        assert found[name].dtype == torch.bfloat16
        spread = float((rounded[name].float() - feature).square().mean().sqrt())
        assert float((found[name].float() - feature).square().mean().sqrt()) <= 1.2 * spread


def test_an_activation_is_fused_only_if_it_is_known_to_follow_the_convolution():
    conv = nn.Conv2d(3, 4, 3)
    sequence = nn.Sequential(
        conv, nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.SiLU(), MirroredConv2d(nn.Conv2d(4, 4, 3, padding=1))
    )
    x = 8 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sequence(x)
        assert sequence[1](conv(x)).max() == 6
        found = fuse_layers(sequence)(x)
    torch.testing.assert_close(found, expected)
    assert len(_fused(sequence)) == 1

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x):
            return self.relu(self.conv(self.relu(x)))

    assert not _fused(fuse_layers(Block()))
    assert not _fused(fuse_layers(nn.ModuleList([nn.Conv2d(3, 3, 1), nn.ReLU()])))


@pytest.mark.parametrize("upsampled", [False, True])
def test_only_the_skip_path_of_a_refinement_module_is_fused(upsampled):
    from detectron2.layers import ShapeSpec

    torch.manual_seed(0)
    options = {"vertical_convs": 2, "horizontal_convs": 3, "upsampling": "nearest"}
    module = RefinementModule(ShapeSpec(channels=16, stride=8), 8, 4, **options)
    encoding = torch.randn(3, 8, *([5, 5] if upsampled else [10, 10]))
    feature = torch.randn(3, 16, 10, 10)
    with torch.no_grad():
        expected = module(encoding, module.horizontal(feature))
        fuse_layers(module)
        found = module(encoding, module.horizontal(feature))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(_fused(module)) == len(_fused(module.horizontal)) == 2


def test_bottlenecks_with_a_norm_are_not_fused():
    trunk = ResNetTrunk(depth=50, stride_in_1x1=True, norm="FrozenBN", padding="zeros", out_features=["res2"])
    fuse_layers(trunk)
    assert not _fused(trunk)


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (7, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_linear_layers_compute_the_outputs_of_plain_layers(shape, bias):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.ReLU(), nn.Linear(6, 4)).requires_grad_(False)
    x = torch.randn(shape)
    # The input is not contiguous.
    x = x.transpose(0, -1).contiguous().transpose(0, -1)
    expected = layers(x)
    found = fuse_layers(layers)(x)
    assert any(isinstance(m, FusedLinear) for m in layers)
    torch.testing.assert_close(found, expected)


@needs_bfloat16
def test_outputs_of_fused_linear_layers_have_the_dtype_of_their_weights():
    linear = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(9, 64)
    with autocast(torch.device("cpu"), "bfloat16"):
        expected = linear(x)
        found = prepare_for_inference(nn.Sequential(linear), "bfloat16")(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_fused_blocks_accept_an_empty_batch(dtype):
    blocks = _trunk("R50", "zeros").stages[1]
    with autocast(torch.device("cpu"), dtype):
        found = prepare_for_inference(nn.Sequential(blocks), dtype)(torch.zeros(0, 256, 14, 14))
    assert found.shape == (0, 512, 7, 7)


def test_a_bottleneck_without_projection_does_not_overwrite_the_input_of_its_stage():
    torch.manual_seed(0)
    blocks = [BottleneckBlock(8, 8, bottleneck_channels=4, norm="") for _ in range(2)]
    stage = nn.Sequential(*blocks).requires_grad_(False)
    assert [block.shortcut for block in blocks] == [None, None]
    x = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    given, expected = x.clone(), stage(x)
    torch.testing.assert_close(fuse_layers(stage)(x), expected)
    assert torch.equal(x, given)
    assert _fused(stage)


@pytest.fixture
def forgotten():
    """Makes the test of kernels run again, as in a new process, before and after the test."""
    can_fuse.cache_clear()
    yield
    can_fuse.cache_clear()


def missing(*arguments):
    raise NotImplementedError("Could not run 'mkldnn::_convolution_pointwise'\nwith arguments from the 'CPU' backend")


def without_activation(x, weight, bias, padding, stride, dilation, groups, *post_operation):
    return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


def without_bias(x, weight, bias, *post_operation):
    return nn.functional.linear(x, weight)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("operator", "kernel", "reason"),
    [
        ("_convolution_pointwise", missing, r"Could not run 'mkldnn::_convolution_pointwise'$"),
        ("_convolution_pointwise", without_activation, r"a convolution with ReLU is off by \S+ of its largest output$"),
        ("_linear_pointwise", without_bias, r"a linear layer with bias is off by \S+ of its largest output$"),
    ],
)
def test_missing_or_wrong_kernels_are_not_used_and_logged_in_one_line(monkeypatch, caplog, operator, kernel, reason):
    monkeypatch.setattr(torch.ops.mkldnn, operator, kernel)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(6, 5))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(prepare_for_inference(model)(x), expected)
    (record,) = caplog.records
    assert record.getMessage().startswith("plain layers are used on the CPU in torch.float32")
    assert re.search(reason, record.getMessage())


@pytest.mark.usefixtures("forgotten")
def test_the_test_of_kernels_changes_neither_random_numbers_nor_autocast(caplog):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert can_fuse(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert not caplog.records
