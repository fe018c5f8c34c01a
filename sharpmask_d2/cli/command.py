"""What all command lines of this package have in common: how they end, and options that several of them have."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Optional

import torch

from ..errors import UserError

_INTERRUPTED = 130


def run(main: Callable) -> None:
    """Run a command line to its end; exit with its status unless that is 0.

    What the user can mend, or has done, ends in one line on stderr: a UserError, anything that the operating system refuses (OSError), a
    training that diverges (FloatingPointError) with status 2, Ctrl-C with 130. Every other exception is a bug and keeps its traceback.

    Args:
        main: without arguments; returns the exit status, None for 0.
    """
    try:
        status = main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = _INTERRUPTED
    except BrokenPipeError:
        # Who read the output, such as `head`, has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (UserError, OSError, FloatingPointError) as error:
        print(_in_one_line(error), file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Original Traceback" in str(error):
        # From a process that loads data: torch appends the traceback there, which ends in the type and the message.
        return lines[-1].partition(": ")[2]
    return " ".join(line.strip() for line in lines)


def positive(text: str) -> int:
    """Type of an option: a whole number that is 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    """Give a command the option `--threads`, for `set_threads`."""
    parser.add_argument(
        "--threads", type=positive, help="threads of the network; default: OMP_NUM_THREADS, or one a core"
    )


def set_threads(threads: Optional[int]) -> None:
    """Limit the threads of the network in this process; None leaves torch its own choice."""
    if threads:
        torch.set_num_threads(threads)
