"""The stage clock against a clock that the test moves, the limit against an analytic count, and the tool as a user runs it."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import json
import runpy
import sys
import time

import cv2
import pytest
import torch
from sharpmask_d2 import model_zoo
from sharpmask_d2.engine.trainer import Trainer
from torch import nn

from benchmarks import STAGES, StageClock, best_rates, count_operations, draw_objects, growth
from benchmarks import stages as stages_module
from benchmarks.proposals import summarize


@pytest.fixture
def hands(monkeypatch):
    """A clock that stands still but for `hands.wait(seconds)`."""

    class Hands:
        now = 5.0

        def wait(self, seconds):
            self.now += seconds

    hands = Hands()
    monkeypatch.setattr(stages_module.time, "perf_counter", lambda: hands.now)
    return hands


def test_a_stage_inside_another_counts_for_itself(tiny_cfg, hands):
    clock = StageClock(Trainer.build_model(tiny_cfg))
    with clock.stage("windows"):
        hands.wait(1)
        with clock.stage("trunk"):
            hands.wait(2)
            with clock.stage("score"):
                hands.wait(4)
        hands.wait(8)
        with clock.stage("trunk"):
            hands.wait(16)
    assert clock.seconds == {"windows": 9, "trunk": 18, "score": 4}


def inside(model, stage):
    """A module that runs within the stage."""
    network = model.pyramid.network
    return {
        "trunk": network.trunk.stem.conv1,
        "score": network.head.reduce,
        "horizontal": network.mask_branch.steps[0].horizontal,
        "refinement": network.mask_branch.steps[0].vertical[0],
    }[stage]


@pytest.mark.parametrize("stage", ["trunk", "score", "horizontal", "refinement"])
def test_time_of_a_part_belongs_to_its_stage(tiny_cfg, hands, stage):
    model = Trainer.build_model(tiny_cfg).eval()
    calls = []
    inside(model, stage).register_forward_hook(lambda *_: (hands.wait(1), calls.append(1))[0])
    with torch.no_grad(), StageClock(model) as clock, clock.stage("windows"):
        model([{"image": torch.zeros(3, 64, 96, dtype=torch.uint8)}])
    assert calls
    assert {name: seconds for name, seconds in clock.seconds.items() if seconds} == {stage: len(calls)}


@pytest.mark.parametrize("pyramid", ["image", "feature"])
def test_a_measured_model_is_as_it_was(tiny_cfg, pyramid):
    cfg = tiny_cfg if pyramid == "image" else model_zoo.get_config("sharpmask_bifpn_lite0")
    cfg.MODEL.DEVICE = "cpu"
    model = Trainer.build_model(cfg).eval()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    images = [{"image": torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)}]
    with torch.no_grad():
        expected = model(images)[0]["proposals"]
        with StageClock(model) as clock:
            measured = model(images)[0]["proposals"]
    # One feature pyramid has no images to resize.
    assert set(clock.seconds) == set(STAGES) - {"windows"} - ({"pyramid"} if pyramid == "feature" else set())
    assert all(seconds > 0 for seconds in clock.seconds.values())
    assert torch.equal(expected.objectness_logits, measured.objectness_logits)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    with torch.no_grad():
        clock.seconds.clear()
        model(images)
    assert not clock.seconds


def test_operations_are_two_for_each_multiply_add():
    convolution = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    assert count_operations(convolution, (torch.zeros(1, 3, 10, 20),)) == 2 * 9 * 3 * 5 * 10 * 20


@pytest.mark.parametrize("name", ["deepmask_lite0", "sharpmask_bifpn_lite0"])
def test_operations_of_packaged_models_are_counted(name):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    model = Trainer.build_model(cfg).eval()
    counted = [count_operations(model, [{"image": torch.zeros(3, *size)}]) for size in ((64, 64), (192, 192))]
    # The trunk's grow with the image, those of windows do not.
    assert 1e8 < counted[0] < counted[1] < 9 * counted[0]


def test_rates_are_those_of_a_product_that_is_timed_here():
    rates = best_rates(torch.device("cpu"), torch.float32, repeat=1)
    assert rates.keys() == {"matrix product", "3x3 convolution"}
    a = torch.randn(1024, 1024)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    # Within what other work on the machine takes away.
    assert all(0.02 < rate * min(seconds) / (2 * 1024**3) < 50 for rate in rates.values())


def test_the_tool_measures_models_in_turn(tiny_cfg, tmp_path, monkeypatch, capsys):
    config, output = tmp_path / "tiny.yaml", tmp_path / "figures.json"
    config.write_text(tiny_cfg.dump())
    # Without bfloat16 in the processor, the large products that measure its best rates take minutes.
    dtype = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    arguments = ["--config-file", config, "--dtype", dtype, "--num-proposals", "5", "9", "--batch-size", "1", "2"]
    arguments += ["--image-size", "64", "96", "--repeat", "2", "--output", output]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "proposals", *map(str, arguments)])
    runpy.run_module("benchmarks", run_name="__main__")
    assert f"| tiny    | {dtype} |" in capsys.readouterr().out
    figures = json.loads(output.read_text())
    runs = figures["runs"]
    measured = [(run["proposals"], run["batch"]) for run in runs if run["dtype"] == dtype]
    assert measured == [(5, 1), (5, 2), (9, 1), (9, 2)]
    for run in runs:
        assert run["fastest"] <= run["seconds"] <= run["slowest"]
        assert run["limit"] == pytest.approx(run["GFLOP"] * 1e9 / max(figures["rates"][run["dtype"]].values()))
        assert run["GFLOP"] > 0
        assert run["peak MB"] >= 0
    # More windows are refined; more images of a batch are not more operations of an image.
    assert runs[2]["GFLOP"] > runs[1]["GFLOP"] == runs[0]["GFLOP"]


def test_batches_are_measured_by_the_image():
    laps = [{"trunk": seconds, "RLE": 2.0} for seconds in (8.0, 6.0, 10.0)]
    figures = summarize(laps, 4, 6e9, {"matrix product": 1e9, "3x3 convolution": 3e9})
    expected = {"seconds": 2.5, "fastest": 2, "slowest": 3, "trunk": 2, "score": 0, "RLE": 0.5, "limit": 2}
    assert {name: figures[name] for name in expected} == expected
    assert figures["times the limit"] == 1.25
    assert figures["images per second"] == 0.5


def test_a_detector_is_told_where_it_belongs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "proposals", "--model", "multipath_bifpn_lite0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("benchmarks", run_name="__main__")
    assert "['multipath_bifpn_lite0'] make no proposals alone" in capsys.readouterr().err


def run_tool(monkeypatch, tmp_path, *arguments) -> dict:
    output = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments), "--output", str(output), "--repeat", "1"])
    runpy.run_module("benchmarks", run_name="__main__")
    return json.loads(output.read_text())


def test_the_tool_measures_training_steps(tiny_cfg, tmp_path, monkeypatch):
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg.dump())
    arguments = ["training", "--config-file", config, "--image-size", 96, 128]
    figures = run_tool(monkeypatch, tmp_path, *arguments)
    (run,) = figures["runs"]
    images = tiny_cfg.SOLVER.IMS_PER_BATCH
    patches = images * tiny_cfg.MODEL.SHARPMASK.SAMPLING.PATCHES_PER_IMAGE
    assert run["images per second"] == pytest.approx(images / run["seconds per step"])
    assert run["patches per second"] == pytest.approx(patches / run["seconds per step"])
    assert run["limit"] > 0
    # The operations are those of three forward passes of the same patches.
    model = Trainer.build_model(tiny_cfg)
    side = tiny_cfg.MODEL.SHARPMASK.WINDOW_SIZE + tiny_cfg.MODEL.SHARPMASK.CONTEXT
    forward = count_operations(model.eval(), ([{"patches": torch.zeros(patches, 3, side, side)}],))
    assert run["limit"] * max(figures["rates"]["float32"].values()) == pytest.approx(3 * forward)


def test_the_tool_measures_evaluation(tmp_path, monkeypatch):
    figures = run_tool(monkeypatch, tmp_path, "evaluation", "--num-proposals", 20, "--image-size", 60, 80)
    assert len(figures) == 3
    assert all(seconds > 0 for seconds in figures.values())


def test_the_tool_draws_how_time_grows(tiny_cfg, tmp_path, monkeypatch):
    config, picture = tmp_path / "tiny.yaml", tmp_path / "growth.png"
    config.write_text(tiny_cfg.dump())
    for name, value in {"SIZES": ((48, 64), (96, 128)), "COUNTS": (3, 5), "BATCHES": (1, 2)}.items():
        monkeypatch.setattr(growth, name, value)
    arguments = ["growth", "--config-file", config, "--plot", picture]
    (curve,) = run_tool(monkeypatch, tmp_path, *arguments)["curves"]
    points = {
        axis: [at for at, _ in curve[axis]] for axis in ("megapixels", "scales", "proposals", "images in a batch")
    }
    scales = list(range(1, len(tiny_cfg.MODEL.SHARPMASK.TEST.SCALES) + 1))
    assert points == {
        "megapixels": [0.003072, 0.012288],
        "scales": scales,
        "proposals": [3, 5],
        "images in a batch": [1, 2],
    }
    assert cv2.imread(str(picture)).shape[1] > 1000


def test_drawn_objects_fill_their_boxes():
    objects = draw_objects(5, (60, 80), 3)
    assert objects.gt_classes.tolist() == [0, 1, 2, 0, 1]
    tight = objects.gt_masks.get_bounding_boxes().tensor
    assert (tight - objects.gt_boxes.tensor).abs().max() <= 1
    # An ellipse has pi / 4 of its box.
    share = objects.gt_masks.tensor.sum(dim=(1, 2)) / objects.gt_boxes.area()
    assert (share - 0.785).abs().max() < 0.05
