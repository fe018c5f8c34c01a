"""Files whose content asks to run code are refused, and the code is not run."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import os
import runpy
import sys

import pytest
import torch
from drawing import ROOT
from sharpmask_d2.checkpoint import read_checkpoint
from sharpmask_d2.errors import UserError
from sharpmask_d2.inference.configuration import build_config


class _Touch:
    """An object whose pickle asks to create a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def run_tool(monkeypatch, name, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")


def test_a_checkpoint_is_packed_without_running_code(tmp_path, monkeypatch, capsys):
    torch.save({"model": {"a": torch.ones(3)}, "iteration": _Touch(tmp_path / "ran")}, tmp_path / "bad.pth")
    torch.save({"model": {"a": torch.ones(3)}, "iteration": 5, "optimizer": {"lr": [0.1]}}, tmp_path / "good.pth")
    output = tmp_path / "packed.pth"
    with pytest.raises(SystemExit, match="2"):
        run_tool(monkeypatch, "package_model.py", tmp_path / "bad.pth", "--output", output)
    error = capsys.readouterr().err
    assert error.startswith(str(tmp_path / "bad.pth"))
    assert error.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    assert not output.exists()
    run_tool(monkeypatch, "package_model.py", tmp_path / "good.pth", "--output", output)
    assert read_checkpoint(output)["model"]["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("content", [b"", b"text", None, {"model": 5}, {"model": {"a": 5}}, [1]])
def test_a_file_that_is_not_a_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"model\.pth (cannot be read as|is not) a checkpoint") as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_config_files_do_not_run_code(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    with pytest.raises(UserError, match="could not determine a constructor for the tag"):
        build_config(config_file=str(config))
    with pytest.raises(SystemExit, match="2"):
        run_tool(monkeypatch, "train_net.py", "--config-file", config)
    assert not (tmp_path / "ran").exists()
