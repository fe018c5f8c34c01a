"""Writes proposals or masks in the formats of labelling tools: COCO, CVAT, Label Studio, labelme, YOLO, PNG.

    sharpmask export proposals.json --to labelme --output photographs/ --image-root photographs/ --keep 5 --min-score 0.3
    sharpmask export masks.json --to coco --output instances.json --annotations images.json
    sharpmask export masks.json --to yolo --output dataset/

The input is a COCO result file, as `sharpmask propose`, `segment` and `detect` write it, or a COCO dataset with masks. Results without
file_name need --annotations, which lists the images and names the categories; images without masks are then written, too. The masks of
proposals, which have no category, are called "object".

coco, cvat and label-studio are one file; labelme, yolo and png are a folder with one file per image, in the same sub-folders as the images.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from ..interop.export import FORMATS, SHAPES, export_masks
from .command import add_console_options, console_of, make_parser, positive


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser("export", __doc__)
    parser.add_argument("proposals", metavar="JSON", help="COCO result file or COCO dataset with masks")
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--output", required=True, metavar="FILE_OR_DIR", help="file or folder to write")
    parser.add_argument("--annotations", metavar="JSON", help="COCO annotation file that lists the images")
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images, to which the files of labelme refer")
    parser.add_argument(
        "--keep",
        type=positive,
        metavar="N",
        help="maximum number of masks per image, those of highest score; default: all",
    )
    parser.add_argument("--min-score", type=float, metavar="SCORE", help="lowest score of a mask; default: none")
    parser.add_argument("--label", metavar="NAME", help="name of all masks; default: as the categories are named")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        help="mask, polygon (without holes) or box; default: mask, and polygon for yolo, which has no masks",
    )
    parser.add_argument(
        "--image-url",
        metavar="URL",
        help="start of the URLs of the images in label-studio, before their file names; default: the local storage",
    )
    add_console_options(parser, as_json=False)
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask export`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status, 0.
    """
    args = vars(_parse_args(argv))
    with console_of(args):
        export_masks(**args)
    return 0
