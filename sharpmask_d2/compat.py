"""What an older Detectron2 needs beside current libraries.

Detectron2 0.6, as PyPI has it, comes without its compiled operators and was written for libraries of 2021. Importing this module, before
anything of Detectron2 but its top level, supplies what it misses. The main branch calls itself 0.6, too: each thing is supplied only where
the sources of the installed Detectron2 ask for it and it is not there.
"""

import importlib.util
import re
import sys
import types
import warnings
from pathlib import Path

import detectron2

_SOURCES = Path(detectron2.__file__).parent
# Sources of Detectron2 0.6 that use names which numpy dropped.
_NUMPY_USERS = (
    "data/build.py",
    "data/datasets/pascal_voc.py",
    "evaluation/pascal_voc_evaluation.py",
    "evaluation/sem_seg_evaluation.py",
    "structures/masks.py",
    "utils/video_visualizer.py",
    "utils/visualizer.py",
)


def _asks(path: str, pattern: str) -> bool:
    """Whether a line of a source file of Detectron2 matches. A pattern that starts with ^import or ^from finds imports without a guard."""
    file = _SOURCES / path
    return file.is_file() and re.search(pattern, file.read_text(encoding="utf-8"), re.MULTILINE) is not None


def _is_missing(module: str) -> bool:
    return module not in sys.modules and importlib.util.find_spec(module) is None


class _MissingOperators(types.ModuleType):
    """Stands in for `detectron2._C`: every operator asked of it raises an error that says what is missing."""

    @staticmethod
    def get_compiler_version() -> str:
        """What Detectron2's report on its environment prints."""
        return "none: no compiled operators"

    @staticmethod
    def get_cuda_version() -> str:
        """Likewise."""
        return "none: no compiled operators"

    @staticmethod
    def has_cuda() -> bool:
        """Likewise."""
        return False

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            f"detectron2._C.{name} is a compiled operator, and the installed Detectron2 has none. "
            "SharpMask does not use it; to use it, build Detectron2 from its sources."
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

    if not hasattr(PIL.Image, "LINEAR") and _asks("data/transforms/transform.py", r"\bImage\.LINEAR\b"):
        PIL.Image.LINEAR = PIL.Image.BILINEAR
    for name, builtin in {"int": int, "float": float, "bool": bool, "object": object, "str": str}.items():
        if name not in vars(np) and any(_asks(path, rf"\bnp\.{name}\b") for path in _NUMPY_USERS):
            setattr(np, name, builtin)


def _supply_export_without_caffe2() -> None:
    # detectron2.utils.analysis needs detectron2.export for its tracing adapter, not for what its `api` does with Caffe2.
    api = types.ModuleType("detectron2.export.api")
    api.__all__ = []
    sys.modules["detectron2.export.api"] = api


# What Detectron2 does at import and nobody who only uses it can change.
warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)
_supply_removed_names()
if _is_missing("caffe2") and _asks("export/__init__.py", r"^from \.api import"):
    _supply_export_without_caffe2()
if _is_missing("detectron2._C") and (
    _asks("layers/deform_conv.py", r"^from detectron2 import _C")
    or _asks("evaluation/coco_evaluation.py", r"^from detectron2\.evaluation\.fast_eval_api import")
):
    _supply_compiled_operators()
