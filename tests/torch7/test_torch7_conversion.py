"""Conversion of drawn Torch7 models, against Torch7's modules run one by one; test_torch7_parity.py has the real files."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import runpy
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from drawing import ROOT
from sharpmask_d2 import add_sharpmask_config
from sharpmask_d2.inference.predictor import ProposalPredictor
from sharpmask_d2.torch7.conversion import ConversionError, convert_content, convert_torch7, save_torch7_model
from sharpmask_d2.torch7.reader import Torch7Error, parse_torch7
from torch7_models import draw_deepmask, draw_sharpmask, published
from torch7_network import Torch7DeepMask, Torch7SharpMask
from torch7_writer import Object, Storage, Tensor, dumps

NORMS = [
    "nn.SpatialConstDiagonal",
    "inn.ConstAffine",
    "nn.SpatialBatchNormalization",
    "cudnn.SpatialBatchNormalization",
]


def draw(kind: str = "deepmask", seed: int = 0, **options):
    rng = np.random.default_rng(seed)
    deepmask = draw_deepmask(rng, **options)
    return published(deepmask if kind == "deepmask" else draw_sharpmask(deepmask, rng))


def convert(content, **options):
    return convert_content(parse_torch7(dumps(content, **options)), name="drawn.t7")


def network_of(converted):
    cfg = converted.cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    model.load_state_dict(converted.state, strict=False)
    return model.pyramid.network


def patches_for(network) -> tuple:
    """Patches in 0..255 for our network, and normalised ones in double precision for the reference."""
    side = network.window_size + network.context
    patches = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 255
    return patches, network.normalize(patches).double()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    theirs = theirs.reshape(ours.shape).float()
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@torch.no_grad()
def assert_deepmask_computes_the_same(content, converted) -> None:
    network = network_of(converted)
    patches, normalised = patches_for(network)
    scores, masks = network(patches)
    reference = Torch7DeepMask(parse_torch7(dumps(content))["model"])
    reference.forward_mask(normalised)
    assert_close(masks, reference.coarse_mask)
    assert_close(scores, reference.forward_score(normalised))


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_computes_what_torch7_computed(norm):
    content = draw(norm=norm)
    assert_deepmask_computes_the_same(content, convert(content))


def test_modules_of_the_cpu_are_converted_as_those_of_cudnn():
    content = draw(namespace="nn", element="Float")
    assert_deepmask_computes_the_same(content, convert(content))


def test_old_batch_norms_store_the_inverse_deviation():
    content = draw(norm="nn.SpatialBatchNormalization")

    def rename(value) -> None:
        fields = value.fields if isinstance(value, Object) else value
        if isinstance(fields, dict) and "running_var" in fields:
            variance = fields.pop("running_var").storage.array
            deviation = (1 / np.sqrt(variance + fields["eps"])).astype(np.float32)
            fields["running_std"] = Tensor(Storage(deviation, "Cuda"), deviation.shape)
        for child in fields.values() if isinstance(fields, dict) else fields if isinstance(fields, list) else []:
            if isinstance(child, (Object, dict, list)):
                rename(child)

    rename(content["model"])
    assert_deepmask_computes_the_same(content, convert(content))


@pytest.mark.parametrize("norm", ["nn.SpatialBatchNormalization", "nn.SpatialConstDiagonal"])
def test_a_bias_before_a_norm_is_kept(norm):
    content = draw(norm=norm)
    modules(content)[0].fields["modules"][1].fields["bias"] = np.linspace(-1, 1, 64, dtype=np.float32)
    assert_deepmask_computes_the_same(content, convert(content))


def test_bottlenecks_and_depth_are_recognised():
    content = draw(blocks=(3, 4, 6), bottleneck=True)
    converted = convert(content)
    trunk = converted.cfg.MODEL.SHARPMASK.TRUNK
    assert (trunk.RESNET_DEPTH, trunk.STRIDE_IN_1X1, trunk.PADDING) == (50, False, "mirrored")
    assert_deepmask_computes_the_same(content, converted)


@torch.no_grad()
def test_sharpmask_computes_what_torch7_computed_and_keeps_its_deepmask():
    content = draw("sharpmask")
    converted = convert(content, long_size=4)
    network = network_of(converted)
    patches, normalised = patches_for(network)
    reference = Torch7SharpMask(parse_torch7(dumps(content))["model"])
    assert_close(network(patches)[1], reference.forward(normalised))
    assert converted.cfg.MODEL.SHARPMASK.REFINEMENT.CHANNELS == 16
    converted.cfg.MODEL.SHARPMASK.REFINEMENT.NAME = "none"
    deepmask = Torch7DeepMask(parse_torch7(dumps(draw()))["model"])
    deepmask.forward_mask(normalised)
    assert_close(network_of(converted)(patches)[1], deepmask.coarse_mask)


def test_config_has_the_sizes_of_the_file():
    sharpmask = convert(draw()).cfg.MODEL.SHARPMASK
    sizes = {key: sharpmask[key] for key in ("WINDOW_SIZE", "CONTEXT", "REDUCED_CHANNELS", "EMBED_DIM", "SCORE_DIM")}
    assert sizes == {"WINDOW_SIZE": 64, "CONTEXT": 32, "REDUCED_CHANNELS": 8, "EMBED_DIM": 12, "SCORE_DIM": 10}
    assert (sharpmask.COARSE_MASK_SIZE, sharpmask.REFINEMENT.NAME, sharpmask.RESIZING) == (12, "none", "released")


def test_the_tool_writes_a_checkpoint_and_a_config_that_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.t7").write_bytes(dumps(draw("sharpmask")))
    output = tmp_path / "out" / "model.pth"
    run_tool(monkeypatch, tmp_path / "model.t7", "--output", output)
    assert str(output) in capsys.readouterr().out
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    cfg.merge_from_file(str(output.with_suffix(".yaml")))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 5
    assert str(output) == cfg.MODEL.WEIGHTS
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert len(ProposalPredictor(cfg)(image).proposal_masks) <= 5
    assert sorted(path.name for path in output.parent.iterdir()) == ["model.pth", "model.yaml"]


def run_tool(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_torch7.py", *map(str, args)])
    runpy.run_path(str(ROOT / "tools" / "convert_torch7.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("content", "message"), [(b"nonsense", "not a whole Torch7 file"), (dumps([1]), "nn.DeepMask")]
)
def test_the_tool_ends_in_one_line_for_a_file_that_is_no_model(tmp_path, monkeypatch, capsys, content, message):
    (tmp_path / "model.t7").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        run_tool(monkeypatch, tmp_path / "model.t7", "--output", tmp_path / "model.pth")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "model.t7") in error
    assert message in error
    assert not (tmp_path / "model.pth").exists()


def test_a_checkpoint_needs_the_suffix_that_detectron2_knows(tmp_path):
    with pytest.raises(ValueError, match=r"has to end in \.pth"):
        save_torch7_model(convert(draw()), tmp_path / "model.bin")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.t7"):
        convert_torch7(tmp_path / "none.t7")
    (tmp_path / "empty.t7").touch()
    with pytest.raises(Torch7Error, match=r"empty\.t7"):
        convert_torch7(tmp_path / "empty.t7")


# --- files of another structure: the module is named by its path ---------------------------------------------------------


def modules(content) -> list:
    """The trunk's modules: 0 stem, 1 norm, 2 ReLU, 3 pooling, 4 to 6 stages, 7 crop, 8 reduction, 9 ReLU, 10 view, 11 linear."""
    return content["model"].fields["trunk"].fields["modules"]


def first_table(content) -> Object:
    """The main path and the shortcut of the trunk's first block."""
    return modules(content)[4].fields["modules"][0].fields["modules"][0]


def swap_norm_and_relu(content):
    modules(content)[1], modules(content)[2] = modules(content)[2], modules(content)[1]


def pad_one_map_with_zeros(content):
    stem = modules(content)[0].fields["modules"]
    stem.pop(0)
    stem[0].fields.update(padW=3, padH=3)


OTHER_STRUCTURES = {
    "unknown module": (
        lambda content: modules(content)[5].fields["modules"].append(Object("nn.SpatialDropout", p=0.5)),
        r"unknown module nn\.SpatialDropout at model\.trunk\.modules\[6\]\.modules\[3\]",
    ),
    "unknown namespace": (
        lambda content: setattr(modules(content)[2], "class_name", "ccn2.ReLU"),
        r"unknown module ccn2\.ReLU at model\.trunk\.modules\[3\]",
    ),
    "other order": (swap_norm_and_relu, r"at model\.trunk\.modules\[2\], found ReLU"),
    "one block more": (
        lambda content: modules(content)[5].fields["modules"].append(modules(content)[5].fields["modules"][1]),
        r"stages of \[2, 3, 2\] blocks",
    ),
    "three branches": (
        lambda content: first_table(content).fields["modules"].append(Object("nn.Identity")),
        r"model\.trunk\.modules\[5\]\.modules\[1\]\.modules\[1\]",
    ),
    "zeros around a map": (
        lambda content: modules(content)[7].fields.update(pad_l=1, pad_r=1, pad_t=1, pad_b=1),
        r"model\.trunk\.modules\[8\] pads with zeros",
    ),
    "one border of zeros": (pad_one_map_with_zeros, r"mirrored borders and others with zeros"),
    "no border": (
        lambda content: modules(content)[0].fields["modules"].pop(0),
        r"model\.trunk\.modules\[1\]\.modules\[1\] has an unusual border",
    ),
    "groups": (
        lambda content: modules(content)[8].fields.update(groups=2),
        r"model\.trunk\.modules\[9\] is a convolution in groups",
    ),
    "not finite": (
        lambda content: modules(content)[11].fields.update(bias=np.array([np.nan] * 12, dtype=np.float32)),
        r"model\.trunk\.modules\[12\]\.bias has values that are not finite",
    ),
    "no weight": (
        lambda content: modules(content)[11].fields.pop("weight"),
        r"model\.trunk\.modules\[12\] has no weight",
    ),
    "weight of another size": (
        lambda content: modules(content)[8].fields.update(nInputPlane=128),
        r"model\.trunk\.modules\[9\]\.weight",
    ),
    "linear layer of another size": (
        lambda content: modules(content)[11].fields.update(weight=np.zeros((12, 100), dtype=np.float32)),
        r"head\.embed\.weight has 1200 values",
    ),
    "no score branch": (
        lambda content: content["model"].fields.pop("scoreBranch"),
        r"expected a module at model\.scoreBranch",
    ),
    "longer score branch": (
        lambda content: content["model"].fields["scoreBranch"].fields["modules"].append(Object("nn.Sigmoid")),
        r"Sigmoid.*model\.scoreBranch\.modules\[6\]",
    ),
    "another class": (
        lambda content: setattr(content["model"], "class_name", "nn.Sequential"),
        r"expected an nn\.DeepMask or nn\.SharpMask as 'model', found a nn\.Sequential",
    ),
}


@pytest.mark.parametrize(("change", "message"), OTHER_STRUCTURES.values(), ids=OTHER_STRUCTURES)
def test_another_structure_is_named_by_its_path(change, message):
    content = draw()
    change(content)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(content)
    assert str(caught.value).startswith("drawn.t7: ")


def nested_twice(content):
    # 2^40 modules in a file of a few kilobytes.
    for _ in range(40):
        content["model"].fields["trunk"] = Object("nn.Sequential", modules=[content["model"].fields["trunk"]] * 2)


def nested_without_leaves(content):
    content["model"].fields["trunk"] = Object("nn.Sequential", modules=[])
    nested_twice(content)


def nested_in_itself(content):
    modules(content).append(content["model"].fields["trunk"])


def nested_in_a_branch(content):
    main = first_table(content).fields["modules"][0]
    main.fields["modules"].append(main)


@pytest.mark.parametrize("nest", [nested_twice, nested_without_leaves, nested_in_itself, nested_in_a_branch])
def test_modules_nested_without_end_are_refused(nest):
    content = draw()
    nest(content)
    message = r"model\.trunk\S* holds more modules than any model of this kind, or a module that holds itself"
    with pytest.raises(ConversionError, match=message) as caught:
        convert(content)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [float("inf"), float("nan"), np.ones(3, np.float32)])
@pytest.mark.parametrize(
    ("number", "fields"),
    [
        (8, ["kW", "kH"]),
        (8, ["dW", "dH"]),
        (8, ["padW", "padH"]),
        (8, ["groups"]),
        (8, ["nInputPlane"]),
        (7, ["pad_l", "pad_r", "pad_t", "pad_b"]),
        (1, ["eps"]),
    ],
)
def test_a_field_that_is_not_a_finite_number_is_named(number, fields, value):
    content = draw(norm="nn.SpatialBatchNormalization")
    modules(content)[number].fields.update(dict.fromkeys(fields, value))
    with pytest.raises(ConversionError, match=rf"model\.trunk\.modules\[{number + 1}\].*{fields[0]}"):
        convert(content)


@pytest.mark.parametrize("key", ["running_mean", "running_var", "weight", "bias"])
def test_a_norm_for_other_channels_is_named(key):
    content = draw(norm="nn.SpatialBatchNormalization")
    # A single value would be broadcast.
    modules(content)[1].fields[key] = np.ones(1, np.float32)
    with pytest.raises(ConversionError, match=rf"model\.trunk\.modules\[2\]\.{key} has 1 values for 64 channels"):
        convert(content)


def test_a_negative_variance_is_named():
    content = draw(norm="nn.SpatialBatchNormalization")
    modules(content)[1].fields["running_var"] = np.full(64, -1, np.float32)
    with pytest.raises(
        ConversionError, match=r"model\.trunk\.modules\[2\]\.running_var has values that are not variances"
    ):
        convert(content)


@pytest.mark.parametrize("value", [-3, 0, 1.5, 1e300, "3", True])
def test_an_invalid_kernel_size_is_named(value):
    content = draw()
    modules(content)[8].fields.update(kW=value, kH=value)
    with pytest.raises(ConversionError, match=r"model\.trunk\.modules\[9\] has .* for kW, kH"):
        convert(content)


def test_a_refinement_of_another_structure_is_named_by_its_path():
    content = draw("sharpmask")
    content["model"].fields["neths"][2].fields["modules"][-1].fields.update(kW=1)
    with pytest.raises(ConversionError, match=r"model\.neths\[2\]\.modules\[9\]"):
        convert(content)
    content = draw("sharpmask")
    del content["model"].fields["netvs"]
    with pytest.raises(ConversionError, match=r"model\.netvs is missing"):
        convert(content)


def test_zero_borders_everywhere_are_a_trunk_with_zero_padding():
    content = draw()

    def unwrap(fields) -> None:
        for i, child in enumerate(fields.get("modules", [])):
            inner = child.fields.get("modules", [])
            if inner and inner[0].class_name == "nn.SpatialSymmetricPadding":
                pad = inner[0].fields["pad_l"]
                inner[1].fields.update(padW=pad, padH=pad)
                fields["modules"][i] = inner[1]
            else:
                unwrap(child.fields)

    unwrap(content["model"].fields["trunk"].fields)
    converted = convert(content)
    assert converted.cfg.MODEL.SHARPMASK.TRUNK.PADDING == "zeros"
    assert_deepmask_computes_the_same(content, converted)
