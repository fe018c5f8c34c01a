#!/usr/bin/env python
"""Segment proposals of images, as COCO result JSON.

    tools/compute_proposals.py --input photographs/ --output proposals.json --visualize pictures/
    tools/compute_proposals.py --annotations instances.json --image-root images/ --output proposals.json

Images given by --input are numbered from 1 in the order of their names, and every result also has the file_name. Folders are searched
with their sub-folders, without hidden files. An image that cannot be done is named, left out, and makes the exit status 1. A run that was
stopped goes on where it was, with the same settings; images that were added, replaced or removed meanwhile concern no other.
"""

import argparse
import os

# Read when torch is loaded; see docs/performance.md, "Shared machines".
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from sharpmask_d2.cli.command import add_threads_option, positive, run, set_threads
from sharpmask_d2.inference.preparation import DTYPES
from sharpmask_d2.inference.propose import DEFAULT, compute_proposals


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE_OR_DIR", help="images, or folders of images")
    source.add_argument("--annotations", help="a COCO JSON that lists the images")
    parser.add_argument("--image-root", help="folder of the images that --annotations lists")
    parser.add_argument("--output", required=True, help="JSON to write")
    parser.add_argument("--model", default=DEFAULT, help="a packaged model; default %(default)s")
    parser.add_argument("--config-file", help="a config instead of a packaged model")
    parser.add_argument("--weights", help="a checkpoint instead of the config's MODEL.WEIGHTS")
    parser.add_argument("--num-proposals", type=positive, help="most proposals of an image")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the network; default %(default)s")
    parser.add_argument(
        "--compile",
        action="store_true",
        dest="compiled",
        help="compile the trunk, for images of one size; gains nothing on some processors",
    )
    parser.add_argument("--visualize", metavar="DIR", help="write pictures of the best proposals there")
    parser.add_argument("--pkl", metavar="FILE", help="also write Detectron2's precomputed-proposal pickle")
    parser.add_argument("--pkl-masks", action="store_true", help="with masks in it, for detections that keep them")
    add_threads_option(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the config")
    args = parser.parse_intermixed_args()
    if args.annotations and not args.image_root:
        parser.error("--annotations needs --image-root")
    return args


def main() -> int:
    args = vars(parse_args())
    set_threads(args.pop("threads"))
    return compute_proposals(**args)


if __name__ == "__main__":
    run(main)
