"""An interrupted training resumes exactly, from complete checkpoints with finite weights."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import itertools
import logging
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import hooks
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from drawing import to_small_detector
from sharpmask_d2.checkpoint import SafeCheckpointer, StrictCheckpointer
from sharpmask_d2.data import build_resumable_train_loader, register_datasets
from sharpmask_d2.engine.trainer import Trainer
from sharpmask_d2.io.outputs import OutputError
from torch import nn

NAME = "resumed_on"
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


class SmallPyramid(Backbone):
    """A backbone with four features of eight channels."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(8 if i else 3, 8, 5, stride=2 if i else 4, padding=2) for i in range(len(STRIDES))
        )

    @property
    def size_divisibility(self):
        return 32

    def output_shape(self):
        return {name: ShapeSpec(channels=8, stride=stride) for name, stride in STRIDES.items()}

    def forward(self, x):
        outputs = {}
        for name, conv in zip(STRIDES, self.convs):
            x = outputs[name] = conv(x).relu()
        return outputs


@BACKBONE_REGISTRY.register()
def build_small_pyramid(cfg, input_shape):
    return SmallPyramid()


@pytest.fixture
def cfg(tiny_cfg, make_dataset, tmp_path):
    """Config of a short training of SharpMaskFPN on a drawn dataset."""
    data = make_dataset(tmp_path / "data", num_images=5)
    register_datasets([(NAME, str(data.annotations), str(data.image_root))])
    cfg = tiny_cfg
    cfg.MODEL.META_ARCHITECTURE = "SegmentProposalNetwork"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMaskFPN"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = False
    cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = list(STRIDES)
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 2
    cfg.MODEL.SHARPMASK.FPN.MASK_WINDOWS_PER_IMAGE = 8
    cfg.MODEL.SHARPMASK.FPN.SCORE_CHANNELS = 8
    cfg.MODEL.BACKBONE.NAME = "build_small_pyramid"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [50.0] * 3
    cfg.INPUT.MIN_SIZE_TRAIN = (96, 128)
    cfg.INPUT.SCALE_JITTER.SIDE = 128
    cfg.INPUT.SCALE_JITTER.CROP = 96
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.SOLVER.BASE_LR = 0.001
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.SOLVER.STEPS = (3,)
    cfg.SOLVER.MAX_ITER = 5
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    yield cfg
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


class _Interrupt(hooks.HookBase):
    """Interrupts a training after an iteration, as Ctrl-C does."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


def train(cfg, *, folder: str, resume: bool = False, hook=None) -> None:
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/{folder}"
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    # A resumed process has another state of the random number generators.
    seed = 100 + resume
    torch.manual_seed(cfg.SEED)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    if hook:
        trainer.register_hooks([hook])
    trainer.train()


def read(cfg, folder: str, name: str = "model_final") -> dict:
    return torch.load(Path(cfg.OUTPUT_DIR, folder, f"{name}.pth"), weights_only=False)


def differences(first, second, name: str = "") -> list:
    """Names of the entries that are not bitwise equal in two checkpoints."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return [x for key in first for x in differences(first[key], second[key], f"{name}.{key}")]
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        return [x for i, pair in enumerate(zip(first, second)) for x in differences(*pair, f"{name}.{i}")]
    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    return [] if same else [name]


def _stock(cfg):
    """Detectron2's own mapper, in batches of equal aspect ratio."""


def _jitter(cfg):
    cfg.INPUT.SCALE_JITTER.ENABLED = True
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False


def _adamw(cfg):
    _jitter(cfg)
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.AMP.ENABLED = True


def _detector(cfg):
    """A stock detector whose proposal generator is trained."""
    to_small_detector(cfg, roi_heads="StandardROIHeads", num_classes=2)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMaskFPN"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 4


@pytest.mark.parametrize("setup", [_stock, _adamw, _detector])
def test_a_resumed_training_equals_an_uninterrupted_one(cfg, setup):
    setup(cfg)
    train(cfg, folder="whole")
    with pytest.raises(KeyboardInterrupt):
        train(cfg, folder="resumed", hook=_Interrupt(2))
    assert Path(cfg.OUTPUT_DIR, "resumed", "last_checkpoint").read_text() == "model_0000001.pth"
    train(cfg, folder="resumed", resume=True)
    whole, resumed = read(cfg, "whole"), read(cfg, "resumed")
    assert whole["trainer"]["_trainer"]["optimizer"]["state"]
    assert differences(whole, resumed) == []
    # Most parameters are trained.
    start = read(cfg, "whole", "model_0000001")["model"]
    assert len(differences(whole["model"], start)) > len(start) / 2


def take(loader, count: int) -> list:
    """Pairs of id and pixels of the images in the first batches of a loader."""
    batches = itertools.islice(iter(loader), count)
    return [[(image["image_id"], image["image"]) for image in batch] for batch in batches]


@pytest.mark.parametrize(
    ("sampler", "grouping"),
    [
        ("TrainingSampler", False),
        ("TrainingSampler", True),
        ("RepeatFactorTrainingSampler", True),
        ("RandomSubsetTrainingSampler", False),
    ],
)
def test_batches_depend_on_their_number_only(cfg, sampler, grouping):
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.8
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    dicts = DatasetCatalog.get(NAME)
    for number, record in enumerate(dicts):
        # The sampler groups images by the sizes in the annotations.
        record["width"], record["height"] = (160, 120) if number % 2 else (120, 160)
    wide = {record["image_id"] for number, record in enumerate(dicts) if number % 2}
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: dicts)

    def mapper(record: dict) -> dict:
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
        return {"image_id": record["image_id"], "image": torch.tensor(drawn)}

    def build():
        return build_resumable_train_loader(cfg, mapper=mapper)

    whole = take(build(), 8)
    for num_workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = num_workers
        np.random.seed(num_workers)  # noqa: NPY002
        torch.manual_seed(num_workers)
        loader = build()
        iterator = iter(loader)
        # A trainer creates the iterator before it resumes.
        loader.start = 3
        before = torch.get_rng_state()
        assert differences(take(iterator, 5), whole[3:]) == []
        # The random numbers of the trainer do not depend on the number of worker processes.
        assert torch.equal(torch.get_rng_state(), before)
    drawn = torch.stack([pixels for batch in whole for _, pixels in batch])
    assert len(drawn.unique()) == drawn.numel()
    if grouping:
        assert all(len({image_id in wide for image_id, _ in batch}) == 1 for batch in whole)
    cfg.SEED = 2
    assert differences(take(build(), 8), whole)


def test_every_epoch_contains_every_image_once(cfg):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    # Ten batches of two images are four epochs of five images.
    ids = [image_id for batch in take(Trainer.build_train_loader(cfg), 10) for image_id, _ in batch]
    for epoch in range(4):
        assert sorted(ids[5 * epoch : 5 * epoch + 5]) == [1, 2, 3, 4, 5]


def test_processes_have_different_images(cfg, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda number: [number, None])
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        seen.append(take(Trainer.build_train_loader(cfg), 5))
    assert [len(batch) for batch in seen[0] + seen[1]] == [1] * 10
    # The ten images of two epochs alternate between the processes.
    ids = [image_id for pair in zip(*seen) for batch in pair for image_id, _ in batch]
    assert sorted(ids[:5]) == sorted(ids[5:]) == [1, 2, 3, 4, 5]


class _RecordDraws(hooks.HookBase):
    """Records random numbers of torch, numpy and Python at every iteration."""

    def __init__(self):
        self.drawn = {}

    def before_step(self):
        numbers = torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002
        self.drawn[self.trainer.iter] = numbers


def test_random_numbers_differ_between_steps_processes_and_seeds(cfg, monkeypatch):
    cfg.SOLVER.MAX_ITER = 3
    cfg.SOLVER.STEPS = ()
    drawn = {}
    for seed, rank in itertools.product((1, 2), (0, 1)):
        cfg.SEED = seed
        hook = _RecordDraws()
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: True)
        train(cfg, folder=f"{seed}_{rank}", hook=hook)
        drawn[seed, rank] = hook.drawn
    for kind in range(3):
        numbers = [step[kind] for steps in drawn.values() for step in steps.values()]
        assert len(set(numbers)) == len(numbers) == 12
    hook = _RecordDraws()
    train(cfg, folder="again", hook=hook)
    assert hook.drawn == drawn[2, 1]


# ------------------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def checkpointer(tmp_path, monkeypatch, caplog):
    """A checkpointer of a small model, with checkpoints of the iterations 1 and 3."""
    checkpointer = SafeCheckpointer(nn.Linear(2, 2), str(tmp_path))
    # Other tests configure loggers, which can hide records from pytest.
    logging.disable(logging.NOTSET)
    monkeypatch.setattr(checkpointer.logger, "disabled", False)
    monkeypatch.setattr(checkpointer.logger, "propagate", False)
    monkeypatch.setattr(checkpointer.logger, "handlers", [caplog.handler])
    caplog.set_level(logging.WARNING, logger=checkpointer.logger.name)
    for iteration in (1, 3):
        checkpointer.model.weight.data.fill_(iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def test_the_last_complete_checkpoint_is_loaded(checkpointer, tmp_path, caplog):
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000003.pth")
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000001.pth",
        "model_0000003.pth",
    ]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("last", ["", "model_0000003.pth", "model_0000009.pth"])
def test_the_latest_complete_checkpoint_is_loaded_if_the_last_is_broken(checkpointer, tmp_path, caplog, last):
    """A killed process left `last_checkpoint` empty, or it names a truncated or missing file."""
    (tmp_path / "last_checkpoint").write_text(last)
    path = tmp_path / "model_0000003.pth"
    path.write_bytes(path.read_bytes()[:-100])
    # A newer file that is not a checkpoint of a training.
    torch.save({"model": {}}, tmp_path / "packed.pth")
    os.utime(tmp_path / "model_0000001.pth", (1, 1))
    assert checkpointer.has_checkpoint()
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    assert (checkpointer.model.weight == 1).all()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert f"names {last or 'nothing'}, which cannot be read" in warnings[0]
    assert "model_0000001.pth, the latest whole checkpoint" in warnings[0]


def test_without_a_complete_checkpoint_training_starts_anew(checkpointer, tmp_path, caplog):
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-100])
    assert not checkpointer.has_checkpoint()
    assert "there is no whole checkpoint" in caplog.text


def test_a_trainer_resumes_from_the_latest_complete_checkpoint(cfg):
    _jitter(cfg)
    train(cfg, folder="whole")
    with pytest.raises(KeyboardInterrupt):
        train(cfg, folder="killed", hook=_Interrupt(4))
    folder = Path(cfg.OUTPUT_DIR, "killed")
    cut = folder / "model_0000003.pth"
    cut.write_bytes(cut.read_bytes()[:1000])
    (folder / "last_checkpoint").write_text("")
    (folder / "model_final.pth").unlink()
    train(cfg, folder="killed", resume=True)
    assert differences(read(cfg, "whole"), read(cfg, "killed")) == []


def test_a_failed_write_leaves_the_old_checkpoint(checkpointer, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def cut(data, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(OutputError, match="No space"):
        checkpointer.save("model_0000003", iteration=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -------------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("learning_rate", [1e12, 1e38])
def test_a_diverged_training_stops_and_keeps_finite_checkpoints(cfg, learning_rate):
    _jitter(cfg)
    train(cfg, folder="good", hook=None)
    cfg.SOLVER.BASE_LR = learning_rate
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.SOLVER.MAX_ITER = 20
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/good/model_final.pth"
    with pytest.raises(FloatingPointError) as raised:
        train(cfg, folder="diverged")
    message = str(raised.value)
    assert "iteration" in message
    assert "loss_sharpmask_score" in message or "model_0" in message
    folder = Path(cfg.OUTPUT_DIR, "diverged")
    assert not (folder / "model_final.pth").exists()
    for path in folder.glob("*.pth"):
        assert all(x.isfinite().all() for x in torch.load(path)["model"].values() if x.is_floating_point()), path
    last = folder / "last_checkpoint"
    assert not last.exists() or (folder / last.read_text()).is_file()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_scores_that_are_not_finite_end_the_training(cfg, bad):
    """Windows outside the image also have infinite scores, but do not contribute to the loss."""
    _jitter(cfg)

    class Spoil(hooks.HookBase):
        def before_step(self):
            if self.trainer.iter == 1:
                scores = self.trainer.model.proposal_generator.scores
                for parameter in scores.parameters():
                    nn.init.constant_(parameter, bad)

    with pytest.raises(FloatingPointError, match=r"iteration=1[\s\S]*'loss_sharpmask_score': (np.float64\()?(nan|inf)"):
        train(cfg, folder="spoilt", hook=Spoil())


def test_weights_that_are_not_finite_are_not_written(checkpointer, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    checkpointer.model.bias.data[1] = float("inf")
    with pytest.raises(
        FloatingPointError, match=r"at iteration 5: bias: not finite.*last checkpoint is .*model_0000003\.pth"
    ):
        checkpointer.save("model_0000005", iteration=5)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", [SafeCheckpointer, StrictCheckpointer])
@pytest.mark.parametrize("ending", ["pth", "pkl"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_loaded(tmp_path, kind, ending, bad):
    state = nn.Linear(2, 2).state_dict()
    state["bias"][1] = bad
    path = tmp_path / f"bad.{ending}"
    if ending == "pth":
        torch.save({"model": state}, path)
    else:
        arrays = {name: value.numpy() for name, value in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    with pytest.raises(ValueError, match=rf"bad\.{ending}: bias: not finite"):
        kind(nn.Linear(2, 2)).load(str(path))


def test_a_training_does_not_start_from_weights_that_are_not_finite(cfg, tmp_path):
    _jitter(cfg)
    state = Trainer.build_model(cfg).state_dict()
    name = "backbone.convs.0.weight"
    state[name][0, 0] = float("nan")
    cfg.MODEL.WEIGHTS = str(tmp_path / "bad.pth")
    torch.save({"model": state}, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match=rf"bad\.pth: {name}: not finite"):
        train(cfg, folder="none")
