"""Detects objects in images, by classifying SharpMask proposals.

    sharpmask detect --input photographs/ --output detections/

The output folder gets detections.json, a COCO result file, and one picture per image with masks, boxes, class names and scores. Folders
are searched with their sub-folders; hidden files are skipped. An image that cannot be processed is named and left out, and the exit
status is 1. A run that was stopped resumes when it is started again with the same settings; images that were added, replaced or removed
in the meantime affect no other image.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from ..data import add_dataset_option, register_datasets
from ..inference.detect import detect
from ..model_zoo import DEFAULT_DETECTOR
from .command import (
    add_console_options,
    add_model_options,
    add_shard_option,
    add_threads_option,
    console_of,
    make_parser,
    set_threads,
)


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser("detect", __doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE_OR_DIR", help="images, or folders of images")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for detections.json and the pictures")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.3,
        metavar="SCORE",
        help="lowest score of the detections that pictures show; default: %(default)s",
    )
    add_threads_option(parser)
    add_shard_option(parser)
    add_console_options(parser)
    add_dataset_option(parser)
    add_model_options(parser, default=DEFAULT_DETECTOR, kind="detector")
    return parser.parse_intermixed_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask detect`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status: 1 if an image failed, else 0.
    """
    args = vars(_parse_args(argv))
    set_threads(args.pop("threads"))
    register_datasets(args.pop("dataset"))
    with console_of(args):
        return detect(**args)
