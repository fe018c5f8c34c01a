#!/usr/bin/env python
"""Published proposals of DeepMask, SharpMask and MultiPath as COCO result JSON and Detectron2's precomputed proposals.

    tools/convert_proposals.py --input chunks/ --output proposals.json --pkl proposals.pkl
    tools/convert_proposals.py --input val.t7 --annotations instances.json --output proposals.json

The inputs are JSON chunks (props-1-500.json ...) or .t7 files. A run that was stopped goes on where it was.
"""

import argparse

from sharpmask_d2.cli.command import positive, run
from sharpmask_d2.torch7.published_proposals import convert_proposals


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE_OR_DIR", help=".json and .t7 files, or folders"
    )
    parser.add_argument("--output", required=True, help="JSON to write")
    parser.add_argument("--pkl", metavar="FILE", help="also write Detectron2's precomputed-proposal pickle")
    parser.add_argument("--pkl-masks", action="store_true", help="with masks in it, for detections that keep them")
    parser.add_argument("--annotations", help="a COCO JSON with the ids of the images that .t7 files name")
    parser.add_argument("--num-proposals", type=positive, help="keep so many of an image, the best")
    return parser.parse_args()


def main() -> None:
    convert_proposals(**vars(parse_args()))


if __name__ == "__main__":
    run(main)
