"""Packs checkpoints into one file in half precision, as the model zoo has them.

    sharpmask package-model output/deepmask_lite0/model_final.pth output/sharpmask_lite0/model_final.pth --output lite0.pth

Several checkpoints are packed into one file if the parameters that they have in common are equal, such as those of a DeepMask and of the
SharpMask that was trained on it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from ..checkpoint import pack, read_checkpoint, save_packed
from ..io.outputs import check_outputs
from .command import make_parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask package-model`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status, 0.
    """
    parser = make_parser("package-model", __doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoints that training has written")
    parser.add_argument("--output", required=True, metavar="PTH", help="file to write")
    args = parser.parse_args(argv)
    check_outputs({"--output": args.output}, inputs=args.checkpoints)
    packed = pack([read_checkpoint(path)["model"] for path in args.checkpoints])
    save_packed(packed, args.output)
    print(f"wrote {len(packed)} parameters, {Path(args.output).stat().st_size / 1e6:.1f} MB: {args.output}")
    return 0
