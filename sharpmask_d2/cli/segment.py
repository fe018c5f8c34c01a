"""Segments images: every object that the model finds, or the objects in given boxes.

    sharpmask segment --input photographs/ --output masks.json --visualize pictures/ --non-overlapping
    sharpmask segment --boxes detections.json --annotations instances.json --image-root images/ --output masks.json
    sharpmask segment --boxes instances.json --image-root images/ --output with_masks.json --min-quality 0.7

Without --boxes, a few clean masks of an image are kept: those of high quality that do not repeat others, without specks and holes.
`sharpmask propose` writes all proposals instead.

With --boxes, every box gets a mask. The file is either a COCO result file, such as the detections of any detector, and --annotations lists
the images; or a COCO dataset, whose boxes become masks to train on. The output has the same form with the masks added: each entry keeps its
other fields, and `mask_quality`, from 0 to 1, estimates the IoU of the mask with the object. Masks below --min-quality are left out, and so
are empty ones. Crowds of a dataset stay as they are.

An image that cannot be processed is named and left out, and the exit status is 1. A run that was stopped resumes when it is started again
with the same settings.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from ..inference.segment import segment_boxes, segment_images
from ..model_zoo import DEFAULT
from .command import (
    add_console_options,
    add_dtype_option,
    add_model_options,
    add_shard_option,
    add_threads_option,
    console_of,
    make_parser,
    set_threads,
)


def _share(text: str) -> float:
    """Reads the value of an option that has to lie in 0..1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser("segment", __doc__)
    parser.add_argument("--boxes", metavar="JSON", help="COCO result file or COCO dataset with boxes")
    parser.add_argument("--input", nargs="+", metavar="FILE_OR_DIR", help="images, or folders of images")
    parser.add_argument("--annotations", metavar="JSON", help="COCO annotation file that lists the images")
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images that a COCO file lists")
    parser.add_argument("--output", required=True, metavar="JSON", help="COCO file to write")
    parser.add_argument("--visualize", metavar="DIR", help="folder for pictures of the masks")
    parser.add_argument(
        "--min-quality",
        type=_share,
        metavar="QUALITY",
        help="lowest quality of a mask, from 0 to 1; default: 0 with --boxes, else as in SharpMaskAutomaticMaskGenerator",
    )
    parser.add_argument(
        "--non-overlapping", action="store_true", help="each pixel belongs to its best mask only; not with --boxes"
    )
    add_dtype_option(parser)
    add_threads_option(parser)
    add_shard_option(parser)
    add_console_options(parser)
    add_model_options(parser, default=DEFAULT)
    args = parser.parse_intermixed_args(argv)
    for option in ("input", "non_overlapping", "shard"):
        if args.boxes and getattr(args, option):
            parser.error(f"--boxes cannot be combined with --{option.replace('_', '-')}")
    if not args.boxes and bool(args.input) == bool(args.annotations):
        parser.error("give one of --input, --annotations and --boxes")
    if (args.boxes or args.annotations) and not args.image_root:
        parser.error(f"{'--boxes' if args.boxes else '--annotations'} needs --image-root")
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask segment`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status: 1 if an image failed, else 0.
    """
    args = vars(_parse_args(argv))
    set_threads(args.pop("threads"))
    with console_of(args):
        if args["boxes"]:
            del args["input"], args["non_overlapping"], args["shard"]
            return segment_boxes(**args)
        del args["boxes"]
        return segment_images(**args)
