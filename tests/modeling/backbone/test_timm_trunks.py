"""Trunks from timm: features against those of timm, with merged batch norms and mirrored padding; errors for unusable networks."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sharpmask_d2.inference.preparation import prepare_for_inference
from sharpmask_d2.modeling.backbone import TimmTrunk
from sharpmask_d2.modeling.layers import MergedNorm, fold_batch_norm
from torch import nn

FAMILIES = [
    "edgenext_xx_small",
    # The first feature of GhostNet lies between a convolution and its batch norm.
    "ghostnet_050",
    "mobilenetv3_small_050",
    "regnetx_002",
    # RepViT adds a convolution and an identity before a batch norm that is listed directly after another convolution.
    "repvit_m0_9",
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_resnet",
]
STANDARDIZED = ["resnetv2_50x1_bit", "test_nfnet"]


@pytest.fixture(autouse=True)
def needs_the_network(request):
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name and not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    """Every network that timm creates has the same random weights and batch norm statistics."""
    create = timm.create_model

    def create_random(name, **options):
        torch.manual_seed(0)
        net = create(name, **options)
        generator = torch.Generator().manual_seed(0)
        for key, tensor in net.state_dict().items():
            if key.endswith(("running_mean", "bias")):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif tensor.dim() == 1:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        return net

    monkeypatch.setattr(timm, "create_model", create_random)


def plain(name: str) -> tuple:
    """The network of timm, and the names of its features in a trunk."""
    net = timm.create_model(name, features_only=True).eval()
    return net, [f"s{stride}" for stride in net.feature_info.reduction()]


def trunk_of(name: str, features: list, **options) -> TimmTrunk:
    options = {"norm": "BN", "padding": "zeros", **options}
    return TimmTrunk(name=name, pretrained="", out_features=features, **options).eval()


def image(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_same(found: dict, features: list, expected: list) -> None:
    assert len(features) == len(expected) > 1
    for name, feature in zip(features, expected):
        error = (found[name] - feature).abs().max() / feature.abs().max()
        assert error < 1e-3, f"{name} is off by {error:.1%}"


@pytest.mark.parametrize("name", [*FAMILIES, "test_nfnet"])
@torch.no_grad()
def test_features_equal_those_of_timm(name):
    net, features = plain(name)
    expected = net(image())
    for norm in ("FrozenBN", "folded"):
        trunk = trunk_of(name, features, norm=norm)
        assert_same(trunk(image()), features, expected)
        assert_same(prepare_for_inference(trunk)(image()), features, expected)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_mirrored_padding_applies_to_every_convolution(name, monkeypatch):
    net, features = plain(name)
    trunk = trunk_of(name, features, norm="folded", padding="mirrored")
    unpadded = F.conv2d

    def mirrored(x, weight, bias, stride, padding, dilation, groups):
        y, x_ = padding
        x = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (y, y), (x_, x_)), mode="symmetric"))
        return unpadded(x, weight, bias, stride, 0, dilation, groups)

    # The coarsest feature is large enough for mirrored kernels of 9 x 9.
    inputs = image(128, 160)
    with monkeypatch.context() as patched:
        patched.setattr(F, "conv2d", mirrored)
        expected = net(inputs)
    assert (expected[-1] - net(inputs)[-1]).abs().max() > 0.02 * expected[-1].abs().max()
    assert_same(trunk(inputs), features, expected)


@pytest.mark.parametrize("name", STANDARDIZED)
def test_weight_standardized_convolutions_cannot_be_mirrored(name):
    with pytest.raises(ValueError, match=r"StdConv2d is not a plain convolution: choose 'zeros' for \S*TRUNK\.PADDING"):
        trunk_of(name, ["s4"], padding="mirrored")


def test_batch_norms_that_are_not_merged_are_frozen():
    _, features = plain("ghostnet_050")
    trunk = trunk_of("ghostnet_050", features, norm="folded").train()
    assert any(isinstance(module, MergedNorm) for module in trunk.modules())
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items() if "running" in name}
    assert before
    trunk(image())
    assert all(torch.equal(trunk.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(name.startswith("net.bn1") for name, _ in trunk.named_parameters())


# MaxViT accepts images of one size only, Xception does not pad, and the features of MambaOut have their channels last.
@pytest.mark.parametrize("name", ["test_maxvit", "legacy_xception", "test_mambaout"])
def test_a_network_that_cannot_be_a_trunk_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} cannot be a trunk: "):
        trunk_of(name, ["s4", "s8"])


@torch.no_grad()
def test_features_have_their_stride_although_timm_omits_the_finest():
    # The feature of stride 1 has the number 0, and timm omits it by default.
    net, features = plain("dla46_c")
    assert features[0] == "s2"
    found = trunk_of("dla46_c", ["s16", "s4"])(image())
    expected = dict(zip(features, net(image())))
    assert_same(found, ["s4", "s16"], [expected["s4"], expected["s16"]])


# Features that are activations without parameters; module names with underscores; a network nested in a module.
@pytest.mark.parametrize(
    ("name", "norm"), [("test_resnet", "BN"), ("ghostnet_050", "folded"), ("xception41", "BN"), ("cspnext_s", "folded")]
)
def test_layers_up_to_the_feature_are_frozen(name, norm):
    _, features = plain(name)
    found = trunk_of(name, features[:2], norm=norm, freeze_at=1)(image())
    assert [found[feature].requires_grad for feature in features[:2]] == [False, True]


def test_freezing_a_feature_without_a_module_is_an_error():
    with pytest.raises(ValueError, match="FREEZE_AT must be 0"):
        trunk_of("hrnet_w18_small", ["s2", "s32"], freeze_at=1)


class _Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def _with_weight_norm() -> nn.Module:
    return torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 1))


def _with_parametrization() -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))


@pytest.mark.parametrize("make", [lambda: _Standardized(3, 4, 1), _with_weight_norm, _with_parametrization])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
@torch.no_grad()
def test_batch_norm_is_merged_into_plain_convolutions_only(make):
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)).eval()
    net[1].running_mean.normal_()
    expected = net(image())
    found = fold_batch_norm(net)(image())
    torch.testing.assert_close(found, expected)
    assert isinstance(net[1], nn.BatchNorm2d)
