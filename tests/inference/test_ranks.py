"""Processes of torchrun share a run: each works on its shard, and the last one merges them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from drawing import write_with_weights
from sharpmask_d2.errors import UserError
from sharpmask_d2.inference import propose as compute
from sharpmask_d2.inference.predictor import ProposalPredictor
from sharpmask_d2.io.shards import Shard
from stub_predictor import StubPredictor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tiny_cfg, photographs, tmp_path, monkeypatch):
    """Computes proposals as a rank of several processes, or as the only process."""
    config = write_with_weights(tiny_cfg, tmp_path)
    monkeypatch.setattr(compute, "ProposalPredictor", StubPredictor)

    def compute_as(output, *, rank=None, count=2, **options):
        with monkeypatch.context() as patch:
            if rank is not None:
                for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
                    patch.setenv(name, str(value))
            opts = ["MODEL.DEVICE", "cpu"]
            return compute.compute_proposals(
                input=[str(photographs)], output=str(output), config_file=str(config), opts=opts, **options
            )

    compute_as.config = config
    return compute_as


def _files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))


def test_the_rank_that_ends_last_merges(run, tmp_path):
    assert run(tmp_path / "plain.json", pkl=str(tmp_path / "plain.pkl"), visualize=str(tmp_path / "plain")) == 0
    output, pkl, pictures = tmp_path / "out.json", tmp_path / "ranks.pkl", tmp_path / "pictures"
    for rank in (1, 0):
        assert not output.exists()
        assert run(output, rank=rank, pkl=str(pkl), visualize=str(pictures)) == 0
    assert output.read_bytes() == (tmp_path / "plain.json").read_bytes()
    assert pkl.read_bytes() == (tmp_path / "plain.pkl").read_bytes()
    for path in (tmp_path / "plain").iterdir():
        assert (pictures / path.name).read_bytes() == path.read_bytes()
    assert _files(tmp_path) == ["out.json"]


def test_work_of_the_others_is_kept_when_a_rank_dies(run, tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    assert run(output, rank=0) == 0
    with monkeypatch.context() as patch:
        patch.setattr(compute, "ProposalPredictor", None)
        with pytest.raises(TypeError):
            run(output, rank=1)
    assert not output.exists()
    StubPredictor.seen = []
    assert [run(output, rank=rank) for rank in (0, 1)] == [0, 0]
    # The shard of rank 1 only.
    assert len(StubPredictor.seen) == 1
    assert {result["image_id"] for result in json.loads(output.read_text())} == {1, 2, 3}


def test_an_image_that_fails_does_not_stop_the_other_ranks(run, photographs, tmp_path, capsys):
    whole = (photographs / "1.png").read_bytes()
    (photographs / "1.png").write_bytes(whole[:40])
    output = tmp_path / "out.json"
    # The process that merges has the exit status of the run.
    assert [run(output, rank=rank) for rank in (1, 0)] == [0, 1]
    assert "image 2, 1.png, of shard 2/2, could not be processed" in capsys.readouterr().err
    assert {result["image_id"] for result in json.loads(output.read_text())} == {1, 3}
    (photographs / "1.png").write_bytes(whole)
    assert [run(output, rank=rank) for rank in (1, 0)] == [0, 0]
    assert _files(tmp_path) == ["out.json"]


def test_ranks_have_no_shards(run, tmp_path):
    with pytest.raises(UserError, match="torchrun cannot divide a shard"):
        run(tmp_path / "out.json", rank=0, shard=Shard(1, 2))


def test_torchrun_gives_the_file_of_a_plain_run(run, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "ProposalPredictor", ProposalPredictor)
    assert run(tmp_path / "plain.json") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tools" / "compute_proposals.py"), "--input", str(photographs), "--quiet"]
    command += ["--output", str(tmp_path / "out.json"), "--config-file", str(run.config), "MODEL.DEVICE", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, timeout=300)
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "plain.json").read_bytes()
    assert _files(tmp_path) == ["out.json"]
