"""Detectron2's own scripts run with the package's models."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import json
import os
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest
from sharpmask_d2 import launch

ROOT = Path(__file__).resolve().parents[2]
# Where the registry's package has them; a Detectron2 from git has none installed.
SCRIPTS = Path(detectron2.__file__).resolve().parent.parent / "tools"
needs_scripts = pytest.mark.skipif(
    not (SCRIPTS / "plain_train_net.py").is_file(), reason="Detectron2's scripts are not installed"
)


def run_launch(*arguments) -> str:
    """Output of `python -m sharpmask_d2.launch ...`, which has to succeed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "sharpmask_d2.launch", *map(str, arguments)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture
def dataset(make_dataset, tmp_path):
    data = make_dataset(tmp_path / "data", num_images=2)
    return ["--dataset", "launched", data.annotations, data.image_root]


@pytest.fixture
def config_file(tiny_cfg, tmp_path):
    tiny_cfg.DATASETS.TRAIN = tiny_cfg.DATASETS.TEST = ("launched",)
    # As in configs/Base-SharpMask.yaml.
    tiny_cfg.MODEL.MASK_ON = True
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    tiny_cfg.SOLVER.MAX_ITER = 2
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return path


@needs_scripts
def test_plain_train_net_trains_and_evaluates(dataset, config_file, tiny_cfg):
    output = run_launch(*dataset, SCRIPTS / "plain_train_net.py", "--config-file", config_file)
    assert Path(tiny_cfg.OUTPUT_DIR, "model_final.pth").is_file()
    assert "AR@1000" in output


@needs_scripts
def test_train_net_trains_our_configs_on_a_cpu(dataset, tmp_path):
    """Detectron2's DefaultTrainer has mixed precision on CUDA only, and ends with an error elsewhere."""
    settings = {
        "MODEL.DEVICE": "cpu",
        "MODEL.TIMM.PRETRAINED": "",
        "MODEL.BIFPN.CHANNELS": 8,
        "MODEL.SHARPMASK.EMBED_DIM": 16,
        "MODEL.SHARPMASK.FPN.SCORE_CHANNELS": 8,
        "INPUT.MIN_SIZE_TRAIN": "(96,)",
        "DATASETS.TRAIN": "('launched',)",
        "DATASETS.TEST": "()",
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 1,
        "OUTPUT_DIR": tmp_path / "trained",
    }
    config = ROOT / "configs" / "sharpmask_bifpn_lite0.yaml"
    pairs = [part for pair in settings.items() for part in pair]
    output = run_launch(*dataset, SCRIPTS / "train_net.py", "--config-file", config, *pairs)
    assert "total_loss" in output
    assert (tmp_path / "trained" / "model_final.pth").is_file()


@needs_scripts
def test_analyze_model_counts_parameters_and_flops(dataset, config_file):
    tasks = ["--tasks", "parameter", "structure", "flop", "--num-inputs", "1"]
    output = run_launch(*dataset, SCRIPTS / "analyze_model.py", *tasks, "--config-file", config_file)
    assert "pyramid.network.trunk" in output
    assert "SharpMaskRefinement" in output
    assert "Total GFlops" in output


@needs_scripts
def test_lazyconfig_train_net_trains_and_evaluates(dataset, tmp_path):
    overrides = [
        "train.device=cpu",
        "train.max_iter=2",
        "train.init_checkpoint=",
        f"train.output_dir={tmp_path / 'lazy'}",
        "train.eval_period=2",
        "dataloader.train.dataset.names=launched",
        "dataloader.test.dataset.names=launched",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "dataloader.train.total_batch_size=2",
        "mapper.patches_per_image=2",
        "model.pyramid.network.trunk.depth=18",
        "model.pyramid.network.head.in_channels=256",
        "model.pyramid.network.head.embed_dim=16",
        "model.pyramid.network.mask_branch.features.res4.channels=256",
        "model.pyramid.network.mask_branch.features.res3.channels=128",
        "model.pyramid.network.mask_branch.features.res2.channels=64",
        "model.pyramid.exponents=[-1.0,0.0]",
        "model.pyramid.num_proposals=10",
    ]
    lazy = ROOT / "configs" / "lazy" / "sharpmask_R_50.py"
    output = run_launch(*dataset, SCRIPTS / "lazyconfig_train_net.py", "--config-file", lazy, *overrides)
    assert (tmp_path / "lazy" / "model_final.pth").is_file()
    assert "AR@1000" in output
    metrics = json.loads((tmp_path / "lazy" / "metrics.json").read_text().splitlines()[0])
    assert metrics["total_loss"] > 0
    # The refinement path alone is trained, and one loss has no name of its own.
    assert "loss_score" not in metrics


SPAWNING = """
import sys
import multiprocessing
from pathlib import Path
from beside import WORD
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY

def work(path):
    found = [get_cfg().MODEL.SHARPMASK.WINDOW_SIZE, "SharpMaskProposalNetwork" in META_ARCH_REGISTRY]
    Path(path).write_text(str([*found, "launched" in DatasetCatalog.list(), WORD, sys.argv[1:]]))

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[2],))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def test_spawned_processes_know_the_plugin_too(dataset, tmp_path):
    """As Detectron2's launch starts one for each GPU."""
    (tmp_path / "script.py").write_text(SPAWNING)
    (tmp_path / "beside.py").write_text("WORD = 'beside'")
    found = tmp_path / "found.txt"
    run_launch(*dataset, tmp_path / "script.py", "--flag", found)
    assert found.read_text() == str([160, True, True, "beside", ["--flag", str(found)]])


def test_missing_script_is_named():
    with pytest.raises(FileNotFoundError, match=r"no script nowhere\.py"):
        launch.run("nowhere.py", [])


def test_missing_files_are_named_on_the_command_line(monkeypatch, capsys, dataset):
    monkeypatch.setattr(sys, "argv", ["launch", "--dataset", "name", "nowhere.json", ".", __file__])
    with pytest.raises(SystemExit):
        launch._main()
    assert "there is no nowhere.json" in capsys.readouterr().err
