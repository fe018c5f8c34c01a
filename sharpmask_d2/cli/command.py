"""What the command lines of this package have in common: how they end, and the options that several of them have."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, Optional

from ..console import console
from ..errors import UserError
from ..inference import DTYPES
from ..io.shards import Shard, parse_shard

_INTERRUPTED = 130


def run(main: Callable[[], Optional[int]]) -> None:
    """Runs a command line, and exits with its status unless that is 0.

    What the user can correct ends in one line on stderr and status 2: a `UserError`, an `OSError` (what the operating system refuses), and
    a `FloatingPointError` (a training that diverges). Ctrl-C ends in status 130. Every other exception is a bug and keeps its traceback.

    Args:
        main: takes no arguments; returns the exit status, None for 0.
    """
    try:
        status = main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = _INTERRUPTED
    except BrokenPipeError:
        # The reader of the output, such as `head`, has ended. Without this, Python would report it again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (UserError, OSError, FloatingPointError) as error:
        # torchrun shows the output of all processes together.
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"{rank}{_in_one_line(error)}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Original Traceback" in str(error):
        # An error in a process that loads data: torch appends its traceback, which ends in the type and the message.
        return lines[-1].partition(": ")[2]
    return " ".join(line.strip() for line in lines)


def positive(text: str) -> int:
    """Reads the value of an option that has to be a whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def make_parser(name: str, doc: Optional[str]) -> argparse.ArgumentParser:
    """Makes the parser of a subcommand.

    Args:
        name: of the subcommand.
        doc: docstring of its module: one line, and below it examples and explanations for `--help`.
    """
    return argparse.ArgumentParser(
        prog=f"sharpmask {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_console_options(parser: argparse.ArgumentParser, *, as_json: bool = True) -> None:
    """Adds `--quiet` and `--json`, for `console_of`.

    Args:
        parser: of a subcommand.
        as_json: whether the subcommand can print JSON, so that it has `--json`. Default: True.
    """
    parser.add_argument(
        "--quiet", action="store_true", help="print no progress and no status; errors are still printed"
    )
    if as_json:
        parser.add_argument(
            "--json",
            action="store_true",
            dest="as_json",
            help="print one JSON object for programs, instead of tables and status",
        )


def console_of(args: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Takes the values of `add_console_options` out of the parsed arguments, and makes the context in which the subcommand runs."""
    return console(quiet=args.pop("quiet"), as_json=args.pop("as_json", False))


def add_model_options(parser: argparse.ArgumentParser, *, default: str, kind: str = "model") -> None:
    """Adds the options that choose a model: `--model`, `--config-file`, `--weights`, and changes to the config at the end of the line.

    Args:
        parser: it has to parse with `parse_intermixed_args`, since the changes may stand anywhere.
        default: name of the packaged model that `--model` has by default.
        kind: noun for the help texts.
    """
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=default, metavar="NAME", help=f"packaged {kind}; default: %(default)s")
    group.add_argument("--config-file", metavar="YAML", help=f"config file, instead of a packaged {kind}")
    group.add_argument("--weights", metavar="PTH", help="checkpoint, instead of the config's MODEL.WEIGHTS")
    group.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="changes to the config, such as MODEL.DEVICE cpu; sharpmask_d2/config.py explains every key",
    )


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype`, which `ProposalPredictor` takes."""
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="number format of the network; default: %(default)s"
    )


def add_pkl_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for Detectron2's precomputed proposals: `--pkl` and `--pkl-masks`."""
    parser.add_argument("--pkl", metavar="FILE", help="pickle of Detectron2's precomputed proposals to write, too")
    parser.add_argument(
        "--pkl-masks",
        action="store_true",
        help="store the masks in the pickle, for detectors that give detections the masks of their proposals",
    )


def add_shard_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--shard`, which `run_images` takes."""
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="work on every N-th image from the I-th on only; `sharpmask merge` joins the files of all N runs",
    )


def _shard(text: str) -> Shard:
    try:
        return parse_shard(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is no shard: I/N with I from 1 to N is expected, such as 1/4"
        ) from None


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--threads`, for `set_threads`."""
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="number of CPU threads of the network; default: OMP_NUM_THREADS, or one per core",
    )


def set_threads(threads: Optional[int]) -> None:
    """Limits the CPU threads of the network in this process.

    Args:
        threads: number of threads; None keeps the number that torch has chosen.
    """
    if threads:
        import torch

        torch.set_num_threads(threads)
