"""Writes a report on proposals as one HTML file, with their masks and, with annotations, their recall.

    sharpmask report proposals.json --image-root images/ --output report.html
    sharpmask report new.json old.json --annotations instances.json --image-root images/ --output report.html --plots plots/

The page opens in a browser without a network. Its gallery shows the images and their masks. With annotated objects it also shows the recall
of each file, the objects that are missed, and the worst images. --annotations lists the images; without it, the results have to name
them, as those of `sharpmask propose --input` do. Without --image-root, the page shows masks without photographs.

An image that cannot be read is named and shown without a picture, and the exit status is 1.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from ..report import write_report
from .command import add_console_options, console_of, make_parser, positive


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser("report", __doc__)
    parser.add_argument(
        "proposals", nargs="+", metavar="PROPOSALS", help="COCO result files with segmentations, at most 6"
    )
    parser.add_argument("--output", required=True, metavar="HTML", help="file to write")
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images")
    parser.add_argument("--annotations", metavar="JSON", help="COCO annotation file")
    parser.add_argument(
        "--name",
        action="append",
        dest="names",
        metavar="NAME",
        help="name of a result file in the page, once for each; default: the name of the file without its suffix",
    )
    parser.add_argument(
        "--plots", metavar="DIR", help="folder for the plots of recall, as PNG and SVG; needs --annotations"
    )
    for option, default, noun in (
        ("--max-images", 1000, "images in the gallery"),
        ("--max-masks", 20, "masks per image in the gallery"),
        ("--max-misses", 100, "pictures of missed objects for each number of proposals"),
    ):
        parser.add_argument(
            option, type=positive, default=default, metavar="N", help=f"maximum number of {noun}; default: %(default)s"
        )
    parser.add_argument(
        "--thumbnail-size",
        type=positive,
        default=384,
        metavar="PIXELS",
        help="maximum side of the pictures; default: %(default)s",
    )
    add_console_options(parser, as_json=False)
    return parser.parse_intermixed_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask report`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status: 1 if an image could not be read, else 0.
    """
    args = vars(_parse_args(argv))
    with console_of(args):
        return write_report(**args)
