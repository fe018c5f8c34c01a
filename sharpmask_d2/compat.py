"""Makes Detectron2 0.6 from PyPI work with current libraries.

This release has no compiled operators and was written for the libraries of 2021. Importing this module supplies what is missing; it must be
imported before any submodule of Detectron2. The main branch of Detectron2 has the version 0.6 as well, so each missing name is supplied
only if the sources of the installed Detectron2 use it and it does not exist.
"""

import importlib.util
import re
import sys
import types
import warnings
from pathlib import Path

import detectron2

_SOURCES = Path(detectron2.__file__).parent
# Sources of Detectron2 0.6 that use names which numpy has removed.
_NUMPY_USERS = (
    "data/build.py",
    "data/datasets/pascal_voc.py",
    "evaluation/pascal_voc_evaluation.py",
    "evaluation/sem_seg_evaluation.py",
    "structures/masks.py",
    "utils/video_visualizer.py",
    "utils/visualizer.py",
)


def _uses(path: str, pattern: str) -> bool:
    """Search a source file of Detectron2 for a regular expression. `^import` and `^from` find only imports outside of `try` blocks."""
    file = _SOURCES / path
    return file.is_file() and re.search(pattern, file.read_text(encoding="utf-8"), re.MULTILINE) is not None


def _is_missing(module: str) -> bool:
    return module not in sys.modules and importlib.util.find_spec(module) is None


class _MissingOperators(types.ModuleType):
    """Replaces `detectron2._C`; every access to an operator raises an error that names the operator."""

    @staticmethod
    def get_compiler_version() -> str:
        """Text that `detectron2.utils.collect_env` prints."""
        return "none: no compiled operators"

    @staticmethod
    def get_cuda_version() -> str:
        """Text that `detectron2.utils.collect_env` prints."""
        return "none: no compiled operators"

    @staticmethod
    def has_cuda() -> bool:
        """Whether the compiled operators support CUDA."""
        return False

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            f"detectron2._C.{name} is a compiled operator, but the installed Detectron2 has no compiled operators. "
            "SharpMask does not need it; to use it, build Detectron2 from its sources."
        )


def _supply_compiled_operators() -> None:
    operators = _MissingOperators("detectron2._C")
    sys.modules["detectron2._C"] = operators
    detectron2._C = operators

    from pycocotools.cocoeval import COCOeval

    fast_eval_api = types.ModuleType("detectron2.evaluation.fast_eval_api")
    fast_eval_api.COCOeval_opt = COCOeval
    sys.modules["detectron2.evaluation.fast_eval_api"] = fast_eval_api


def _supply_removed_names() -> None:
    import numpy as np
    import PIL.Image

    if not hasattr(PIL.Image, "LINEAR") and _uses("data/transforms/transform.py", r"\bImage\.LINEAR\b"):
        PIL.Image.LINEAR = PIL.Image.BILINEAR
    for name, builtin in {"int": int, "float": float, "bool": bool, "object": object, "str": str}.items():
        if name not in vars(np) and any(_uses(path, rf"\bnp\.{name}\b") for path in _NUMPY_USERS):
            setattr(np, name, builtin)


def _supply_export_without_caffe2() -> None:
    # detectron2.utils.analysis needs the tracing adapter of detectron2.export, but not its module `api`, which needs Caffe2.
    api = types.ModuleType("detectron2.export.api")
    api.__all__ = []
    sys.modules["detectron2.export.api"] = api


# Detectron2 causes these warnings at import, and its users cannot avoid them.
warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)
_supply_removed_names()
if _is_missing("caffe2") and _uses("export/__init__.py", r"^from \.api import"):
    _supply_export_without_caffe2()
if _is_missing("detectron2._C") and (
    _uses("layers/deform_conv.py", r"^from detectron2 import _C")
    or _uses("evaluation/coco_evaluation.py", r"^from detectron2\.evaluation\.fast_eval_api import")
):
    _supply_compiled_operators()
