"""Exports a model as ONNX or OpenVINO graphs, which run without torch.

    sharpmask export-model --to onnx --output exported/
    sharpmask export-model --to openvino --int8 --calibrate photographs/ --output exported_int8/
    sharpmask propose --model-folder exported/ --input photographs/ --output proposals.json

The folder gets an encoder, which runs once per image, a decoder, which computes the masks of any windows, and model.json. Images may have
any size. A SharpMask on a feature pyramid can be exported, such as the default model.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from ..console import print_next, print_status
from ..export import FORMATS, export_model
from ..model_zoo import DEFAULT
from .command import add_console_options, add_model_options, console_of, make_parser


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser("export-model", __doc__)
    parser.add_argument("--to", default="onnx", choices=FORMATS, help="format of the graphs; default: %(default)s")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--int8", action="store_true", help="compute the encoder in int8, with --to openvino")
    parser.add_argument(
        "--calibrate",
        nargs="+",
        metavar="FILE_OR_DIR",
        help="some 50 photographs, or folders of them, on which --int8 measures the ranges of values; best those of training",
    )
    add_console_options(parser, as_json=False)
    add_model_options(parser, default=DEFAULT)
    return parser.parse_intermixed_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask export-model`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status, 0.
    """
    args = vars(_parse_args(argv))
    with console_of(args):
        exported = export_model(**args)
        folder = args["output"]
        print_status(f"exported {exported.name} in {exported.precision} to {exported.format}: {folder}")
        words = ["--input", "photographs/", "--output", "proposals.json"]
        print_next(["sharpmask", "propose", "--model-folder", folder, *words])
    return 0
