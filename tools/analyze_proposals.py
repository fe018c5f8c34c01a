#!/usr/bin/env python
"""What the masks of proposals are like, and why objects are missed.

    tools/analyze_proposals.py --annotations instances.json --proposals proposals.json
    tools/analyze_proposals.py --annotations instances.json --image-root images/ --config-file model.yaml --weights model.pth

Of a file of proposals it prints the shares of masks with straight edges and of repeated masks, and the worth of a perfect order. With
--image-root it computes the proposals of a model itself. As their windows are then known, it also prints whether the window, the mask or
the rank is to blame for an object that is missed, and, for a model that makes masks of any window, their IoU given the true boxes.
"""

import argparse

from sharpmask_d2.cli.analyze import analyze_proposals
from sharpmask_d2.inference.preparation import DTYPES
from sharpmask_d2.inference.propose import DEFAULT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True, help="COCO annotation file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--proposals", help="COCO result file with segmentations")
    source.add_argument("--image-root", help="folder of the images; a model makes the proposals")
    parser.add_argument("--output", help="write the tables to this JSON file; null where there was nothing to count")
    parser.add_argument("--model", default=DEFAULT, help="a packaged model; default %(default)s")
    parser.add_argument("--config-file", help="a config instead of a packaged model")
    parser.add_argument("--weights", help="a checkpoint instead of the config's MODEL.WEIGHTS")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the network; default %(default)s")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the config")
    args = parser.parse_intermixed_args()
    try:
        analyze_proposals(**vars(args))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
