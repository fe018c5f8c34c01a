"""Imports the libraries of the extra `report`."""

import importlib
from types import ModuleType

from ..errors import UserError

_PACKAGES = {"jinja2": "Jinja2", "matplotlib": "Matplotlib"}


def import_extra(module: str) -> ModuleType:
    """Import a module of a library that only reports need.

    Args:
        module: name of the module.

    Returns:
        The module.

    Raises:
        UserError: the library is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(module.split(".")[0])
        if package is None or error.name != module.split(".")[0]:
            raise
        raise UserError(f"a report needs {package}: run pip install 'sharpmask_d2[report]'") from None
