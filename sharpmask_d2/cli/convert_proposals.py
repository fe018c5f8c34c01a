"""Converts published proposals (.json, .t7) into COCO result JSON.

    sharpmask convert-proposals --input chunks/ --output proposals.json --pkl proposals.pkl
    sharpmask convert-proposals --input val.t7 --annotations instances.json --output proposals.json

The inputs are the published proposals of DeepMask, SharpMask and MultiPath: JSON chunks (props-1-500.json ...) or .t7 files. A run that
was stopped resumes when it is started again with the same settings.
"""

from collections.abc import Sequence
from typing import Optional

from ..torch7.published_proposals import convert_proposals
from .command import add_pkl_options, make_parser, positive


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask convert-proposals`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status, 0.
    """
    parser = make_parser("convert-proposals", __doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE_OR_DIR", help=".json and .t7 files, or folders of them"
    )
    parser.add_argument("--output", required=True, metavar="JSON", help="COCO result file to write")
    add_pkl_options(parser)
    parser.add_argument(
        "--annotations", metavar="JSON", help="COCO annotation file with the ids of the images that .t7 files name"
    )
    parser.add_argument(
        "--num-proposals",
        type=positive,
        metavar="N",
        help="maximum number of proposals per image, those of highest score; default: all",
    )
    convert_proposals(**vars(parser.parse_args(argv)))
    return 0
