#!/usr/bin/env python
"""Detect objects: SharpMask proposals, classified; pictures with masks, boxes, class names and scores, and detections.json.

    tools/demo.py --input photographs/ --output detections/

Folders are searched with their sub-folders, without hidden files. An image that cannot be done is named, left out, and makes the exit
status 1. A run that was stopped goes on where it was, with the same settings; images that were added, replaced or removed meanwhile concern
no other.
"""

import argparse
import os

# Read when torch is loaded; see docs/performance.md, "Shared machines".
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from sharpmask_d2.cli.command import add_threads_option, run, set_threads
from sharpmask_d2.data import add_dataset_option, register_datasets
from sharpmask_d2.inference.detect import DEFAULT_DETECTOR, detect


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE_OR_DIR", help="images, or folders of images")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for detections.json and the pictures")
    parser.add_argument("--model", default=DEFAULT_DETECTOR, help="a packaged detector; default %(default)s")
    parser.add_argument("--config-file", help="a config instead of a packaged detector")
    parser.add_argument("--weights", help="a checkpoint instead of the config's MODEL.WEIGHTS")
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, help="pictures show what reaches it; default %(default)s"
    )
    add_threads_option(parser)
    add_dataset_option(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the config")
    return parser.parse_intermixed_args()


def main() -> int:
    args = vars(parse_args())
    set_threads(args.pop("threads"))
    register_datasets(args.pop("dataset"))
    return detect(**args)


if __name__ == "__main__":
    run(main)
