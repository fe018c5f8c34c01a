"""The console command `sharpmask`, which starts the subcommands in `sharpmask_d2.cli`.

This module lies outside the package because importing the package loads torch and Detectron2 and registers the models. `sharpmask --help`
needs neither, and GOMP_SPINCOUNT has to be set before torch is loaded.
"""

import argparse
import importlib
import importlib.metadata
import multiprocessing
import os
import sys
from collections.abc import Sequence
from typing import Optional

# The processes of a training on several GPUs import their parent's script, and with it this module, before anything of Detectron2, which
# needs the package first (see compat.py).
if multiprocessing.current_process().name != "MainProcess":
    import sharpmask_d2  # noqa: F401

# Subcommand -> its line in `sharpmask --help`, which is the first line of the docstring of its module.
SUBCOMMANDS = {
    "propose": "Computes segment proposals of images and writes them as COCO result JSON.",
    "bulk": "Computes the proposals of millions of images with Ray, on one machine or a cluster.",
    "segment": "Segments images: every object that the model finds, or the objects in given boxes.",
    "detect": "Detects objects in images, by classifying SharpMask proposals.",
    "merge": "Merges the result files of all shards of a run into the file of a run that was not divided.",
    "export": "Writes proposals or masks in the formats of labelling tools: COCO, CVAT, Label Studio, labelme, YOLO, PNG.",
    "export-model": "Exports a model as ONNX or OpenVINO graphs, which run without torch.",
    "evaluate": "Prints the average recall (AR) of proposals on an annotated dataset.",
    "report": "Writes a report on proposals as one HTML file, with their masks and, with annotations, their recall.",
    "analyze": "Prints what the masks of proposals are like, and why objects are missed.",
    "app": "Opens a page in the browser that shows the masks of photographs.",
    "train": "Trains or evaluates a model, with the options of Detectron2's train_net.py.",
    "convert-model": "Converts a published DeepMask or SharpMask model (.t7) into a checkpoint and its config.",
    "convert-proposals": "Converts published proposals (.json, .t7) into COCO result JSON.",
    "package-model": "Packs checkpoints into one file in half precision, as the model zoo has them.",
}
# Subcommands that run exported models without Detectron2. They check for themselves what else needs it.
_WITHOUT_DETECTRON2 = {"propose"}


def prepare_environment() -> None:
    """Sets the environment variables that torch reads when it is loaded, unless the user has set them."""
    # OpenMP threads that wait for work spin for tens of microseconds only; see docs/performance.md, "Shared machines".
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Runs a subcommand, and exits with its status unless that is 0.

    Args:
        argv: subcommand and its arguments; None reads them from the command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    # What follows the subcommand is for its own parser.
    name = _parser().parse_args(argv[:1]).subcommand
    prepare_environment()
    from sharpmask_d2.cli.command import run
    from sharpmask_d2.extras import check_detectron2

    def start() -> Optional[int]:
        if name not in _WITHOUT_DETECTRON2:
            check_detectron2()
        return importlib.import_module(f"sharpmask_d2.cli.{name.replace('-', '_')}").main(argv[1:])

    run(start)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, SUBCOMMANDS)) + 2
    lines = [f"  {name:{width}}{summary}" for name, summary in SUBCOMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="sharpmask",
        usage="sharpmask [--help] [--version] SUBCOMMAND ...",
        description="Segment proposals (DeepMask, SharpMask) and detectors on them, as a plugin for Detectron2.",
        epilog="\n".join(
            ["subcommands:", *lines, "", "`sharpmask SUBCOMMAND --help` shows the options of a subcommand."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version(), help="show the version and exit")
    parser.add_argument("subcommand", choices=SUBCOMMANDS, metavar="SUBCOMMAND", help=argparse.SUPPRESS)
    return parser


def _version() -> str:
    try:
        return f"sharpmask_d2 {importlib.metadata.version('sharpmask_d2')}"
    except importlib.metadata.PackageNotFoundError:
        return "sharpmask_d2, not installed"


if __name__ == "__main__":
    main()
