"""Computes the proposals of millions of images with Ray, on one machine or a cluster.

    sharpmask bulk --input photographs/ --output results --actors 4 --num-cpus 2
    sharpmask bulk --parquet s3://bucket/list.parquet --output s3://bucket/results --address auto --actors 8 64 --num-gpus 1
    sharpmask bulk --input photographs/ --output results --coco proposals.json

It needs Ray: pip install 'sharpmask_d2[ray]'. A Parquet list has the columns image_id and uri. The output folder gets Parquet files with
one row per image: its id, size, proposals and, if it could not be processed, its error; the exit status is then 1. A run that was
stopped resumes when it is started again; images may be added to the list in between. docs/scaling.md describes clusters.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from ..model_zoo import DEFAULT
from .command import add_console_options, add_dtype_option, add_model_options, console_of, make_parser, positive


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser("bulk", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE_OR_DIR", help="images, or folders of images")
    source.add_argument("--parquet", metavar="PATH", help="Parquet file or folder that lists the images")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write, a path or a URI")
    parser.add_argument("--coco", metavar="JSON", help="COCO result file to write when all images are done")
    parser.add_argument(
        "--actors",
        nargs="+",
        type=positive,
        default=[1],
        metavar="N",
        help="number of processes with a model, or the least and the most; default: 1",
    )
    parser.add_argument(
        "--num-cpus", type=positive, default=1, metavar="N", help="CPU threads of each; default: %(default)s"
    )
    parser.add_argument(
        "--num-gpus", type=float, default=0.0, metavar="N", help="GPUs of each, such as 1 or 0.5; default: none"
    )
    parser.add_argument(
        "--images-per-file",
        type=positive,
        default=64,
        metavar="N",
        help="images of one Parquet file, which are computed again if their process dies; default: %(default)s",
    )
    parser.add_argument("--address", metavar="ADDRESS", help="Ray cluster, such as auto; default: this machine alone")
    parser.add_argument(
        "--num-proposals",
        type=positive,
        metavar="N",
        help="maximum number of proposals per image; default: as in the config",
    )
    add_dtype_option(parser)
    add_console_options(parser)
    add_model_options(parser, default=DEFAULT)
    args = parser.parse_intermixed_args(argv)
    if len(args.actors) > 2 or args.actors != sorted(args.actors):
        parser.error("--actors: give one number, or the least and the most")
    args.actors = args.actors[0], args.actors[-1]
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask bulk`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status: 1 if an image failed, else 0.
    """
    args = vars(_parse_args(argv))
    # Ray and Arrow are optional: an import at the top of the file would hide --help where they are missing.
    from ..bulk.ray import compute_in_bulk

    with console_of(args):
        return compute_in_bulk(**args)
