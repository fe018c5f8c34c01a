"""Imports the libraries of the package's extras when they are asked for."""

import importlib
import importlib.util
from typing import Any

from .errors import UserError

# What pip installs for each of the extras.
APP, EXPORT, INTEROP, ONNX, OPENVINO, RAY, REPORT, TORCH = (
    f"sharpmask_d2[{name}]" for name in ("app", "export", "interop", "onnx", "openvino", "ray", "report", "torch")
)
_DETECTRON2 = (
    "Detectron2 is not installed: run pip install 'git+https://github.com/facebookresearch/detectron2.git', or see "
    '"Install" in docs/getting-started.md of sharpmask_d2'
)


def import_extra(name: str, *, requirement: str) -> Any:
    """Imports a library that is not among the requirements of this package.

    Args:
        name: of the module.
        requirement: what pip has to install, such as `INTEROP`.

    Returns:
        The module.

    Raises:
        UserError: the library is not installed; the message says how to install it.
    """
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A library that is installed, but lacks a requirement of its own, is another mistake.
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        raise UserError(f"{library} is not installed: run pip install '{requirement}'") from None


def check_detectron2() -> None:
    """Checks that Detectron2 is there, before anything that needs it is imported.

    Raises:
        UserError: it is not installed; the message says how to install it.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise UserError(_DETECTRON2)
