"""Imports libraries that are needed for one tool only."""

import importlib
from typing import Any

from ..errors import UserError

# What pip installs for these libraries.
EXTRA = "sharpmask_d2[interop]"


def import_extra(name: str, *, requirement: str = EXTRA) -> Any:
    """Imports a library that is not among the requirements of this package.

    Args:
        name: of the module.
        requirement: what pip has to install. Default: the extra `interop`.

    Returns:
        The module.

    Raises:
        UserError: the library is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise
        raise UserError(f"{name} is not installed: run pip install '{requirement}'") from None
