"""Packs what pyproject.toml cannot express: configs/ lies at the top of the repository and goes into the wheel beside the model zoo."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CONFIGS = "sharpmask_d2.model_zoo.configs"

# Package in the wheel -> folder in the repository.
folders = {CONFIGS: "configs"}
for folder in sorted(path for path in (ROOT / "configs").rglob("*") if path.is_dir() and path.name != "__pycache__"):
    inside = folder.relative_to(ROOT / "configs")
    folders[".".join([CONFIGS, *inside.parts])] = folder.relative_to(ROOT).as_posix()

setup(
    packages=[*find_packages(include=["sharpmask_d2", "sharpmask_d2.*"]), *folders],
    py_modules=["sharpmask_command"],
    package_dir=folders,
    package_data={
        "sharpmask_d2": ["py.typed"],
        "sharpmask_d2.app": ["static/*"],
        "sharpmask_d2.model_zoo": ["*.yaml", "*.pth"],
        "sharpmask_d2.report.page": ["*.css", "*.jinja", "*.js"],
        **{name: ["*.yaml"] for name in folders},
    },
)
