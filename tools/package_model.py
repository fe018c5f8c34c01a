#!/usr/bin/env python
"""Pack a checkpoint, or several of models that share their feed-forward path, into one file in half precision, as the model zoo holds them.

    tools/package_model.py output/deepmask_lite0/model_final.pth output/sharpmask_lite0/model_final.pth \
        --output sharpmask_d2/model_zoo/lite0.pth
"""

import argparse
from pathlib import Path

from sharpmask_d2.checkpoint import pack, read_checkpoint, save_packed
from sharpmask_d2.cli.command import run
from sharpmask_d2.io.outputs import check_outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="checkpoints of tools/train_net.py")
    parser.add_argument("--output", required=True, help="file to write")
    args = parser.parse_args()
    check_outputs({"--output": args.output}, inputs=args.checkpoints)
    packed = pack([read_checkpoint(path)["model"] for path in args.checkpoints])
    save_packed(packed, args.output)
    print(f"wrote {len(packed)} parameters, {Path(args.output).stat().st_size / 1e6:.1f} MB: {args.output}")


if __name__ == "__main__":
    run(main)
