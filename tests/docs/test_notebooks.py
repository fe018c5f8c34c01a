"""The notebooks run from the first to the last cell, and are kept without outputs."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs" / "notebooks").glob("*.ipynb"))

# What is shorter in the tests.
SHORTER = {"NUM_STEPS = 150": "NUM_STEPS = 2"}


@pytest.fixture(autouse=True)
def _datasets():
    known = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def code_cells(path: Path) -> list:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_has_no_outputs(path):
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code_cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("skimage", reason="the notebook reads a photograph of scikit-image: pip install scikit-image")
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(path), start=1):
        source = "".join(cell["source"])
        for text, shorter in SHORTER.items():
            source = source.replace(text, shorter)
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
    matplotlib.pyplot.close("all")
