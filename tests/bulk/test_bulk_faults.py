"""Bulk runs on several processes survive the death of their processes: nothing is computed twice, and nothing is lost."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from drawing import ROOT
from sharpmask_d2.console import console
from sharpmask_d2.inference.propose import compute_proposals

pq = pytest.importorskip("pyarrow.parquet", reason="needs Ray: pip install -e '.[ray]'")

IMAGES, BROKEN = 60, 7

pytestmark = [
    pytest.mark.slow,
    # Not imported here, because Ray reads its environment when it is imported.
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'"),
]


def wait_for(condition: Callable, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    """The processes that Ray starts find the package and the helpers of the tests."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}")


@pytest.fixture
def options(tiny_cfg, tmp_path) -> dict:
    """Arguments of `compute_in_bulk` and `compute_proposals` for twenty images, one of which is broken."""
    torch.manual_seed(0)
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "tiny.pth")
    torch.save({"model": build_model(tiny_cfg).state_dict()}, tiny_cfg.MODEL.WEIGHTS)
    (tmp_path / "tiny.yaml").write_text(tiny_cfg.dump())
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        image = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (100 + number, 80))
        cv2.imwrite(str(photographs / f"{number:02d}.png"), image)
    (photographs / f"{BROKEN:02d}.png").write_bytes(b"no image")
    return {"input": [str(photographs)], "config_file": str(tmp_path / "tiny.yaml")}


@pytest.fixture
def files(tmp_path) -> Callable:
    """A function that lists the result files of the run."""
    return lambda: sorted((tmp_path / "bulk" / "proposals").glob("*.parquet"))


def check_results(options: dict, tmp_path: Path, files: list) -> None:
    """Checks that the results equal those of `sharpmask propose`, and that each image has one row."""
    with console(quiet=True):
        assert compute_proposals(**options, output=str(tmp_path / "plain.json")) == 1
    assert (tmp_path / "bulk.json").read_bytes() == (tmp_path / "plain.json").read_bytes()
    assert len(json.loads((tmp_path / "plain.json").read_text())) > 10 * (IMAGES - 1)
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert Counter(row["image_id"] for row in rows) == Counter(range(1, IMAGES + 1))
    assert {row["image_id"]: row["error"] for row in rows if row["error"]} == {
        BROKEN + 1: "it is no image of a format that Pillow reads"
    }


def listening_addresses(process: int) -> set:
    """The addresses at which a process listens, in hexadecimal numbers as Linux shows them."""
    sockets = {os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir() if link.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add(words[1].partition(":")[0])
    return found


def children(process: int) -> list:
    """The numbers of a process and of all that it has started, directly or not."""
    direct = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(number for child in direct for number in children(int(child)))]


def test_a_run_survives_the_death_of_its_processes(options, tiny_cfg, tmp_path, files):
    """First one of two processes that compute dies, then the one that commands them."""
    from bulk_runs import run_slowly

    arguments = {**options, "output": str(tmp_path / "bulk"), "coco": str(tmp_path / "bulk.json")}
    started = Path(f"{tiny_cfg.OUTPUT_DIR}.processes")
    script = f"from bulk_runs import run_slowly; run_slowly(**{arguments!r})"
    driver = subprocess.Popen([sys.executable, "-c", script])
    wait_for(lambda: (files() and len(list(started.iterdir())) == 2) or driver.poll() is not None)
    # Ray can be reached from this machine only.
    addresses = set().union(*(listening_addresses(number) for number in children(driver.pid)))
    assert addresses
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}
    first = next(started.iterdir())
    os.kill(int(first.name), signal.SIGKILL)
    # Another process replaces it.
    wait_for(lambda: len(list(started.iterdir())) == 3 or driver.poll() is not None)
    driver.kill()
    driver.wait()
    wait_for(lambda: not any(Path(f"/proc/{file.name}").exists() for file in started.iterdir()))
    before = {file: file.stat().st_mtime_ns for file in files()}
    assert 1 <= len(before) < IMAGES / 2
    assert not (tmp_path / "bulk.json").exists()
    # A process that is killed while it writes leaves a file without an end.
    broken = files()[0].with_name("broken.parquet")
    broken.write_bytes(files()[0].read_bytes()[:-4])
    assert run_slowly(**arguments) == 1
    assert not broken.exists()
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(list(started.iterdir())) == 5
    check_results(options, tmp_path, files())
    # Everything is done: no process is started.
    assert run_slowly(**arguments) == 1
    assert len(list(started.iterdir())) == 5
