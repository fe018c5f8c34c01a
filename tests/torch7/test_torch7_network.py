"""The references of the other tests: the interpreter of Torch7's modules against the original's outputs, drawn models against published."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import gzip

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sharpmask_d2.torch7.reader import TorchObject, parse_torch7
from torch7_models import draw_deepmask, draw_sharpmask, published
from torch7_network import Torch7DeepMask, Torch7Network, Torch7SharpMask
from torch7_writer import Object, dumps

TOLERANCE = 1e-4


def network(class_name: str, **fields) -> Torch7Network:
    return Torch7Network(parse_torch7(dumps(Object(class_name, **fields))), "drawn")


def normal(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def published_models(shared) -> dict:
    """The models of the original's files: "deepmask" and "sharpmask"."""
    folder = shared / "torch7"
    return {
        name: parse_torch7(gzip.decompress((folder / f"{name}_model.t7.gz").read_bytes()))["model"]
        for name in ("deepmask", "sharpmask")
    }


@torch.no_grad()
def test_every_stage_equals_the_originals_output(shared, published_models):
    reference = dict(np.load(shared / "torch7" / "reference_patches.npz"))
    patches = torch.from_numpy(reference.pop("patches"))
    # The precision in which the original computed.
    deepmask = Torch7DeepMask(published_models["deepmask"], torch.float32)
    sharpmask = Torch7SharpMask(published_models["sharpmask"], torch.float32)
    got = {"sharpmask_mask160": sharpmask.forward(patches), **sharpmask.stages}
    # The published SharpMask has the trunk of the DeepMask, which need not run twice.
    got["score"] = deepmask.score_branch(got["trunk_out"])
    deepmask.mask_branch(got["trunk_out"])
    got["deepmask_mask56"] = deepmask.coarse_mask
    assert set(got) == set(reference)
    for name, array in reference.items():
        assert got[name].shape == array.shape
        assert np.abs(got[name].numpy() - array).max() <= TOLERANCE * np.abs(array).max(), name


def test_symmetric_padding_mirrors_the_map_and_drops_the_gradient_of_its_border():
    x = torch.from_numpy(normal(2, 3, 4, 5)).requires_grad_()
    padded = network("nn.SpatialSymmetricPadding", pad_l=1, pad_r=2, pad_t=3, pad_b=4)(x)
    expected = np.pad(x.detach().numpy(), [(0, 0), (0, 0), (3, 4), (1, 2)], mode="symmetric")
    np.testing.assert_array_equal(padded.detach(), expected)
    gradient = torch.from_numpy(normal(2, 3, 11, 8))
    padded.backward(gradient)
    torch.testing.assert_close(x.grad, gradient[:, :, 3:7, 1:6], rtol=0, atol=0)


def test_all_kinds_of_norms_agree():
    mean, var, weight, bias = normal(4), np.abs(normal(4, seed=2)), normal(4, seed=3), normal(4, seed=4)
    x = torch.from_numpy(normal(2, 4, 5, 7)).double()
    expected = F.batch_norm(x, *(torch.from_numpy(v).double() for v in (mean, var, weight, bias)), eps=1e-3)
    inverse = 1 / np.sqrt(var.astype(np.float64) + 1e-3)
    fields = {"running_mean": mean, "weight": weight, "bias": bias, "eps": 1e-3}
    for norm in (
        network("nn.SpatialBatchNormalization", running_var=var, **fields),
        network("cudnn.SpatialBatchNormalization", running_std=inverse, **fields),
        network("inn.ConstAffine", a=weight * inverse, b=bias - weight * inverse * mean),
    ):
        torch.testing.assert_close(norm(x), expected)


def test_an_unknown_module_is_named_by_its_path():
    with pytest.raises(NotImplementedError, match=r"nn\.SpatialFullConvolution at drawn\.modules\[2\]"):
        network("nn.Sequential", modules=[Object("nn.Identity"), Object("nn.SpatialFullConvolution")])


def structure(value, path: str = "") -> dict:
    """path -> class, shape, number or text of all that a model holds, except buffers, gradients and statistics of the run."""
    if isinstance(value, TorchObject):
        return {path: value.class_name, **structure(value.fields, path)}
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in structure(item, f"{path}.{key}").items()}
    if isinstance(value, np.ndarray):
        return {path: value.tolist() if value.dtype == np.int64 else value.shape}
    return {path: value}


def test_drawn_models_have_the_structure_of_the_published(published_models):
    rng = np.random.default_rng(0)
    deepmask = draw_deepmask(
        rng, blocks=(3, 4, 6), bottleneck=True, reduced=128, embed=512, score=1024, window=160, coarse=56
    )
    for model in (deepmask, draw_sharpmask(deepmask, rng, channels=32)):
        original = structure(published_models[model.class_name[3:].lower()])
        for path, value in structure(parse_torch7(dumps(published(model)))["model"]).items():
            # The type that one branch of DeepMask was left in.
            assert path.endswith("._type") or original.get(path, "missing") == value, path
