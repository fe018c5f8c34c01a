"""What Detectron2 0.6, as the package registry has it, needs beside current libraries.

That package comes without its compiled operators and was written for libraries of 2021. Importing this module, before anything of
Detectron2 but its top level, supplies what it misses; beside any other Detectron2 it changes nothing.
"""

import importlib.util
import sys
import types
import warnings

import detectron2


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

    if not hasattr(PIL.Image, "LINEAR"):
        PIL.Image.LINEAR = PIL.Image.BILINEAR
    for name, builtin in {"int": int, "float": float, "bool": bool, "object": object, "str": str}.items():
        if name not in vars(np):
            setattr(np, name, builtin)


def _supply_export_without_caffe2() -> None:
    # detectron2.utils.analysis needs detectron2.export for its tracing adapter, not for what its `api` does with Caffe2.
    api = types.ModuleType("detectron2.export.api")
    api.__all__ = []
    sys.modules["detectron2.export.api"] = api


def _silence_old_ways() -> None:
    # What Detectron2 0.6 does at import and nobody who only uses it can change.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)


if detectron2.__version__ == "0.6":
    _silence_old_ways()
    _supply_removed_names()
    if importlib.util.find_spec("caffe2") is None:
        _supply_export_without_caffe2()
    if importlib.util.find_spec("detectron2._C") is None:
        _supply_compiled_operators()
