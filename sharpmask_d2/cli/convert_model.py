"""Converts a published DeepMask or SharpMask model (.t7) into a checkpoint and its config.

    sharpmask convert-model model.t7 --output sharpmask.pth
    sharpmask propose --config-file sharpmask.yaml --input photographs/ --output proposals.json --visualize pictures/

The config that runs the model is written beside the checkpoint. Nothing in the .t7 file is executed.
"""

from collections.abc import Sequence
from typing import Optional

from ..io.outputs import check_outputs
from ..torch7.conversion import config_path, convert_torch7, save_torch7_model
from .command import make_parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask convert-model`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status, 0.
    """
    parser = make_parser("convert-model", __doc__)
    parser.add_argument("model", metavar="MODEL.T7", help="model.t7 of the released code")
    parser.add_argument(
        "--output", required=True, metavar="MODEL.PTH", help="checkpoint to write; its config gets the suffix .yaml"
    )
    args = parser.parse_args(argv)
    check_outputs({"--output": args.output, "its config": config_path(args.output)}, inputs=[args.model])
    model = convert_torch7(args.model)
    config = save_torch7_model(model, args.output)
    print(f"wrote {len(model.state)} parameters: {args.output}")
    print(f"wrote the config of the model: {config}")
    return 0
