"""Every file in configs/ builds its model, and the LazyConfig of the same name builds an equal one."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from sharpmask_d2 import add_sharpmask_config
from sharpmask_d2.engine.trainer import build_optimizer
from sharpmask_d2.modeling.image_pyramid.heads import CoarseMask
from sharpmask_d2.modeling.image_pyramid.refinement import MultiscaleRefinement, SharpMaskRefinement, SkipRefinement

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Name -> mask branch, window, number of scales.
MODELS = {
    "deepmask_R_50": (CoarseMask, 160, 7),
    "deepmask_lite0": (CoarseMask, 160, 7),
    "deepmask_paper_R_50": (CoarseMask, 160, 7),
    "deepmask_paper_VGG_A": (CoarseMask, 224, 7),
    "multiscale_R_50": (MultiscaleRefinement, 160, 7),
    "sharpmask_R_50": (SharpMaskRefinement, 160, 7),
    "sharpmask_lite0": (SharpMaskRefinement, 160, 7),
    "sharpmask_paper_R_50": (SharpMaskRefinement, 160, 7),
    "sharpmask_zoom2_R_50": (SharpMaskRefinement, 160, 9),
    "sharpmask_zoom_R_50": (SharpMaskRefinement, 160, 8),
    "skip_R_50": (SkipRefinement, 160, 7),
}
# Name -> whether nothing of the trunk is trained.
PYRAMID_MODELS = {"sharpmask_bifpn_lite0": True, "sharpmask_bifpn_lite0_decoder": True, "sharpmask_fpn_R_50": False}
LAZY = sorted(path.stem for path in (CONFIGS / "lazy").glob("*.py"))


def load_yaml(name: str):
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    if "lite0" in name:
        # The package with the weights may be missing.
        cfg.MODEL.SHARPMASK.TRUNK.PRETRAINED = cfg.MODEL.TIMM.PRETRAINED = ""
    return cfg


def load_lazy(name: str):
    cfg = LazyConfig.load(str(CONFIGS / "lazy" / f"{name}.py"))
    if "lite0" in name:
        cfg.model.pyramid.network.trunk.pretrained = ""
    return cfg


def test_every_yaml_file_is_tested():
    names = {path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("Base-")}
    assert names == set(MODELS) | set(PYRAMID_MODELS)
    assert set(LAZY) <= names


def test_no_config_enables_mixed_precision_of_detectron2():
    """Detectron2's trainers support mixed precision on CUDA only; the Trainer of this package has its own key."""
    for name in (*MODELS, *PYRAMID_MODELS):
        cfg = load_yaml(name)
        assert not cfg.SOLVER.AMP.ENABLED
        assert ("lite0" in name) == cfg.SOLVER.MIXED_PRECISION
    assert not any(load_lazy(name).train.amp.enabled for name in LAZY)


@pytest.mark.parametrize("name", MODELS)
def test_yaml_builds_its_model(name):
    branch, window, scales = MODELS[name]
    cfg = load_yaml(name)
    model = build_model(cfg)
    network = model.pyramid.network
    assert type(network.mask_branch) is branch
    assert network.window_size == window
    assert len(model.pyramid.exponents) == scales
    assert network.freeze_feedforward == (branch is not CoarseMask)
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"trunk", "head", "mask_branch"} if branch is CoarseMask else {"mask_branch"})
    assert Path(cfg.OUTPUT_DIR) == Path("output", name)
    if branch is not CoarseMask:
        stage1 = Path(cfg.MODEL.WEIGHTS).parent.name
        assert (CONFIGS / f"{stage1}.yaml").is_file()
    side = window + network.context
    with torch.no_grad():
        scores, masks = model.eval().pyramid.network(torch.zeros(1, 3, side, side))
    assert scores.shape == (1,)
    assert masks.shape[1:] == ((56, 56) if branch is CoarseMask else (window, window))


@pytest.mark.parametrize("name", PYRAMID_MODELS)
def test_yaml_builds_its_pyramid_model(name):
    cfg = load_yaml(name)
    model = build_model(cfg)
    generator = model.proposal_generator
    assert generator.strides == [4, 8, 16, 32, 64, 128]
    assert generator.geometry.window_cells == [5, 7]
    assert not generator.frozen
    trunk = model.backbone.trunk if PYRAMID_MODELS[name] else model.backbone.bottom_up
    assert any(p.requires_grad for p in trunk.parameters()) != PYRAMID_MODELS[name]
    assert cfg.INPUT.SCALE_JITTER.ENABLED
    assert Path(cfg.OUTPUT_DIR) == Path("output", name)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("deepmask_R_50", {0: 1e-3, 199_990: 1e-3, 200_000: 4.64e-4, 480_001: 1e-4, 1_199_999: 1e-4}),
        ("sharpmask_R_50", {0: 1e-3, 200_000: 4.64e-4, 320_001: 1e-4}),
        ("deepmask_paper_VGG_A", {0: 1e-3, 1_199_990: 1e-3}),
    ],
)
def test_learning_rates_follow_the_comments(name, rates):
    cfg = load_yaml(name)
    scheduler = build_lr_scheduler(cfg, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR))
    for iteration, rate in rates.items():
        scheduler.last_epoch = iteration
        assert scheduler.get_lr()[0] == pytest.approx(rate, rel=1e-2)


def test_deepmask_has_the_number_of_parameters_of_the_released_model():
    """The number was counted in the released model file: trunk with the shared part of the heads, mask head and score head."""
    assert sum(p.numel() for p in build_model(load_yaml("deepmask_R_50")).parameters()) == 17_333_121


def plain_attributes(module) -> dict:
    # LazyConfig passes lists and dicts as its own types, which compare equal to lists and dicts.
    kinds = (bool, int, float, str, Sequence, Mapping)
    return {k: v for k, v in vars(module).items() if isinstance(v, kinds) and not k.startswith("_")}


@pytest.mark.parametrize("name", LAZY)
def test_lazy_config_equals_the_yaml_file(name):
    cfg, lazy_cfg = load_yaml(name), load_lazy(name)
    model, lazy = build_model(cfg), instantiate(lazy_cfg.model)
    assert {k: v.shape for k, v in lazy.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    for part, lazy_part in [
        (model, lazy),
        (model.pyramid, lazy.pyramid),
        (model.pyramid.network, lazy.pyramid.network),
        (model.mapper, lazy.mapper),
        (model.mapper.sampler, lazy.mapper.sampler),
    ]:
        assert plain_attributes(lazy_part) == plain_attributes(part)
    assert torch.equal(lazy.pyramid.network.pixel_mean, model.pyramid.network.pixel_mean)
    assert torch.equal(lazy.pyramid.network.pixel_std, model.pyramid.network.pixel_std)
    lazy_cfg.optimizer.params.model = lazy
    optimizer, lazy_optimizer = build_optimizer(cfg, model), instantiate(lazy_cfg.optimizer)
    assert type(lazy_optimizer) is type(optimizer)
    keys = ("lr", "weight_decay", "momentum")
    groups, lazy_groups = (
        [[g.get(key) for key in keys] + [len(g["params"])] for g in o.param_groups] for o in (optimizer, lazy_optimizer)
    )
    assert lazy_groups == groups
    assert lazy_cfg.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy_cfg.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy_cfg.dataloader.train.balance_categories == cfg.MODEL.SHARPMASK.SAMPLING.BALANCE_CATEGORIES
    multiplier = instantiate(lazy_cfg.lr_multiplier)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for where in (0.0, 0.01, 0.1, 0.2, 0.3, 0.5, 0.9):
        scheduler.last_epoch = where * cfg.SOLVER.MAX_ITER
        # The factor of the middle step is 0.46 in the yaml file and 0.5 in the released code.
        assert multiplier(where) * cfg.SOLVER.BASE_LR == pytest.approx(scheduler.get_lr()[-1], rel=0.08)
