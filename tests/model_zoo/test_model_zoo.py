"""Asking for configs and models by name, as of Detectron2's model zoo."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from drawing import ROOT
from sharpmask_d2 import model_zoo
from sharpmask_d2.errors import UserError
from sharpmask_d2.inference import DetectionPredictor, ProposalPredictor

CONFIGS = ROOT / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for kind in ("*.yaml", "*.py") for path in CONFIGS.rglob(kind))


def parameters(name: str) -> dict:
    return torch.load(model_zoo.packaged_weights(name), weights_only=True)["model"]


def assert_has_packaged_weights(model, name: str) -> None:
    packaged = parameters(name)
    found = dict(model.named_parameters())
    assert found
    for key, value in found.items():
        assert torch.equal(value.cpu(), packaged[key].float()), key


@pytest.mark.parametrize("name", model_zoo.names())
def test_packaged_models_have_a_config_and_weights(name):
    cfg = model_zoo.get_config(name)
    assert isinstance(cfg, CfgNode)
    assert Path(model_zoo.get_config_file(name)).is_file()
    assert Path(cfg.MODEL.WEIGHTS).is_file()
    assert ("cuda" if torch.cuda.is_available() else "cpu") == cfg.MODEL.DEVICE
    assert model_zoo.get_config(name, trained=False).MODEL.WEIGHTS == ""


@pytest.mark.parametrize("name", FILES)
def test_config_files_are_found_by_their_path(name):
    assert Path(model_zoo.get_config_file(name)).samefile(CONFIGS / name)


def test_the_packaged_weights_fit_the_config_they_were_trained_with():
    for name in ("sharpmask_bifpn_lite0.yaml", "lazy/sharpmask_lite0.py"):
        assert_has_packaged_weights(model_zoo.get(name, trained=True, device="cpu"), name)
    cfg = model_zoo.get_config("lazy/sharpmask_lite0.py")
    assert cfg.train.init_checkpoint == "output/lazy_deepmask_lite0/model_final.pth"


def test_get_builds_the_model_on_the_device_with_its_weights():
    model = model_zoo.get("sharpmask_lite0", device="cpu")
    assert_has_packaged_weights(model, "sharpmask_lite0")
    assert model.device.type == "cpu"
    assert model.training
    torch.manual_seed(0)
    random = model_zoo.get("sharpmask_lite0", trained=False, device="cpu")
    assert not torch.equal(next(random.parameters()), next(model.parameters()))


def test_the_packaged_detector_decodes_its_masks_as_its_proposals():
    model = model_zoo.get("multipath_bifpn_lite0", device="cpu")
    own = model.roi_heads.mask_head.decoder.state_dict()
    for name, value in model.proposal_generator.decoder.state_dict().items():
        assert torch.equal(own[name], value), name


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: model_zoo.get_config_file("sharpmask_lite1"),
            "no packaged model 'sharpmask_lite1': .*sharpmask_lite0",
        ),
        (lambda: model_zoo.get_config("deepmask_R_51.yaml"), r"no config file 'deepmask_R_51\.yaml': .*deepmask_R_50"),
        (lambda: model_zoo.get_config("../configs/deepmask_R_50.yaml"), "no config file"),
        (lambda: model_zoo.get_config("deepmask_R_50.yaml", trained=True), "no trained weights for 'deepmask_R_50"),
        (lambda: model_zoo.get("sharpmask_lite0", device="nonsense"), "MODEL.DEVICE is 'nonsense'"),
    ],
)
def test_mistakes_are_answered_with_what_there_is(ask, message):
    with pytest.raises(UserError, match=message):
        ask()


def test_predictors_run_the_default_models_unless_they_get_a_config():
    for predictor, name in (
        (ProposalPredictor(), model_zoo.DEFAULT),
        (DetectionPredictor(), model_zoo.DEFAULT_DETECTOR),
    ):
        assert predictor.cfg == model_zoo.get_config(name)
