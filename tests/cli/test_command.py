"""How the tools end: in one line for what a user can mend, in a traceback for a bug. They run in this process."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import json
import logging
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import ROOT
from PIL import Image
from sharpmask_d2.cli.command import run, set_threads
from sharpmask_d2.errors import UserError


@pytest.fixture
def files(tiny_cfg, tmp_path, monkeypatch):
    """The folder with what users mix up; it is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").write_text(tiny_cfg.dump())
    whole = (ROOT / "sharpmask_d2" / "model_zoo" / "lite0.pth").read_bytes()
    Path("photos").mkdir()
    Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save("photos/a.png")
    Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save("a.jpg")
    for name, content in {
        "empty.pth": b"",
        "cut.pth": whole[:4000],
        "half.pth": whole[: len(whole) // 2],
        "text.pth": b"no weights",
        "notes.txt": b"to do: [",
        "words.yaml": b"just words",
        "binary.yaml": b"\xa1\x00\xff",
        "empty.yaml": b"",
        "unknown.yaml": b"MODEL:\n  NONSENSE: 1\n",
        "type.yaml": b"MODEL: 3\n",
        "other.json": b"[1]",
    }.items():
        Path(name).write_bytes(content)
    torch.save({"weights": 3}, "other.pth")
    return tmp_path


def run_tool(monkeypatch, name: str, arguments: str) -> None:
    # The tool sets it where it is not set.
    monkeypatch.setenv("GOMP_SPINCOUNT", os.environ.get("GOMP_SPINCOUNT", "1000"))
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    if name == "benchmarks":
        runpy.run_module(name, run_name="__main__")
    else:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")


COMPUTE = "--input photos --output o.json --config-file model.yaml MODEL.DEVICE cpu"
DEEPMASK = f"--config-file {ROOT / 'configs' / 'deepmask_lite0.yaml'}"


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("compute_proposals", f"{COMPUTE} --weights a.jpg", "a.jpg cannot be read as a checkpoint"),
        ("compute_proposals", f"{COMPUTE} --weights text.pth", "text.pth cannot be read as a checkpoint"),
        ("compute_proposals", f"{COMPUTE} --weights empty.pth", "empty.pth cannot be read as a checkpoint"),
        ("compute_proposals", f"{COMPUTE} --weights cut.pth", "cut.pth cannot be read as a checkpoint"),
        ("compute_proposals", f"{COMPUTE} --weights half.pth", "half.pth cannot be read as a checkpoint"),
        ("compute_proposals", f"{COMPUTE} --weights other.pth", "other.pth"),
        ("compute_proposals", f"{COMPUTE} --weights none.pth", "there is no checkpoint none.pth"),
        ("compute_proposals", f"{COMPUTE} --num-proposals 0", "--num-proposals: 0 is less than 1"),
        ("compute_proposals", f"{COMPUTE} --num-proposals=-5", "--num-proposals: -5 is less than 1"),
        ("compute_proposals", f"{COMPUTE} --threads 0", "--threads: 0 is less than 1"),
        ("compute_proposals", f"{COMPUTE} MODEL.SHARPMASK.TEST.NUM_PROPOSALS 0", "NUM_PROPOSALS is 0"),
        ("compute_proposals", f"{COMPUTE} MODEL.NONSENSE 3", "Non-existent key: MODEL.NONSENSE"),
        ("compute_proposals", f"{COMPUTE} MODEL.MASK_ON", "odd length"),
        ("compute_proposals", f"{COMPUTE} MODEL.MASK_ON 7", "config key: MODEL.MASK_ON"),
        ("compute_proposals", f"{COMPUTE} MODEL.DEVICE cuda:99", "MODEL.DEVICE is 'cuda:99'"),
        ("compute_proposals", f"{COMPUTE} MODEL.DEVICE nonsense", "MODEL.DEVICE is 'nonsense'"),
        ("compute_proposals", "--input photos --output o.json --model nonsense", "no packaged model 'nonsense'"),
        ("compute_proposals", "--input nothing --output o.json", "there is no nothing"),
        ("compute_proposals", "--annotations other.json --image-root photos --output o.json", "other.json"),
        ("demo", "--input photos --output o --model sharpmask_lite0", "choose a detector"),
        ("demo", "--input photos --output o --config-file unknown.yaml", "unknown.yaml: Non-existent config key"),
        ("demo", "--input photos --output o --dataset a none.json photos", "there is no annotation file none.json"),
        ("train_net", "", "--config-file is missing"),
        ("train_net", "--config-file notes.txt", "notes.txt, line 1 is no yaml"),
        ("train_net", f"{DEEPMASK} NONSENSE 1", "Non-existent key: NONSENSE"),
        ("train_net", f"{DEEPMASK} DATASETS.TRAIN ('nobody',)", "there is no data set 'nobody'"),
        ("train_net", f"{DEEPMASK} --eval-only DATASETS.TEST ()", "DATASETS.TEST is empty"),
        ("train_net", f"{DEEPMASK} --dataset a none.json photos", "there is no annotation file none.json"),
        ("train_net", f"{DEEPMASK} --num-gpus 99 DATASETS.TRAIN ('nobody',) DATASETS.TEST ()", "nobody"),
        ("package_model", "a.jpg --output o.pth", "a.jpg cannot be read as a checkpoint"),
        ("package_model", "none.pth --output o.pth", "none.pth"),
        ("package_model", "other.pth --output o.pth", "other.pth is not a checkpoint of Detectron2"),
        ("benchmarks", "proposals --config-file notes.txt", "notes.txt, line 1 is no yaml"),
        ("benchmarks", "proposals --model deepmask_lite0 NONSENSE 1", "Non-existent key: NONSENSE"),
        ("benchmarks", "detector --weights a.jpg MODEL.DEVICE cpu", "a.jpg cannot be read as a checkpoint"),
        ("benchmarks", "training --config-file model.yaml --repeat 0", "--repeat: 0 is less than 1"),
        ("convert_proposals", "--input other.json --output o.json --num-proposals=-1", "-1 is less than 1"),
        ("selective_search", "--annotations other.json --image-root photos --output o.json", "other.json"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(files, monkeypatch, capsys, tool, arguments, message):
    with pytest.raises(SystemExit) as ended:
        run_tool(monkeypatch, tool, arguments)
    assert ended.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert message in line
    # argparse prints how the tool is used before it.
    assert not usage or usage[0].startswith("usage: ")
    assert not Path("o.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "notes.txt, line 1 is no yaml"),
        ("words.yaml", "words.yaml is no config"),
        ("binary.yaml", "binary.yaml is no config but binary data"),
        ("empty.yaml", "empty.yaml is no config"),
        ("unknown.yaml", "unknown.yaml: Non-existent config key: MODEL.NONSENSE"),
        ("type.yaml", "type.yaml"),
        ("none.yaml", "there is no file none.yaml"),
        ("photos", "there is no file photos"),
    ],
)
def test_what_is_no_config_is_named(files, monkeypatch, capsys, name, message):
    with pytest.raises(SystemExit) as ended:
        run_tool(monkeypatch, "compute_proposals", f"--input photos --output o.json --config-file {name}")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_bug_keeps_its_traceback():
    def main():
        # What NumPy says of shapes is nothing that a user can mend.
        np.zeros(3) + np.zeros(2)

    with pytest.raises(ValueError, match="broadcast"):
        run(main)


def test_ctrl_c_ends_in_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


class _Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise UserError("image 7 has no masks")


def test_of_a_process_that_loads_data_the_message_is_left(capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda: list(torch.utils.data.DataLoader(_Broken(), num_workers=1)))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "image 7 has no masks\n"


def test_the_status_of_a_tool_is_its_own():
    with pytest.raises(SystemExit) as ended:
        run(lambda: 1)
    assert ended.value.code == 1
    assert run(lambda: 0) is None


def test_threads_are_limited(files, monkeypatch):
    before = torch.get_num_threads()
    try:
        run_tool(monkeypatch, "compute_proposals", f"{COMPUTE} --threads 3")
        assert torch.get_num_threads() == 3
        set_threads(None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert json.loads(Path("o.json").read_text())


def test_a_user_s_mistake_has_no_traceback_where_records_of_debug_are_shown(capsys):
    def main():
        raise UserError("a.json: not there")

    shown = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("sharpmask_d2")
    level = logger.level
    logger.addHandler(shown)
    logger.setLevel(logging.DEBUG)
    try:
        with pytest.raises(SystemExit, match="2"):
            run(main)
    finally:
        logger.removeHandler(shown)
        logger.setLevel(level)
    assert capsys.readouterr().err == "a.json: not there\n"
