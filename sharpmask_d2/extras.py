"""Imports the libraries of the package's extras when they are asked for."""

import importlib
from typing import Any

from .errors import UserError

# What pip installs for each of the extras.
APP, INTEROP, RAY, REPORT = (f"sharpmask_d2[{name}]" for name in ("app", "interop", "ray", "report"))


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
