"""The interpreter of Torch7's modules against the original's outputs and finite differences; drawn models against published ones."""

import gzip

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch7_network
from sharpmask_d2.torch7.reader import TorchObject, parse_torch7
from torch7_models import draw_deepmask, draw_sharpmask, published
from torch7_network import Literal, LiteralDeepMask, LiteralSharpMask, SoftMarginCriterion, scaled_mask_gradient
from torch7_writer import Object, Storage, dumps

TOLERANCE = 1e-4
SMALL = {"blocks": (1, 1, 1), "reduced": 4, "embed": 6, "score": 5, "window": 64, "coarse": 12, "side": 24}


def read(value):
    return parse_torch7(dumps(value))


def literal(class_name: str, **fields) -> Literal:
    return Literal(read(Object(class_name, **fields)))


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def weights(*shape, seed: int = 1) -> np.ndarray:
    return normal(*shape, seed=seed).numpy().astype(np.float32)


# ---------------------------------------------------------------------- the original


@pytest.fixture(scope="module")
def published_models(shared) -> dict:
    """ "deepmask" and "sharpmask": what the original's files hold."""
    folder = shared / "torch7"
    return {
        name: parse_torch7(gzip.decompress((folder / f"{name}_model.t7.gz").read_bytes()))
        for name in ("deepmask", "sharpmask")
    }


def test_forward_equals_the_originals_outputs(shared, published_models):
    reference = dict(np.load(shared / "torch7" / "reference_patches.npz"))
    patches = reference.pop("patches")
    # As precise as the original computed.
    sharpmask = LiteralSharpMask(published_models["sharpmask"]["model"], dtype=torch.float32)
    deepmask = LiteralDeepMask(published_models["deepmask"]["model"], dtype=torch.float32)
    got = {"sharpmask_mask160": sharpmask.forward(patches), **sharpmask.stages}
    # The mask branch is DeepMask's own; both files hold the same trunk, which need not run twice.
    for path, layer in deepmask.trunk.layers.items():
        for name in {"weight", "bias", "a", "b"} & set(layer.fields):
            np.testing.assert_array_equal(layer.fields[name], sharpmask.trunk.layers[path].fields[name])
    deepmask.mask_branch.forward(got["trunk_out"])
    got["deepmask_mask56"] = deepmask.coarse_mask
    got["score"] = deepmask.score_branch.forward(got["trunk_out"])
    assert set(got) == set(reference)
    errors = {
        name: float(np.abs(got[name].numpy() - array).max() / np.abs(array).max()) for name, array in reference.items()
    }
    print("\n".join(f"{name}: {error:.1e}" for name, error in errors.items()))
    assert {name: got[name].shape for name in got} == {name: array.shape for name, array in reference.items()}
    assert max(errors.values()) < TOLERANCE


# ---------------------------------------------------------------------- backward, module by module

CONVOLUTION = {"kW": 3, "kH": 2, "dW": 2, "dH": 1, "padW": 1, "padH": 0, "nInputPlane": 4, "nOutputPlane": 6}
STATISTICS = {"running_mean": weights(4), "weight": weights(4, seed=2), "bias": weights(4, seed=3)}
POOLING = {"kW": 3, "kH": 3, "dW": 2, "dH": 2, "padW": 1, "padH": 1, "ceil_mode": False}
MAP = (2, 4, 5, 7)
VECTOR = (3, 8)


def sizes(*values: int) -> Storage:
    return Storage(np.array(values, np.int64))


MODULES = {
    "nn.Identity": ({}, MAP),
    "nn.Copy": ({}, MAP),
    "nn.Dropout": ({"p": 0.5, "v2": True}, MAP),
    "nn.View": ({"size": sizes(32, 20, 7)}, MAP),
    "nn.Reshape": ({"size": sizes(20, 7)}, MAP),
    "nn.Linear": ({"weight": weights(5, 8), "bias": weights(5)}, VECTOR),
    "nn.SpatialConvolution": ({"weight": weights(6, 4, 2, 3), "bias": weights(6), **CONVOLUTION}, MAP),
    "nn.SpatialConvolutionMM": ({"weight": weights(6, 24), "bias": weights(6), **CONVOLUTION}, MAP),
    "cudnn.SpatialConvolution": ({"weight": weights(6, 2, 2, 3), "groups": 2, **CONVOLUTION}, MAP),
    "nn.SpatialConstDiagonal": ({"a": weights(1, 4, 1, 1), "b": weights(1, 4, 1, 1)}, MAP),
    "inn.ConstAffine": ({"a": weights(4), "b": weights(4)}, MAP),
    "nn.SpatialBatchNormalization": ({"running_std": np.abs(weights(4)), **STATISTICS}, MAP),
    "cudnn.SpatialBatchNormalization": ({"running_var": np.abs(weights(4)), "eps": 1e-3, **STATISTICS}, MAP),
    "nn.ReLU": ({}, MAP),
    "cudnn.ReLU": ({}, MAP),
    "nn.Threshold": ({"threshold": 0.25, "val": -3}, MAP),
    "nn.SpatialMaxPooling": (POOLING, MAP),
    "cudnn.SpatialMaxPooling": (POOLING, MAP),
    "nn.SpatialZeroPadding": ({"pad_l": -1, "pad_r": 2, "pad_t": 1, "pad_b": -2}, MAP),
    "nn.SpatialSymmetricPadding": ({"pad_l": 1, "pad_r": 2, "pad_t": 3, "pad_b": 0}, MAP),
    "nn.SpatialUpSamplingNearest": ({"scale_factor": 2}, MAP),
    "nn.SpatialReSamplingEx": ({"mode": "bilinear", "owidth": 12, "oheight": 9, "yDim": 3, "xDim": 4}, MAP),
    "nn.Sequential": ({"modules": [Object("nn.ReLU"), Object("nn.SpatialUpSamplingNearest", scale_factor=2)]}, MAP),
    "nn.ConcatTable": ({"modules": [Object("nn.ReLU"), Object("nn.Identity")]}, MAP),
    "nn.ParallelTable": ({"modules": [Object("nn.ReLU"), Object("nn.Identity")]}, [MAP, VECTOR]),
    "nn.CAddTable": ({}, [MAP, MAP]),
}


def test_every_class_is_tested():
    assert set(MODULES) == set(torch7_network._LAYERS)


def inner(a, b) -> float:
    """The inner product of two tensors or lists of them."""
    if isinstance(a, list):
        return sum(inner(x, y) for x, y in zip(a, b))
    return (a * b).sum().item()


def like(value, seed: int):
    if isinstance(value, list):
        return [like(item, seed + i) for i, item in enumerate(value)]
    return normal(*value.shape, seed=seed)


def moved(value, step: float, direction):
    if isinstance(value, list):
        return [moved(item, step, part) for item, part in zip(value, direction)]
    return value + step * direction


@pytest.mark.parametrize("class_name", MODULES)
def test_backward_equals_finite_differences(class_name):
    fields, shape = MODULES[class_name]
    network = literal(class_name, **fields)
    x = [normal(*s, seed=i) for i, s in enumerate(shape)] if isinstance(shape, list) else normal(*shape)
    output = network.forward(x)
    probe = like(output, seed=7)
    gradient = network.backward(probe)
    step = 1e-6

    def forward(x):
        if class_name != "nn.SpatialSymmetricPadding":
            return network.forward(x)
        # Its released backward takes the border for a constant, so only the centre moves here.
        padded = output.clone()
        padded[:, :, 3:, 1:-2] = x
        return padded

    for seed in range(3):
        direction = like(x, seed=10 + seed)
        numerical = inner(forward(moved(x, step, direction)), probe) - inner(forward(moved(x, -step, direction)), probe)
        assert inner(gradient, direction) == pytest.approx(numerical / (2 * step), rel=1e-6, abs=1e-7)

    names = [name for name in ("weight", "bias") if name in fields]
    assert sorted(network.gradients.get("", {})) == sorted(names)
    for name in names:
        gradient = network.gradient_of(network.root.module)[name]
        assert gradient.shape == fields[name].shape
        parameter = getattr(network.root, name)
        direction = like(parameter, seed=20)
        values = []
        for sign in (1, -1):
            setattr(network.root, name, parameter + sign * step * direction)
            values.append(inner(network.forward(x), probe))
        setattr(network.root, name, parameter)
        numerical = (values[0] - values[1]) / (2 * step)
        assert inner(gradient.reshape(direction.shape), direction) == pytest.approx(numerical, rel=1e-6, abs=1e-7)


def test_gradients_add_up_until_zeroed():
    network = literal("nn.Linear", weight=weights(5, 8), bias=weights(5))
    network.forward(normal(*VECTOR))
    network.backward(normal(3, 5))
    once = network.gradients[""]["weight"].clone()
    network.backward(normal(3, 5))
    torch.testing.assert_close(network.gradients[""]["weight"], 2 * once)
    network.zero_gradients()
    assert network.gradients == {}
    with pytest.raises(KeyError):
        network.gradient_of(network.root.module)
    with pytest.raises(KeyError, match="not in this network"):
        network.gradient_of(TorchObject("nn.Linear"))


# ---------------------------------------------------------------------- forward, module by module


def test_symmetric_padding_mirrors_with_the_edge():
    x = normal(2, 3, 4, 5)
    padded = literal("nn.SpatialSymmetricPadding", pad_l=1, pad_r=2, pad_t=3, pad_b=4).forward(x)
    np.testing.assert_array_equal(padded, np.pad(x.numpy(), [(0, 0), (0, 0), (3, 4), (1, 2)], mode="symmetric"))
    with pytest.raises(ValueError, match="cannot be mirrored"):
        literal("nn.SpatialSymmetricPadding", pad_l=6, pad_r=0, pad_t=0, pad_b=0).forward(x)


def test_symmetric_padding_hands_back_the_centre_of_the_gradient():
    network = literal("nn.SpatialSymmetricPadding", pad_l=1, pad_r=2, pad_t=3, pad_b=4)
    network.forward(normal(2, 3, 4, 5))
    gradient = normal(2, 3, 11, 8)
    torch.testing.assert_close(network.backward(gradient), gradient[:, :, 3:7, 1:6], rtol=0, atol=0)


def test_zero_padding_crops_and_pads():
    x = normal(2, 3, 6, 7)
    got = literal("nn.SpatialZeroPadding", pad_l=-2, pad_r=1, pad_t=-1, pad_b=-1).forward(x)
    torch.testing.assert_close(got[..., :-1], x[:, :, 1:-1, 2:], rtol=0, atol=0)
    assert not got[..., -1].any()


def test_max_pooling_is_the_largest_of_what_is_inside():
    # All negative, so that a border of zeros would show.
    x = -normal(1, 2, 7, 9).abs() - 1
    got = literal("nn.SpatialMaxPooling", **POOLING).forward(x)
    expected = torch.empty(1, 2, 4, 5, dtype=x.dtype)
    for i in range(4):
        for j in range(5):
            inside = x[:, :, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2]
            expected[:, :, i, j] = inside.amax((2, 3))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 5), (1, 1), (9, 8)])
@pytest.mark.parametrize("target", [(13, 8), (4, 5), (3, 2), (1, 1)])
def test_resampling_equals_interpolation_with_aligned_corners(shape, target):
    fields = {"mode": "bilinear", "oheight": target[0], "owidth": target[1], "yDim": 2, "xDim": 3}
    network = literal("nn.SpatialReSamplingEx", **fields)
    x = normal(3, *shape).requires_grad_()
    expected = F.interpolate(x[None], target, mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(network.forward(x), expected, rtol=1e-12, atol=1e-12)
    probe = normal(3, *target, seed=2)
    (gradient,) = torch.autograd.grad(expected, x, probe)
    torch.testing.assert_close(network.backward(probe), gradient, rtol=1e-12, atol=1e-12)


def test_resampling_by_a_ratio():
    network = literal("nn.SpatialReSamplingEx", mode="bilinear", rheight=1.5, rwidth=1.3, yDim=2, xDim=3)
    assert network.forward(normal(2, 5, 5)).shape == (2, 8, 7)
    with pytest.raises(NotImplementedError, match=r"nn\.SpatialReSamplingEx in mode 'simple'"):
        literal("nn.SpatialReSamplingEx", mode="simple", owidth=4, oheight=4)


def test_normalisations_agree():
    mean, var, weight, bias = weights(4), np.abs(weights(4, seed=2)), weights(4, seed=3), weights(4, seed=4)
    fields = {"running_mean": mean, "weight": weight, "bias": bias, "eps": 1e-3}
    x = normal(*MAP)
    tensors = [torch.from_numpy(v.astype(np.float64)) for v in (mean, var, weight, bias)]
    expected = F.batch_norm(x, *tensors, eps=1e-3)
    inverse = 1 / np.sqrt(var.astype(np.float64) + 1e-3)
    a, b = weight * inverse, bias - weight * inverse * mean
    for network in (
        literal("nn.SpatialBatchNormalization", running_var=var, **fields),
        literal("nn.SpatialBatchNormalization", running_std=inverse, **fields),
        literal("inn.ConstAffine", a=a, b=b),
        literal("nn.SpatialConstDiagonal", a=a.reshape(1, 4, 1, 1), b=b.reshape(1, 4, 1, 1)),
    ):
        torch.testing.assert_close(network.forward(x), expected)


def test_single_precision():
    module = read(Object("nn.Linear", weight=weights(5, 8), bias=weights(5)))
    exact, single = (Literal(module, dtype=dtype).forward(normal(*VECTOR)) for dtype in (torch.float64, torch.float32))
    assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


def test_unknown_modules_are_named():
    module = Object("nn.Sequential", modules=[Object("nn.Identity"), Object("nn.SpatialFullConvolution")])
    with pytest.raises(NotImplementedError, match=r"nn\.SpatialFullConvolution at modules\[2\]"):
        Literal(read(module))


def test_in_place_modules_share_gradients_as_in_torch7():
    scale = Object("nn.SpatialConstDiagonal", a=weights(1, 4, 1, 1), b=weights(1, 4, 1, 1), inplace=True)
    both = Object("nn.ConcatTable", modules=[Object("nn.Sequential", modules=[scale]), Object("nn.Identity")])
    module = read(Object("nn.Sequential", modules=[both, Object("nn.CAddTable", inplace=True)]))
    a, x, probe = torch.from_numpy(weights(1, 4, 1, 1)).double(), normal(*MAP), normal(*MAP, seed=5)
    given = probe.clone()
    networks = [Literal(module, in_place=in_place) for in_place in (False, True)]
    outputs = [network.forward(x) for network in networks]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(networks[0].backward(probe), a * probe + probe)
    # The first branch has scaled the memory that the second one reads.
    torch.testing.assert_close(networks[1].backward(probe), a * probe + a * probe)
    torch.testing.assert_close(probe, given, rtol=0, atol=0)


# ---------------------------------------------------------------------- losses


def test_soft_margin_criterion():
    x = (3 * normal(4, 6)).requires_grad_()
    y = torch.where(normal(4, 6, seed=1) > 0, 1.0, -1.0).double()
    expected = F.soft_margin_loss(x, y)
    (gradient,) = torch.autograd.grad(expected, x)
    assert SoftMarginCriterion.forward(x, y) == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(SoftMarginCriterion.backward(x, y), gradient)
    torch.testing.assert_close(scaled_mask_gradient(gradient, np.zeros((4, 3, 8, 8))), 4 * gradient)


# ---------------------------------------------------------------------- drawn models


def draw_models(seed: int = 0, km: int = 16, **options) -> list:
    """What the files of a DeepMask and of a SharpMask on it hold, once written and read."""
    rng = np.random.default_rng(seed)
    deepmask = draw_deepmask(rng, **options)
    same = {name: options[name] for name in ("namespace", "element") if name in options}
    return [read(published(model)) for model in (deepmask, draw_sharpmask(deepmask, rng, km=km, **same))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "inn.ConstAffine", "namespace": "nn", "element": "Float", "flat": False},
        {"norm": "cudnn.SpatialBatchNormalization", "bottleneck": True},
        {"norm": "nn.SpatialBatchNormalization", "blocks": (2, 1, 2)},
    ],
)
def test_drawn_models_run(options):
    options = {**SMALL, **options}
    deepmask_file, sharpmask_file = draw_models(**options)
    deepmask, sharpmask = LiteralDeepMask(deepmask_file["model"]), LiteralSharpMask(sharpmask_file["model"])
    x = normal(2, 3, 96, 96)
    outputs = {"mask": deepmask.forward_mask(x), "coarse": deepmask.coarse_mask, "score": deepmask.forward_score(x)}
    outputs.update(refined=sharpmask.forward(x), **sharpmask.stages)
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "mask": (2, 24 * 24),
        "coarse": (2, 12 * 12),
        "score": (2, 1),
        "refined": (2, 64 * 64),
        "trunk_out": (2, 6),
        "module0": (2, 16, 4, 4),
        **{f"{side}{k}": (2, 16 >> k, 2 << k, 2 << k) for k in range(1, 5) for side in ("horizontal", "vertical")},
        **{f"module{k}": (2, 16 >> k, 4 << k, 4 << k) for k in range(1, 4)},
        "module4": (2, 64 * 64),
    }
    for name, output in outputs.items():
        assert 1e-2 < output.abs().max() < 1e2, name
        # Neither dead nor saturated, so that a test on it sees every layer.
        assert name == "score" or output.std() > 1e-2, name
    torch.testing.assert_close(sharpmask.forward_score(x), outputs["score"], rtol=0, atol=0)
    kinds = {layer.module.class_name for layer in sharpmask.layers.values()}
    assert {options.get("norm", "nn.SpatialConstDiagonal"), f"{options.get('namespace', 'cudnn')}.ReLU"} <= kinds
    assert deepmask_file["config"]["iSz"] == 64
    assert (deepmask_file["config"]["oSz"], deepmask_file["config"]["gSz"]) == (12, 24)
    assert (sharpmask_file["config"]["gSz"], sharpmask_file["config"]["km"]) == (64, 16)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("fields", [("weight", "bias"), ("gradWeight", "gradBias")])
def test_drawn_parameters_lie_in_one_storage_if_asked(fields, flat):
    model = LiteralDeepMask(draw_models(**SMALL, flat=flat)[0]["model"])
    for network in model.networks:
        arrays = [layer.fields[name] for layer in network.layers.values() for name in fields if name in layer.fields]
        spans = sorted((array.__array_interface__["data"][0], array.nbytes) for array in arrays)
        gaps = [after - start - size for (start, size), (after, _) in zip(spans, spans[1:])]
        assert gaps
        assert not any(gaps) if flat else all(gaps)


def test_drawn_gradients_hold_nan():
    model = draw_models(**SMALL)[0]["model"]
    layers = LiteralDeepMask(model).layers.values()
    arrays = [layer.fields["gradWeight"] for layer in layers if "gradWeight" in layer.fields]
    assert arrays
    assert all(np.isnan(array).any() for array in arrays)


def with_constant_border(self, x):
    """Symmetric padding to autograd as its released backward has it: only the centre depends on the input."""
    padded = original_padding(self, x.detach())
    left, right, top, bottom = self.pads
    padded[:, :, top : padded.shape[2] - bottom, left : padded.shape[3] - right] = x
    return padded


original_padding = torch7_network._SymmetricPadding.update_output


def track(networks: list) -> dict:
    """Makes autograd follow the parameters; path -> {name: tensor}."""
    parameters = {}
    for network in networks:
        for path, layer in network.layers.items():
            if "weight" in layer.fields:
                names = [name for name in ("weight", "bias") if name in layer.fields]
                parameters[path] = {name: getattr(layer, name).requires_grad_() for name in names}
    return parameters


def assert_gradients_equal_autograd(gradients: dict, parameters: dict) -> None:
    assert set(gradients) == set(parameters)
    for path, tensors in parameters.items():
        assert set(gradients[path]) == set(tensors)
        for name, tensor in tensors.items():
            assert tensor.grad.any(), path
            torch.testing.assert_close(gradients[path][name].reshape(tensor.shape), tensor.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"norm": "cudnn.SpatialBatchNormalization"}, {"bottleneck": True}], ids=["basic", "bottleneck"]
)
@pytest.mark.parametrize("head", ["mask", "score"])
def test_deepmask_backward_equals_autograd(head, options, monkeypatch):
    model = LiteralDeepMask(draw_models(**{**SMALL, **options})[0]["model"])
    x = normal(2, 3, 96, 96)
    output = getattr(model, f"forward_{head}")(x)
    probe = normal(*output.shape, seed=1)
    grad_input = getattr(model, f"backward_{head}")(probe)
    gradients = model.gradients

    monkeypatch.setattr(torch7_network._SymmetricPadding, "update_output", with_constant_border)
    branch = model.mask_branch if head == "mask" else model.score_branch
    parameters = track([model.trunk, branch])
    x.requires_grad_()
    again = branch.root.forward(model.trunk.root.forward(x))
    torch.testing.assert_close(again, output, rtol=0, atol=0)
    again.backward(probe)
    assert_gradients_equal_autograd(gradients, parameters)
    torch.testing.assert_close(grad_input, x.grad)


def test_sharpmask_backward_equals_autograd_of_the_refinement(monkeypatch):
    file = draw_models(**SMALL)[1]
    model = LiteralSharpMask(file["model"])
    output = model.forward(normal(2, 3, 96, 96))
    probe = normal(*output.shape, seed=1)
    grad_trunk = model.backward(probe)
    gradients = model.gradients
    assert all(path.startswith("refs[") for path in gradients)
    convolution = file["model"].fields["neths"][2].fields["modules"][3]
    assert model.gradient_of(convolution) is gradients["refs[2].modules[1].modules[1].modules[3]"]

    monkeypatch.setattr(torch7_network._SymmetricPadding, "update_output", with_constant_border)
    parameters = track(model.refs)
    trunk_out = model.trunk.output.clone().requires_grad_()
    encoding = model.refs[0].root.forward(trunk_out)
    for ref, position in zip(model.refs[1:], (8, 6, 5, 3)):
        # Nothing flows into the trunk by way of the skips.
        encoding = ref.root.forward([model.trunk.layers[f"trunk.modules[{position}]"].output, encoding])
    torch.testing.assert_close(encoding, output, rtol=0, atol=0)
    encoding.backward(probe)
    assert_gradients_equal_autograd(gradients, parameters)
    torch.testing.assert_close(grad_trunk, trunk_out.grad)


# ---------------------------------------------------------------------- drawn against published


def describe(value, path: str = "") -> dict:
    """path -> class name, shape, number, text or flag of all that an object of the writer holds."""
    if isinstance(value, Object):
        return {path: value.class_name, **describe(value.fields, path)}
    if isinstance(value, list):
        value = dict(enumerate(value, start=1))
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in describe(item, f"{path}.{name}").items()}
    if isinstance(value, Storage):
        return {path: value.array.tolist()}
    return {path: value if isinstance(value, (int, float, str)) else tuple(value.sizes)}


def look_up(root, path: str):
    """The same of what was read; path as `describe` writes it."""
    for name in path.split(".")[1:]:
        table = root.fields if isinstance(root, TorchObject) else root
        key = int(name) if name.isdigit() else name
        if key not in table:
            return "missing"
        root = table[key]
    if isinstance(root, TorchObject):
        return root.class_name
    if isinstance(root, np.ndarray):
        return root.tolist() if root.dtype == np.int64 else root.shape
    return root


def test_drawn_models_have_the_structure_of_the_published(published_models):
    rng = np.random.default_rng(0)
    deepmask = draw_deepmask(rng, blocks=(3, 4, 6), bottleneck=True, reduced=128, embed=512, score=1024)
    for model in (deepmask, draw_sharpmask(deepmask, rng, km=32)):
        original = published_models[model.class_name[3:].lower()]
        described = {
            path: value
            for path, value in describe(published(model)).items()
            # Empty buffers, and the type which one branch of DeepMask was left in.
            if path.rsplit(".", 1)[1] not in ("output", "gradInput", "_type")
        }
        differences = {path: (value, look_up(original, path)) for path, value in described.items()}
        differences = {path: pair for path, pair in differences.items() if pair[0] != pair[1]}
        # Options of that run.
        for name in ("maxepoch", "dm", "rundir"):
            differences.pop(f".config.{name}", None)
        assert not differences
