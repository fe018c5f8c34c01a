"""The command `sharpmask propose --model-folder` in a process that has neither torch, Detectron2, pycocotools nor OpenCV."""

import json
import os
import subprocess
import sys

import pytest
from drawing import ROOT
from PIL import Image
from pycocotools import mask as mask_util
from sharpmask_d2.runtime.model_file import ExportedModel

# Hides libraries as if they were not installed, then starts the command.
START = """
import sys

HIDDEN = {"torch", "torchvision", "detectron2", "pycocotools", "cv2", "timm", "fvcore", "yaml", "tabulate"}

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import sharpmask_command
sharpmask_command.main(sys.argv[1:])
"""

# A stand-in for onnxruntime, so that the test needs no exported graphs: discs in the windows of highest score.
ONNXRUNTIME = """
import types
import numpy as np

class SessionOptions:
    pass

class InferenceSession:
    def __init__(self, path, options, providers):
        self.names = ["image", "image_size"] if "encoder" in path else ["table", "image_size", "windows", "coarse_windows"]

    def get_inputs(self):
        return [types.SimpleNamespace(name=name) for name in self.names]

    def run(self, outputs, inputs):
        assert set(inputs) == set(self.names)
        if "image" in inputs:
            assert inputs["image"].dtype == np.uint8 and all(side % 128 == 0 for side in inputs["image"].shape[:2])
            cells = sum(-(-inputs["image"].shape[0] // s) * -(-inputs["image"].shape[1] // s) for s in (8, 16))
            return [np.random.default_rng(int(inputs["image"].sum())).normal(size=cells).astype(np.float32), np.zeros(3)]
        places = (np.arange(56) - 27.5) / 28
        disc = (0.5 - places**2 - places[:, None] ** 2).astype(np.float32) * 20
        return [np.repeat(disc[None], len(inputs[name]), axis=0) for name in ("windows", "coarse_windows")]
"""


@pytest.fixture
def run(tmp_path, photographs):
    """The function `run(arguments)`, which starts the command in a process of its own."""
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    (libraries / "onnxruntime.py").write_text(ONNXRUNTIME)
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("encoder.onnx", "decoder.onnx"):
        (folder / name).write_bytes(name.encode())
    ExportedModel(
        name="discs",
        format="onnx",
        precision="float32",
        channels="RGB",
        min_size=100,
        max_size=200,
        size_divisibility=128,
        strides=[8, 16],
        window_cells=[5],
        mask_window=1.2,
        num_proposals=20,
        num_refined=5,
        window_nms_thresh=0.6,
        nms_thresh=1.0,
        mask_threshold=0.35,
        mask_size=56,
        stability=True,
        mask_nms=True,
    ).write(folder)

    def start(*arguments):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(libraries), str(ROOT)])}
        line = [sys.executable, "-c", START, *map(str, arguments)]
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    return start


def test_a_folder_of_photographs_is_proposed_and_a_stopped_run_resumed(run, tmp_path, photographs):
    (photographs / "broken.png").write_bytes(b"no image")
    line = [
        "propose",
        "--model-folder",
        "exported",
        "--input",
        "photographs",
        "--output",
        "out.json",
        "--pkl",
        "out.pkl",
    ]
    done = run(*line)
    assert done.returncode == 1
    assert "cannot process image 4" in done.stderr
    assert "Traceback" not in done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2, 3}
    assert set(results[0]) == {"image_id", "file_name", "category_id", "bbox", "score", "segmentation"}
    for result in results:
        box = mask_util.toBbox(result["segmentation"]).tolist()
        assert result["bbox"] == box
        assert 0 < result["score"] < 1
    assert (tmp_path / "out.pkl").is_file()

    Image.open(photographs / "0.png").rotate(180).save(photographs / "broken.png")
    again = run(*line)
    assert again.returncode == 0, again.stderr
    assert "3 of 4 images are done already" in again.stdout
    more = json.loads((tmp_path / "out.json").read_text())
    assert [result for result in more if result["image_id"] != 4] == results
    assert len(more) > len(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["propose", "--input", "photographs", "--output", "o.json"], "Detectron2 is not installed"),
        (["segment", "--help"], "Detectron2 is not installed"),
        (["propose", "--model-folder", "none", "--input", "photographs", "--output", "o.json"], "there is no none"),
        (
            [
                "propose",
                "--model-folder",
                "exported",
                "--input",
                "photographs",
                "--output",
                "o.json",
                "--visualize",
                "p",
            ],
            "cv2 is not installed: run pip install 'sharpmask_d2[torch]'",
        ),
        (
            ["propose", "--model-folder", "exported", "--input", "photographs", "--output", "o.json", "--weights", "w"],
            "--weights cannot be combined with --model-folder",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(run, arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    *usage, line = done.stderr.splitlines()
    assert message in line
    assert not usage or usage[0].startswith("usage: ")


def test_help_needs_neither_torch_nor_detectron2(run):
    assert "--model-folder" in run("propose", "--help").stdout
