"""The converted models compute what the original Torch7 code computed with the same files (`pytest -s` prints the differences)."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import gzip
import shutil

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from sharpmask_d2.inference.configuration import build_config
from sharpmask_d2.modeling.image_pyramid.levels import pyramid_levels
from sharpmask_d2.torch7.conversion import convert_torch7, save_torch7_model
from torch.nn.functional import interpolate

# As a share of an array's largest magnitude.
TOLERANCE = 1e-3
# Of the original's seven scales, from 1/4 to 2 by half octaves: two that shrink the image, one that enlarges it.
SCALES = (1, 3, 6)


def compare(name: str, ours, reference: np.ndarray) -> None:
    """Asserts that arrays are equal to TOLERANCE, and prints the line of the table."""
    ours = ours.numpy().reshape(reference.shape)
    difference, scale = np.abs(ours - reference).max(), np.abs(reference).max()
    print(f"{name:44} {difference:10.2e} {scale:8.3f} {difference / scale:10.1e}")
    assert difference <= TOLERANCE * scale, name


@pytest.fixture(scope="module")
def pyramids(shared, tmp_path_factory):
    """name -> ImagePyramid of the converted file in evaluation mode, loaded from disk as a user loads it: checkpoint and config."""
    folder = tmp_path_factory.mktemp("torch7")
    loaded = {}
    for name in ("deepmask", "sharpmask"):
        path = folder / f"{name}.t7"
        with gzip.open(shared / "torch7" / f"{name}_model.t7.gz") as packed, open(path, "wb") as file:
            shutil.copyfileobj(packed, file)
        config = save_torch7_model(convert_torch7(path), folder / f"{name}.pth")
        path.unlink()
        cfg = build_config(config_file=str(config), opts=("MODEL.DEVICE", "cpu"))
        model = build_model(cfg).eval()
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        loaded[name] = model.pyramid
    return loaded


@pytest.fixture(scope="module")
def patches(shared):
    return np.load(shared / "torch7" / "reference_patches.npz")


@pytest.fixture(scope="module")
def image(shared):
    return np.load(shared / "torch7" / "reference_image.npz")


def pixels(network, normalised: np.ndarray) -> torch.Tensor:
    """The pixels in 0..255 from which the original made its normalised input."""
    return torch.from_numpy(normalised) * network.pixel_std + network.pixel_mean


def record(modules: dict) -> dict:
    """name -> output of the module of that name, filled whenever it runs."""
    outputs = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    return outputs


@torch.no_grad()
def test_patches_through_deepmask(pyramids, patches):
    network = pyramids["deepmask"].network
    outputs = record({"trunk_out": network.head.embed})
    scores, masks = network(pixels(network, patches["patches"]))
    compare("deepmask: trunk_out", outputs["trunk_out"], patches["trunk_out"])
    compare("deepmask: deepmask_mask56", masks, patches["deepmask_mask56"])
    compare("deepmask: score", scores, patches["score"])


@torch.no_grad()
def test_patches_through_every_stage_of_sharpmask(pyramids, patches):
    network = pyramids["sharpmask"].network
    branch = network.mask_branch
    modules = {"trunk_out": network.head.embed, "module0": branch.start}
    for i, step in enumerate(branch.steps, start=1):
        modules.update({f"horizontal{i}": step.horizontal, f"vertical{i}": step.vertical[-1], f"module{i}": step})
    outputs = record(modules)
    scores, masks = network(pixels(network, patches["patches"]))
    for i in (1, 2, 3):
        # Our modules leave this upsampling to the next one.
        outputs[f"module{i}"] = interpolate(outputs[f"module{i}"], scale_factor=2, mode="nearest")
    # The original's last module includes the convolution to the mask.
    outputs.update(score=scores, sharpmask_mask160=masks, module4=masks)
    for name in sorted(set(patches.files) - {"patches", "deepmask_mask56"}):
        compare(f"sharpmask: {name}", outputs[name], patches[name])


@torch.no_grad()
def test_horizontal_nets_of_a_full_image(pyramids, image):
    network = pyramids["sharpmask"].network
    grid = network.grid(pixels(network, image["padded_input_scale3"]))
    for i, output in enumerate(network.mask_branch.horizontal(grid.features), start=1):
        reference = image[f"horizontal{i}_scale3"]
        assert output.shape[2:] == reference.shape[-2:]
        compare(f"sharpmask: horizontal{i}_scale3", output.contiguous(), reference)


@torch.no_grad()
def test_score_maps_of_the_input_that_the_original_padded(pyramids, image):
    network = pyramids["deepmask"].network
    scores = network.grid(pixels(network, image["padded_input_scale3"])).scores
    compare("deepmask: scores of padded_input_scale3", scores, image["deepmask_score_logits_scale3"])


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
def test_score_maps_of_the_image_resized_as_released(pyramids, image, scale):
    pyramid = pyramids["deepmask"]
    level = pyramid_levels((480, 640), pyramid.exponents, [(0, 0)])[scale - 1]
    resized = pyramid.level_image(torch.from_numpy(image["image"])[None] * 255, level)
    if scale == 3:
        compare("padded_input_scale3", pyramid.network.normalize(resized), image["padded_input_scale3"])
    scores = pyramid.network.grid(resized).scores
    compare(f"deepmask: score_logits_scale{scale}", scores, image[f"deepmask_score_logits_scale{scale}"])
