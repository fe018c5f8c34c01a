"""Fixtures that tests share: drawn datasets in COCO format, a tiny model's config, and the folder of reference data."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import fcntl
import functools
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from drawing import ROOT, draw_dataset
from sharpmask_d2 import add_sharpmask_config

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_dataset():
    """The function `draw_dataset(folder, ...)`."""
    return draw_dataset


@pytest.fixture(scope="session")
def exported_model(tmp_path_factory):
    """A function that exports the default model into a folder, once per format ("onnx" or "openvino"), and returns the folder."""

    @functools.cache
    def export(to: str) -> Path:
        for name in {"onnx": ("onnx", "onnxscript"), "openvino": ("openvino",)}[to]:
            pytest.importorskip(name)
        from sharpmask_d2.export import export_model
        from sharpmask_d2.model_zoo import DEFAULT

        # The processes of pytest-xdist share one export, which takes a minute.
        shared = tmp_path_factory.getbasetemp()
        shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
        folder = shared / "exported" / to
        folder.parent.mkdir(exist_ok=True)
        with open(folder.with_suffix(".lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "model.json").exists():
                export_model(output=str(folder), to=to, model=DEFAULT)
        return folder

    return export


@pytest.fixture
def tiny_cfg(tmp_path):
    """The config of a small, fast SharpMask: ResNet-18, narrow heads, two scales, no frozen layers."""
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SharpMaskProposalNetwork"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 1
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.TRUNK.RESNET_DEPTH = 18
    sharpmask.REDUCED_CHANNELS = 8
    sharpmask.EMBED_DIM = 16
    sharpmask.SCORE_DIM = 16
    sharpmask.REFINEMENT.CHANNELS = 16
    sharpmask.SAMPLING.PATCHES_PER_IMAGE = 4
    sharpmask.TEST.PATCHES_PER_IMAGE = 4
    sharpmask.TEST.SCALES = [-1.0, 0.0]
    sharpmask.TEST.NUM_PROPOSALS = 20
    return cfg


@pytest.fixture
def photographs(tmp_path):
    """A folder of three small images; the second is greyscale."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, channels in enumerate([3, 1, 3]):
        image = cv2.resize(rng.integers(0, 256, (6, 8, channels), dtype=np.uint8), (100 + i, 80))
        cv2.imwrite(str(folder / f"{i}.png"), image)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The folder of the default model as ONNX graphs, for small images: shorter side 128 pixels, longer side at most 192."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    # Loaded only where models are exported.
    from sharpmask_d2.export import export_model
    from sharpmask_d2.model_zoo import DEFAULT

    folder = tmp_path_factory.mktemp("exported")
    sides = ["INPUT.MIN_SIZE_TEST", "128", "INPUT.MAX_SIZE_TEST", "192"]
    export_model(output=str(folder), to="onnx", model=DEFAULT, opts=sides)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data and weights beside the repository; tests that need it are skipped without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the folder {path}, which is not part of the repository")
    return path
