"""What commands print: progress bars on stderr, and status lines and results on stdout. Errors and warnings are not printed here."""

import contextlib
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Optional, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class _Mode(NamedTuple):
    quiet: bool
    as_json: bool


_DEFAULT = _Mode(quiet=False, as_json=False)
_mode: ContextVar[_Mode] = ContextVar("mode", default=_DEFAULT)


@contextlib.contextmanager
def console(*, quiet: bool = False, as_json: bool = False) -> Iterator[None]:
    """Context manager that decides what the functions of this module print.

    Args:
        quiet: print neither progress bars nor status lines. Default: False.
        as_json: print results as JSON, and no status lines, so that stdout has nothing else. Default: False.
    """
    token = _mode.set(_Mode(quiet, as_json))
    try:
        yield
    finally:
        _mode.reset(token)


def is_quiet() -> bool:
    """Whether progress bars are not shown."""
    return _mode.get().quiet


def progress(items: Iterable[Item], *, desc: str, total: Optional[int] = None) -> Iterable[Item]:
    """Show a progress bar with the remaining time while images are iterated over.

    Args:
        items: one item per image.
        desc: label of the bar.
        total: number of items. Default: None, `len(items)`.

    Returns:
        An iterable over the items.
    """
    return tqdm(items, total=total, unit="image", desc=desc, disable=_mode.get().quiet)


def print_status(line: str) -> None:
    """Print a line that says what a command does or has done."""
    mode = _mode.get()
    if not mode.quiet and not mode.as_json:
        print(line)


def print_next(command: Sequence[str]) -> None:
    """Print the command that a user may want to run next, as words of a shell."""
    print_status(f"next: {shlex.join(command)}")


def print_result(text: str, content: Any) -> None:
    """Print what a command is for, also where `quiet` is set.

    Args:
        text: the result for readers.
        content: the result for JSON, without nan.
    """
    print(json.dumps(content, allow_nan=False) if _mode.get().as_json else text)


def print_summary(summary: dict[str, Any]) -> None:
    """Print the figures of a run as one line of JSON, where results are printed as JSON."""
    if _mode.get().as_json:
        print(json.dumps(summary))
