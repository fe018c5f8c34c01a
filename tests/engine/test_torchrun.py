"""torchrun starts the processes of a training on CPUs: they train one model."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import json
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from drawing import ROOT
from processes import in_two_processes, torchrun, torchrun_environment
from sharpmask_d2 import launch
from sharpmask_d2.cli import train
from sharpmask_d2.cli.command import run
from sharpmask_d2.engine import Trainer
from sharpmask_d2.errors import UserError


@pytest.fixture
def options(tiny_cfg, make_dataset, tmp_path) -> list:
    """Command line of a training of two steps."""
    data = make_dataset(tmp_path / "data", num_images=2)
    tiny_cfg.DATASETS.TRAIN = ("drawn",)
    tiny_cfg.SOLVER.MAX_ITER = 2
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return ["--config-file", str(path), "--dataset", "drawn", str(data.annotations), str(data.image_root)]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_one_model(options, tiny_cfg):
    done = torchrun(ROOT / "tools" / "train_net.py", *options, "DATASETS.TEST", "('drawn',)")
    assert done.returncode == 0, done.stdout[-4000:]
    folder = Path(tiny_cfg.OUTPUT_DIR)
    assert (folder / "model_final.pth").is_file()
    # Detectron2's logger of the second process has a file of its own.
    assert "Rank of current process: 1. World size: 2" in (folder / "log.txt.rank1").read_text()
    metrics = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert sum("total_loss" in record for record in metrics) == 1
    assert done.stdout.count("Saving checkpoint to") == 1
    assert "AR@1000" in done.stdout


@pytest.fixture
def second_process(monkeypatch):
    """The environment of the second of two processes that torchrun has started."""
    for name, value in torchrun_environment(1, 29500).items():
        monkeypatch.setenv(name, value)


def test_processes_that_are_not_connected_train_nothing(second_process, tiny_cfg):
    """As in a script that knows nothing of torchrun: each process would train the whole model, into one folder."""
    with pytest.raises(UserError, match="torchrun has started 2 processes, which are not connected"):
        Trainer(tiny_cfg)
    assert not Path(tiny_cfg.OUTPUT_DIR).exists()


def test_torchrun_and_detectron2_do_not_both_start_processes(second_process, options, capsys):
    with pytest.raises(SystemExit):
        run(lambda: train.main([*options, "--num-machines", "2"]))
    assert capsys.readouterr().err == "rank 1: torchrun starts the processes: leave out --num-gpus and --num-machines\n"


def _sum_of_ranks(rank: int, script: str) -> tuple:
    launch.run(script, [])
    number = torch.tensor([rank + 1.0])
    torch.distributed.all_reduce(number)
    return number.item(), comm.get_local_rank(), comm.get_local_size()


def test_the_launcher_connects_the_processes(tmp_path):
    (tmp_path / "script.py").write_text("")
    assert in_two_processes(_sum_of_ranks, str(tmp_path / "script.py"), folder=tmp_path) == [(3, 0, 2), (3, 1, 2)]


DYING = """
import os
import signal
import sys
from sharpmask_d2.cli import train
from sharpmask_d2.cli.command import run

class Dying(train.Trainer):
    def run_step(self):
        if self.iter == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        super().run_step()

train.Trainer = Dying
run(lambda: train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_training_which_one_process_continues(options, tiny_cfg, tmp_path):
    (tmp_path / "script.py").write_text(DYING)
    changes = ["SOLVER.MAX_ITER", "5", "SOLVER.CHECKPOINT_PERIOD", "2"]
    done = torchrun(tmp_path / "script.py", *options, *changes)
    assert done.returncode != 0
    # torchrun may end the other process before it notices that its connection is lost.
    assert done.stdout.count("rank 0: another process of the training has ended") <= 1
    # torchrun names the process that died first.
    assert "Signal 9 (SIGKILL)" in done.stdout.partition("Root Cause")[2]
    folder = Path(tiny_cfg.OUTPUT_DIR)
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    assert train.main([*options, "--resume", *changes]) == 0
    final = torch.load(folder / "model_final.pth", weights_only=False)
    assert final["iteration"] == 4


def _fail_in_one_process(rank: int, options: list) -> str:
    class Failing(Trainer):
        def run_step(self):
            # The last step, after which Detectron2 evaluates.
            if self.iter == 1 and rank == 1:
                raise OSError("the disk is gone")
            super().run_step()

    train.Trainer = Failing
    with pytest.raises((OSError, UserError)) as raised:
        train.main(options)
    return str(raised.value)


def test_an_error_in_one_process_ends_the_others(options, tmp_path):
    first, second = in_two_processes(_fail_in_one_process, options, folder=tmp_path)
    assert first.startswith("another process of the training has ended: its own error says why")
    assert second == "the disk is gone"
