"""Prints the average recall (AR) of proposals on an annotated dataset.

    sharpmask evaluate --annotations instances.json --proposals proposals.json
    sharpmask evaluate --annotations instances.json --proposals masks_of_segment.json --precision

It prints the AR of masks and of boxes at 10, 100 and 1000 proposals per image, its area under the curve (AUC), and the recall by object
size and by IoU. Classes are ignored. Results without a segmentation are evaluated as boxes only. --precision adds the precision and the
recall of all results at the IoUs 0.5 and 0.75: how many of the results are objects, and how many of the objects are found.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from ..console import print_result, print_status
from ..data.coco import load_annotations, load_json
from ..data.failed_images import FailedImages
from ..evaluation.proposal_evaluation import evaluate_proposal_json, format_table, without_nan, write_json
from ..io.outputs import check_outputs
from ..visualization import write_extremes
from .command import add_console_options, console_of, make_parser


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser("evaluate", __doc__)
    parser.add_argument("--annotations", required=True, metavar="JSON", help="COCO annotation file")
    parser.add_argument("--proposals", required=True, metavar="JSON", help="COCO result file")
    parser.add_argument(
        "--precision",
        action="store_true",
        help="print the precision of the results, too, for results that were selected, such as those of `sharpmask segment`",
    )
    parser.add_argument(
        "--output", metavar="JSON", help="file to write the metrics to; a metric without any object is null"
    )
    parser.add_argument(
        "--pictures", metavar="DIR", help="folder for pictures of the best and the worst images; needs --image-root"
    )
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images")
    add_console_options(parser)
    args = parser.parse_args(argv)
    if args.pictures and not args.image_root:
        parser.error("--pictures needs --image-root")
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask evaluate`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status: 1 if a picture could not be drawn, else 0.
    """
    args = _parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with console_of(vars(args)):
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    coco = load_annotations(args.annotations)
    check_outputs(
        {"--output": args.output},
        inputs=[args.annotations, args.proposals],
        folders={"--pictures": args.pictures},
        images=[Path(args.image_root) / image["file_name"] for image in coco.imgs.values()] if args.pictures else [],
    )
    metrics = evaluate_proposal_json(coco, args.proposals, precision=args.precision)
    print_result(format_table(metrics), without_nan(metrics))
    if args.output:
        write_json(metrics, args.output)
    if not args.pictures:
        return 0
    failed = FailedImages()
    results = load_json(args.proposals)
    for path in write_extremes(coco, results, args.image_root, args.pictures, failed=failed):
        print_status(path)
    return failed.status()
