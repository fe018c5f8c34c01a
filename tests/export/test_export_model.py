"""Exported graphs against the model in torch, on images of many sizes, and the errors of `sharpmask export-model`."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import json
import os

import cv2
import numpy as np
import pytest
import skimage
import torch
from sharpmask_d2 import model_zoo
from sharpmask_d2.cli import export_model as command
from sharpmask_d2.errors import UserError
from sharpmask_d2.export import export_model
from sharpmask_d2.inference.predictor import load_model
from sharpmask_d2.modeling.segment_generator import Windows
from sharpmask_d2.runtime.model_file import ExportedModel

# Odd sides, upright and wide images, one pixel, multiples of the divisor, and more than the model is trained for.
SIZES = [
    (480, 640),
    (640, 480),
    (427, 640),
    (333, 500),
    (97, 61),
    (33, 47),
    (128, 128),
    (1, 1),
    (129, 257),
    (40, 600),
    (700, 900),
    (255, 384),
]
# Largest difference from torch, in logits.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model():
    cfg = model_zoo.get_config(model_zoo.DEFAULT)
    cfg.MODEL.DEVICE = "cpu"
    return load_model(cfg).eval()


def draw_windows(size: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """Squares of all sizes in and around an image, (count, 4) float32."""
    sides = 4 + 1.5 * max(size) * rng.random((count, 1)) ** 2
    centres = rng.random((count, 2)) * size[::-1]
    return np.concatenate([centres - sides / 2, centres + sides / 2], axis=1).astype(np.float32)


def draw_image(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """An image of smooth colours that is padded with noise to multiples of 128."""
    padded = [-(-side // 128) * 128 for side in size]
    image = rng.integers(0, 256, (*padded, 3), dtype=np.uint8)
    y, x = np.mgrid[: size[0], : size[1]]
    image[: size[0], : size[1]] = np.stack([y % 256, x % 256, (x * y // 50) % 256], axis=2)
    return image


@torch.no_grad()
def by_torch(model, image, size, windows, num_refined):
    """Scores (T,) and masks (N, M, M)."""
    pixels = torch.from_numpy(image[: size[0], : size[1]].copy()).permute(2, 0, 1)
    features = model.encode([{"image": pixels}])
    refined = torch.arange(len(windows)) < num_refined
    masks = model.proposal_generator.decode(features, Windows(torch.from_numpy(windows), refined=refined))
    return features.scores[0].numpy(), masks.numpy()


@pytest.mark.parametrize("size", SIZES)
def test_graphs_in_onnx_agree_with_torch(model, exported_model, size):
    runtime = pytest.importorskip("onnxruntime")
    encoder, decoder = (
        runtime.InferenceSession(str(exported_model("onnx") / f"{name}.onnx")) for name in ("encoder", "decoder")
    )
    rng = np.random.default_rng(sum(size))
    image, windows, num_refined = draw_image(size, rng), draw_windows(size, 12, rng), int(rng.integers(1, 12))
    scores, masks = by_torch(model, image, size, windows, num_refined)
    image_size = np.array(size)
    found, features, coarse, fine = encoder.run(None, {"image": image, "image_size": image_size})
    outside = np.isneginf(scores)
    assert (np.isneginf(found) == outside).all()
    assert np.abs(found[~outside] - scores[~outside]).max() < TOLERANCE
    inputs = {"features": features, "coarse": coarse, "fine": fine, "image_size": image_size}
    outputs = decoder.run(
        ["masks", "coarse_masks"],
        {**inputs, "windows": windows[:num_refined], "coarse_windows": windows[num_refined:]},
    )
    assert [len(x) for x in outputs] == [num_refined, 12 - num_refined]
    assert np.abs(np.concatenate(outputs) - masks).max() < TOLERANCE
    # One kind of window alone.
    outputs = decoder.run(None, {**inputs, "windows": windows[:0], "coarse_windows": windows[num_refined:]})
    assert outputs[0].shape == (0, 56, 56)
    assert np.abs(outputs[1] - masks[num_refined:]).max() < TOLERANCE


def run_openvino(folder, image, size, windows, num_refined):
    """Scores (T,) and masks (N, M, M) of the graphs in a folder."""
    openvino = pytest.importorskip("openvino")
    core, settings = openvino.Core(), {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    image_size = np.array(size)
    found = core.compile_model(folder / "encoder.xml", "CPU", settings)([image, image_size])
    parts = windows[:num_refined], windows[num_refined:]
    decoder = core.read_model(folder / "decoder.xml")
    decoder.reshape({4 + i: list(part.shape) for i, part in enumerate(parts)})
    outputs = core.compile_model(decoder, "CPU", settings)([*(found[i] for i in (1, 2, 3)), image_size, *parts])
    return found[0], np.concatenate([outputs[0], outputs[1]])


@pytest.mark.parametrize("size", [(333, 500), (97, 61), (640, 480)])
def test_graphs_in_openvino_agree_with_torch(model, exported_model, size):
    rng = np.random.default_rng(sum(size))
    image, windows = draw_image(size, rng), draw_windows(size, 9, rng)
    scores, masks = by_torch(model, image, size, windows, 4)
    found, decoded = run_openvino(exported_model("openvino"), image, size, windows, 4)
    outside = np.isneginf(scores)
    assert (np.isneginf(found) == outside).all()
    assert np.abs(found[~outside] - scores[~outside]).max() < TOLERANCE
    assert np.abs(decoded - masks).max() < TOLERANCE


@pytest.mark.slow
def test_graphs_in_int8_are_smaller_and_make_similar_masks(model, exported_model, tmp_path):
    pytest.importorskip("nncf")
    # The ranges of drawn pictures are not those that the model was trained on.
    photographs = [os.path.join(os.path.dirname(skimage.__file__), "data", f"{x}.png") for x in ("chelsea", "coffee")]
    folder = tmp_path / "int8"
    exported = export_model(
        output=str(folder), to="openvino", int8=True, calibrate=photographs, model=model_zoo.DEFAULT
    )
    assert ExportedModel.read(folder) == exported
    assert exported.precision == "int8"
    size_of = {path: (path / "encoder.bin").stat().st_size for path in (folder, exported_model("openvino"))}
    assert size_of[folder] < size_of[exported_model("openvino")] / 2
    size, rng = (200, 300), np.random.default_rng(0)
    image, windows = draw_image(size, rng), draw_windows(size, 20, rng)
    image[: size[0], : size[1]] = cv2.resize(cv2.imread(photographs[0]), size[::-1])[:, :, ::-1]
    scores, masks = by_torch(model, image, size, windows, 10)
    found, decoded = run_openvino(folder, image, size, windows, 10)
    inside = ~np.isneginf(scores)
    assert np.corrcoef(found[inside], scores[inside])[0, 1] > 0.95
    assert ((decoded > 0) == (masks > 0)).mean() > 0.95


def test_the_file_of_a_model_describes_it(exported_model):
    exported = ExportedModel.read(exported_model("onnx"))
    cfg = model_zoo.get_config(model_zoo.DEFAULT)
    assert (exported.name, exported.format, exported.precision) == (model_zoo.DEFAULT, "onnx", "float32")
    assert (exported.channels, exported.min_size, exported.max_size) == ("RGB", 480, 640)
    assert exported.num_proposals == cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS
    assert exported.num_refined == cfg.MODEL.SHARPMASK.FPN.NUM_REFINED
    assert exported.strides == [4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', '{"version": 1}'])
def test_a_broken_file_of_a_model_is_named(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.json.*export the model again"):
        ExportedModel.read(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*model\.json: name a folder"):
        ExportedModel.read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8", "--calibrate", "."], "--int8 needs --to openvino"),
        (["--int8", "--to", "openvino"], "--int8 needs --calibrate"),
        (["--model", "sharpmask_lite0"], "MODEL.META_ARCHITECTURE is SharpMaskProposalNetwork: only"),
        (["--model", "multipath_bifpn_lite0"], "MODEL.META_ARCHITECTURE is GeneralizedRCNN: only"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        command.main([*arguments, "--output", str(tmp_path / "exported")])
    assert not (tmp_path / "exported" / "model.json").exists()


def test_the_command_writes_a_complete_folder(tmp_path, monkeypatch, capsys):
    """The graphs are replaced by empty files: writing them is tested above."""
    from sharpmask_d2.export import onnx_files

    def write(encoder, decoder, folder, calibration):
        assert not calibration
        (folder / "encoder.onnx").write_bytes(b"")

    monkeypatch.setattr(onnx_files, "write_onnx", write)
    assert command.main(["--output", str(tmp_path / "new" / "exported")]) == 0
    values = json.loads((tmp_path / "new" / "exported" / "model.json").read_text())
    assert values["name"] == model_zoo.DEFAULT
    assert "sharpmask propose --model-folder" in capsys.readouterr().out
