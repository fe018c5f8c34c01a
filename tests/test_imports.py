"""Packages import one another in one direction only, so that each can be read and used without the ones above it."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sharpmask_d2"
# Importing the package itself registers everything, so that modules of `cli` and `inference` that ask for its version are left out.
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_name(path) for path in MODULES}


def imported_modules(path: Path) -> set:
    """Modules of this package that a file imports, wherever in the file."""
    parts = path.relative_to(PACKAGE.parent).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level + 1]) if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in NAMES else base for alias in node.names)
    return {name for name in found if name in NAMES and name != "sharpmask_d2"}


def part(module: str) -> str:
    """The package or single module directly under `sharpmask_d2`, or under `sharpmask_d2.modeling`, that holds a module."""
    words = module.split(".")
    return ".".join(words[1 : 3 if words[1:2] == ["modeling"] else 2])


def package_graph(depth) -> dict:
    graph = {}
    for path in MODULES:
        if path == PACKAGE / "__init__.py":
            continue
        own = depth(module_name(path))
        graph.setdefault(own, set()).update({depth(name) for name in imported_modules(path)} - {own})
    return graph


def test_no_package_imports_a_package_that_imports_it():
    graph = package_graph(lambda module: module.split(".")[1])
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"packages of sharpmask_d2 import one another in a circle: {' -> '.join(error.args[1][::-1])}")


def test_no_part_of_the_models_imports_a_part_that_imports_it():
    graph = {name: needs for name, needs in package_graph(part).items() if name.startswith("modeling.")}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(
            f"parts of sharpmask_d2.modeling import one another in a circle: {' -> '.join(error.args[1][::-1])}"
        )


@pytest.mark.parametrize("lower", ["windows", "structures", "data", "checkpoint", "modeling"])
def test_models_import_neither_training_nor_inference(lower):
    graph = package_graph(lambda module: module.split(".")[1])
    reached, waiting = set(), [lower]
    while waiting:
        new = graph.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    assert not reached & {"engine", "inference", "evaluation", "cli"}
