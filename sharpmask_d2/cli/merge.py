"""Merges the result files of all shards of a run into the file of a run that was not divided.

    sharpmask propose --input photographs/ --output p1.json --shard 1/2
    sharpmask propose --input photographs/ --output p2.json --shard 2/2
    sharpmask merge p1.json p2.json --output proposals.json

The files are those of `sharpmask propose`, `segment` or `detect` with --shard; beside each lies the list of its images, such as
p1.json.shard. Every image has to be there once: the command names shards and images that are missing or there twice. An image that could
not be processed is named and left out, and the exit status is 1.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from ..console import print_status, print_summary
from ..inference.image_files import report_failed
from ..io.outputs import check_outputs
from ..io.shards import LIST, merge_shards
from .command import add_console_options, add_pkl_options, console_of, make_parser


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser("merge", __doc__)
    parser.add_argument("shards", nargs="+", metavar="JSON", help="result files of all shards, in any order")
    parser.add_argument("--output", required=True, metavar="JSON", help="COCO result file to write")
    add_pkl_options(parser)
    add_console_options(parser)
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask merge`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status: 1 if an image of a shard failed, else 0.
    """
    args = _parse_args(argv)
    with console_of(vars(args)):
        check_outputs(
            {"--output": args.output, "--pkl": args.pkl},
            inputs=[*args.shards, *(shard + LIST for shard in args.shards)],
        )
        num_images, count, failed = merge_shards(
            args.shards, args.output, pickle_path=args.pkl, pickle_masks=args.pkl_masks
        )
        status = report_failed(failed)
        print_status(f"wrote {count} results of {num_images} images: {args.output}")
        print_summary({"images": num_images, "failed": len(failed), "results": count, "output": args.output})
        return status
