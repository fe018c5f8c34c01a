"""Prints what the masks of proposals are like, and why objects are missed.

    sharpmask analyze --annotations instances.json --proposals proposals.json
    sharpmask analyze --annotations instances.json --image-root images/ --config-file model.yaml --weights model.pth

For a file of proposals it prints the share of masks with straight edges, the share of repeated masks, and the recall that a perfect order
of the proposals would have. With --image-root it computes the proposals of a model itself. As their windows are then known, it also
prints whether the window, the mask or the rank is the cause when an object is missed, and, for a model that decodes the mask of any
window, the IoU of its masks given the true boxes, and given one click on each object.
"""

import argparse
from collections.abc import Sequence
from typing import Any, Optional

from ..console import print_result
from ..data.coco import load_annotations
from ..evaluation.analysis import analyze, images_of_model, images_of_results, window_rule
from ..evaluation.proposal_evaluation import without_nan, write_json
from ..inference.caching import keep_between_images
from ..inference.configuration import build_config
from ..inference.given_boxes import box_decoder, click_decoder
from ..inference.predictor import ProposalPredictor
from ..model_zoo import DEFAULT
from .command import add_console_options, add_dtype_option, add_model_options, console_of, make_parser


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser("analyze", __doc__)
    parser.add_argument("--annotations", required=True, metavar="JSON", help="COCO annotation file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--proposals", metavar="JSON", help="COCO result file with segmentations")
    source.add_argument("--image-root", metavar="DIR", help="folder of the images, for which a model makes proposals")
    parser.add_argument(
        "--output", metavar="JSON", help="file to write the tables to; a figure without any object is null"
    )
    add_console_options(parser)
    add_dtype_option(parser)
    add_model_options(parser, default=DEFAULT)
    return parser.parse_intermixed_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask analyze`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status, 0.
    """
    args = vars(_parse_args(argv))
    with console_of(args):
        analyze_proposals(**args)
    return 0


def analyze_proposals(
    *,
    annotations: str,
    proposals: Optional[str] = None,
    image_root: Optional[str] = None,
    output: Optional[str] = None,
    dtype: str = "float32",
    **config: Any,
) -> None:
    """Prints the tables of all analyses that the proposals allow.

    Args:
        annotations: COCO annotation file.
        proposals: COCO result file; None lets a model make the proposals of the images in `image_root`.
        image_root: folder of the images; read only without `proposals`.
        output: JSON file to write the tables to; None writes none.
        dtype: see `ProposalPredictor`.
        config: see `build_config`; read only without `proposals`.

    Raises:
        OSError: a file does not exist or cannot be read.
        UserError: a file has another format; the message names it.
    """
    coco = load_annotations(annotations)
    if proposals is not None:
        tables = analyze(images_of_results(coco, proposals))
    elif image_root is not None:
        keep_between_images()
        cfg = build_config(**config)
        predictor = ProposalPredictor(cfg, dtype=dtype)
        decode, click = box_decoder(predictor), click_decoder(predictor)
        images = images_of_model(coco, image_root, predictor, decode, click)
        rule = window_rule(cfg, predictor.model)
        tables = analyze(images, rule=rule, given_boxes=decode is not None, given_clicks=click is not None)
    else:
        raise TypeError("analyze_proposals() needs proposals or image_root")
    content = {table.name: table.records() for table in tables}
    print_result("\n\n".join(table.text() for table in tables), without_nan(content))
    if output:
        write_json(content, output)
