"""Training in Detectron2's manner: stages, resuming, evaluation, optimizers."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import hooks
from detectron2.modeling import build_model
from sharpmask_d2.data import register_datasets
from sharpmask_d2.engine.trainer import Trainer, build_optimizer
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
NAME = "trained_on"


@pytest.fixture
def drawn(make_dataset, tmp_path):
    """A drawn dataset, registered as NAME while the test runs: (name, JSON, images)."""
    data = make_dataset(tmp_path / "data", num_images=3)
    dataset = (NAME, str(data.annotations), str(data.image_root))
    register_datasets([dataset])
    yield dataset
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def cfg(tiny_cfg, drawn):
    """A config that trains on it for a moment and evaluates nothing."""
    tiny_cfg.DATASETS.TRAIN = (NAME,)
    tiny_cfg.SOLVER.BASE_LR = 0.001
    tiny_cfg.SOLVER.WARMUP_ITERS = 0
    tiny_cfg.SOLVER.STEPS = ()
    tiny_cfg.SOLVER.MAX_ITER = 3
    return tiny_cfg


class Recorder(hooks.HookBase):
    """Keeps the losses of every iteration, unsmoothed: iteration -> {name: value}."""

    def __init__(self):
        self.losses = {}

    def after_step(self):
        storage = self.trainer.storage
        names = [name for name in storage.histories() if "loss" in name]
        self.losses[self.trainer.iter] = {name: storage.history(name).latest() for name in names}


def train(cfg, *, resume: bool = False, hook=None) -> dict:
    """Train as tools/train_net.py does, in this process; losses by iteration."""
    recorder = Recorder()
    # default_setup does this in scripts.
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    torch.manual_seed(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks([recorder, *([hook] if hook else [])])
    trainer.train()
    return recorder.losses


def checkpoint(cfg, name: str = "model_final") -> dict:
    return torch.load(Path(cfg.OUTPUT_DIR, f"{name}.pth"), weights_only=False)


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def command(cfg, drawn, *arguments) -> list:
    """The command that runs tools/train_net.py with a config, which it writes."""
    path = Path(cfg.OUTPUT_DIR).parent / "config.yaml"
    path.write_text(cfg.dump())
    script = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "train_net.py"), "--config-file", str(path)]
    return [*script, "--dataset", *drawn, *arguments]


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_second_stage_trains_the_refinement_alone(cfg, norm):
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.TRUNK.NORM = norm
    sharpmask.REFINEMENT.NAME = "none"
    cfg.OUTPUT_DIR += "/stage1"
    losses = train(cfg)
    assert losses[2].keys() == {"total_loss", "loss_mask", "loss_score"}
    before = checkpoint(cfg)["model"]

    sharpmask.REFINEMENT.NAME = "sharpmask"
    sharpmask.FREEZE_FEEDFORWARD = True
    sharpmask.SAMPLING.MASK_FRACTION = 1.0
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
    cfg.OUTPUT_DIR += "/stage2"
    losses = train(cfg)
    # Detectron2 names a loss only where there are several.
    assert losses[2].keys() == {"total_loss"}
    after = checkpoint(cfg)["model"]

    def frozen(state):
        return {name: value for name, value in state.items() if ".mask_branch." not in name}

    assert any("running_mean" in name for name in frozen(before))
    assert_same(frozen(before), frozen(after))
    torch.manual_seed(cfg.SEED)
    start = build_model(cfg).state_dict()
    refinement = [name for name in after if ".mask_branch." in name]
    assert refinement
    assert all(not torch.equal(after[name], start[name]) for name in refinement if name.endswith("weight"))


def test_first_stage_changes_trunk_head_and_statistics(cfg):
    cfg.MODEL.SHARPMASK.REFINEMENT.NAME = "none"
    cfg.MODEL.SHARPMASK.TRUNK.NORM = "BN"
    torch.manual_seed(cfg.SEED)
    start = build_model(cfg).state_dict()
    train(cfg)
    after = checkpoint(cfg)["model"]
    unchanged = [name for name, value in start.items() if torch.equal(after[name], value)]
    assert not unchanged


@pytest.mark.slow
def test_resumed_after_kill_goes_on_as_if_nothing_had_happened(cfg, drawn):
    cfg.SOLVER.MAX_ITER = 12
    cfg.SOLVER.CHECKPOINT_PERIOD = 4
    folder = cfg.OUTPUT_DIR
    cfg.OUTPUT_DIR = f"{folder}/whole"
    losses = train(cfg)
    whole = checkpoint(cfg)

    cfg.OUTPUT_DIR = f"{folder}/killed"
    # The evaluation after iteration 8 holds the process long enough to be killed in it.
    waiting = ["TEST.EVAL_PERIOD", "8", "DATASETS.TEST", f"('{NAME}',)", "MODEL.SHARPMASK.GRID_STRIDE", "1"]
    process = subprocess.Popen(
        command(cfg, drawn, *waiting), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    last = Path(cfg.OUTPUT_DIR, "last_checkpoint")
    while process.poll() is None and not (last.is_file() and last.read_text() == "model_0000007.pth"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert last.read_text() == "model_0000007.pth"
    assert not Path(cfg.OUTPUT_DIR, "model_final.pth").exists()

    resumed_losses = train(cfg, resume=True)
    assert resumed_losses == {iteration: losses[iteration] for iteration in (8, 9, 10, 11)}
    resumed = checkpoint(cfg)
    assert_same(resumed["model"], whole["model"])
    momenta, whole_momenta = (
        {i: state["momentum_buffer"] for i, state in c["trainer"]["_trainer"]["optimizer"]["state"].items()}
        for c in (resumed, whole)
    )
    assert_same(momenta, whole_momenta)


def run_eval_only(cfg, drawn) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(cfg, drawn, "--eval-only"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_eval_only_prints_patch_metrics_and_average_recall(cfg, drawn, tmp_path):
    cfg.DATASETS.TEST = (NAME,)
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, tmp_path / "random.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "random.pth")
    done = run_eval_only(cfg, drawn)
    assert done.returncode == 0, done.stdout[-4000:]
    for text in ("Task: patches", "mean IoU", "score accuracy", "Task: segm", "Task: bbox", "AR@1000", "AUC"):
        assert text in done.stdout
    assert not Path(cfg.OUTPUT_DIR, "model_final.pth").exists()


def test_eval_only_refuses_the_checkpoint_of_another_model(cfg, drawn, tmp_path):
    torch.save({"model": {"somebody.elses": torch.zeros(1)}}, tmp_path / "other.pth")
    cfg.DATASETS.TEST = (NAME,)
    cfg.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    done = run_eval_only(cfg, drawn)
    assert done.returncode != 0
    assert "other.pth does not fit this model" in done.stdout


def test_eval_only_refuses_to_evaluate_random_weights(cfg, drawn):
    cfg.DATASETS.TEST = (NAME,)
    cfg.MODEL.WEIGHTS = ""
    done = run_eval_only(cfg, drawn)
    assert done.returncode != 0
    assert "there are no weights to evaluate; give a checkpoint, MODEL.WEIGHTS" in done.stdout


class _Poison(hooks.HookBase):
    """Makes the loss NaN from an iteration on."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.trainer.model.loss_weights["loss_mask"] = float("nan")


def test_nan_ends_the_training_and_leaves_the_checkpoint(cfg):
    cfg.SOLVER.MAX_ITER = 6
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    with pytest.raises(FloatingPointError, match="iteration=3"):
        train(cfg, hook=_Poison(3))
    assert Path(cfg.OUTPUT_DIR, "last_checkpoint").read_text() == "model_0000001.pth"
    assert not Path(cfg.OUTPUT_DIR, "model_final.pth").exists()
    assert all(value.isfinite().all() for value in checkpoint(cfg, "model_0000001")["model"].values())


@pytest.mark.parametrize("key", ["SOLVER.MIXED_PRECISION", "SOLVER.AMP.ENABLED"])
def test_mixed_precision_on_a_cpu(cfg, key):
    cfg.merge_from_list([key, True])
    cfg.SOLVER.MAX_ITER = 1
    seen = []

    class Watch(hooks.HookBase):
        def before_train(self):
            head = self.trainer.model.pyramid.network.head
            head.reduce.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    losses = train(cfg, hook=Watch())
    assert seen == [torch.bfloat16]
    assert all(torch.isfinite(torch.tensor(value)) for value in losses[0].values())
    # Weights stay in full precision.
    assert {value.dtype for value in checkpoint(cfg)["model"].values() if value.is_floating_point()} == {torch.float32}


def test_depthwise_convolutions_stay_in_full_precision_in_copies_of_the_model_too(cfg):
    """A copy, as averages of weights are kept in, runs its own weights."""
    cfg.SOLVER.AMP.ENABLED = True
    cfg.SOLVER.MAX_ITER = 1
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.TRUNK.NAME = "build_timm_trunk"
    sharpmask.IN_FEATURE = "s16"
    sharpmask.REFINEMENT.NAME = "none"
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = Trainer(cfg)

    def convolutions(model, depthwise: bool) -> list:
        return [m for m in model.modules() if isinstance(m, nn.Conv2d) and depthwise == (m.groups > 1)]

    copied = copy.deepcopy(trainer.model)
    for convolution in convolutions(copied, True):
        nn.init.zeros_(convolution.weight)
        assert not convolution(torch.ones(1, convolution.in_channels, 8, 8)).any()
    dtypes = {True: set(), False: set()}
    for depthwise, seen in dtypes.items():
        for convolution in convolutions(trainer.model.pyramid.network.trunk, depthwise):
            convolution.register_forward_hook(lambda module, inputs, output, seen=seen: seen.add(output.dtype))
    trainer.train()
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


def test_trainer_evaluates_what_the_config_asks_for(cfg):
    cfg.DATASETS.TEST = (NAME,)
    model = Trainer.build_model(cfg)
    assert Trainer.test(cfg, model).keys() == {"patches", "segm", "bbox"}
    cfg.MODEL.SHARPMASK.TEST.FULL_IMAGES = False
    assert Trainer.test(cfg, model).keys() == {"patches"}
    cfg.MODEL.SHARPMASK.TEST.PATCHES_PER_IMAGE = 0
    assert Trainer.test(cfg, model) == {}


@pytest.mark.parametrize(("name", "kind"), [("SGD", torch.optim.SGD), ("ADAMW", torch.optim.AdamW)])
def test_trunk_has_a_learning_rate_of_its_own(tiny_cfg, name, kind):
    tiny_cfg.SOLVER.OPTIMIZER = name
    tiny_cfg.SOLVER.BASE_LR = 0.1
    tiny_cfg.SOLVER.TRUNK_MULTIPLIER = 0.5
    tiny_cfg.SOLVER.WEIGHT_DECAY = 0.01
    tiny_cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    tiny_cfg.SOLVER.MOMENTUM = 0.8
    tiny_cfg.MODEL.SHARPMASK.TRUNK.NORM = "BN"
    model = build_model(tiny_cfg)
    optimizer = build_optimizer(tiny_cfg, model)
    assert isinstance(optimizer, kind)
    if name == "SGD":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
    settings = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert settings.keys() == set(model.parameters())
    for parameter_name, parameter in model.named_parameters():
        lr = 0.05 if ".trunk." in parameter_name else 0.1
        decay = 0.0 if ".norm." in parameter_name else 0.01
        assert settings[parameter] == (lr, decay), parameter_name


def test_bias_has_settings_of_its_own(tiny_cfg):
    tiny_cfg.SOLVER.BASE_LR = 0.1
    tiny_cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    tiny_cfg.SOLVER.WEIGHT_DECAY = 0.01
    tiny_cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0
    model = build_model(tiny_cfg)
    groups = build_optimizer(tiny_cfg, model).param_groups
    settings = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    reduce = model.pyramid.network.head.reduce
    assert settings[reduce.weight] == (0.1, 0.01)
    assert settings[reduce.bias] == (0.2, 0.0)


def test_optimizer_leaves_frozen_parameters_out(tiny_cfg):
    tiny_cfg.MODEL.SHARPMASK.FREEZE_FEEDFORWARD = True
    model = build_model(tiny_cfg)
    params = [p for group in build_optimizer(tiny_cfg, model).param_groups for p in group["params"]]
    assert {id(p) for p in params} == {id(p) for p in model.pyramid.network.mask_branch.parameters()}


def test_optimizer_has_to_be_known(tiny_cfg):
    tiny_cfg.SOLVER.OPTIMIZER = "LION"
    with pytest.raises(ValueError, match=r"SOLVER\.OPTIMIZER is 'LION'"):
        build_optimizer(tiny_cfg, build_model(tiny_cfg))
