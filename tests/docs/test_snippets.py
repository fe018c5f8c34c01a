"""The Python snippets of the documents run as they are printed."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).resolve().parents[2]
# The script of a training is shortened.
SHORTER = {
    "cfg.SOLVER.MAX_ITER = 1000": "cfg.SOLVER.MAX_ITER = 1\ncfg.DATALOADER.NUM_WORKERS = 0",
    "cfg.SOLVER.IMS_PER_BATCH = 4": "cfg.SOLVER.IMS_PER_BATCH = 1",
    "cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 400": "cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 50",
}


def snippets(page: str) -> str:
    """All Python blocks of a page as one script."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks, f"{page} has no Python snippet"
    return "\n".join(blocks)


def run(script: str, page: str) -> dict:
    """Run a script; returns its names."""
    names = {"__name__": "__main__"}
    exec(compile(script, page, "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a photograph.jpg of a bright disc on noise."""
    noise = np.random.default_rng(0).integers(60, 100, (120, 160, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photograph.jpg"), cv2.circle(noise, (80, 60), 35, (40, 80, 240), -1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def datasets(folder, make_dataset):
    """train.json, val.json and images/ in the current folder; what the script registers is removed afterwards."""
    make_dataset(folder, num_images=2).annotations.rename(folder / "train.json")
    make_dataset(folder, num_images=1).annotations.rename(folder / "val.json")
    yield
    for name in ("mine_train", "mine_val"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def test_readme(folder):
    names = run(snippets("README.md"), "README.md")
    assert names["bitmaps"].shape[1:] == (120, 160)
    assert len(names["rles"]) == len(names["bitmaps"]) > 0


def test_getting_started(folder):
    names = run(snippets("docs/getting-started.md"), "docs/getting-started.md")
    assert names["masks"].image_size == names["instances"].image_size == (120, 160)
    assert all(len(proposals) > 0 for proposals in names["pair"])


def test_prompts(folder):
    names = run(snippets("docs/prompts.md"), "docs/prompts.md")
    assert names["masks"].shape == (2, 1, 120, 160)
    assert len(names["crops"]) == len(names["polygons"]) == 2
    # The disc.
    assert names["masks"][0, 0, 60, 80]


def test_export(folder, exported):
    Path("exported").symlink_to(exported)
    names = run(snippets("docs/export.md"), "docs/export.md")
    assert names["masks"].shape == (1, 56, 56)
    assert names["bitmaps"].shape == (10, 120, 160)
    assert len(names["rles"]) == 10


def test_labelling(folder):
    pytest.importorskip("supervision", reason="the page shows masks as detections of supervision")
    rle = {"size": [120, 160], "counts": "0`1`fb0"}  # the first 48 pixels of the first column
    results = [{"image_id": 1, "file_name": "a.jpg", "category_id": 1, "score": 0.9, "segmentation": rle}]
    Path("masks.json").write_text(json.dumps(results))
    names = run(snippets("docs/labelling.md"), "docs/labelling.md")
    assert len(names["detections"]) == 20
    assert names["found"][0].xyxy.tolist() == [[0, 0, 1, 48]]


def test_script_with_an_own_dataset(datasets, folder):
    script = snippets("docs/detectors.md")
    for long, short in SHORTER.items():
        assert long in script
        script = script.replace(long, short)
    run(script, "docs/detectors.md")
    assert (folder / "output/mine/model_final.pth").exists()
    assert (folder / "output/mine/coco_instances_results.json").exists()
