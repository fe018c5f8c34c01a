#!/usr/bin/env python
"""Convert a published DeepMask or SharpMask (model.t7) to a checkpoint, and write the config that runs it beside it.

    tools/convert_torch7.py model.t7 --output sharpmask.pth
    tools/compute_proposals.py --config-file sharpmask.yaml --input photographs/ --output proposals.json --visualize pictures/

Nothing in the file is executed.
"""

import argparse

from sharpmask_d2.cli.command import run
from sharpmask_d2.io.outputs import check_outputs
from sharpmask_d2.torch7.conversion import config_path, convert_torch7, save_torch7_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model.t7 of the released code")
    parser.add_argument(
        "--output", required=True, metavar="MODEL.PTH", help="checkpoint; the config gets the suffix .yaml"
    )
    args = parser.parse_args()
    check_outputs({"--output": args.output, "its config": config_path(args.output)}, inputs=[args.model])
    model = convert_torch7(args.model)
    config = save_torch7_model(model, args.output)
    print(f"wrote {len(model.state)} parameters: {args.output}")
    print(f"wrote the config that runs them: {config}")


if __name__ == "__main__":
    run(main)
