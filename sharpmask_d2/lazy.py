"""Loads what a package offers when it is asked for, so that its light modules do not need the libraries of the others."""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any


def load_when_asked(package: str, modules: dict[str, Sequence[str]]) -> Callable[[str], Any]:
    """Makes the function `__getattr__` of a package.

    Args:
        package: its `__name__`.
        modules: module of the package -> names that the package offers from it.
    """
    places = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{places[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
