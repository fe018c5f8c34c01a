#!/usr/bin/env python
"""Recall of class-agnostic proposals: AR at 10, 100 and 1000, AUC, by object size and by IoU, of masks and boxes."""

import argparse
import logging
from pathlib import Path

from sharpmask_d2.cli.command import run
from sharpmask_d2.data.failed_images import FailedImages
from sharpmask_d2.evaluation.proposal_evaluation import (
    evaluate_proposal_json,
    format_table,
    load_annotations,
    load_json,
    write_json,
)
from sharpmask_d2.io.outputs import check_outputs
from sharpmask_d2.visualization import write_extremes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", required=True, help="COCO annotation file")
    parser.add_argument("--proposals", required=True, help="COCO result file; without segmentations only boxes count")
    parser.add_argument("--output", help="write the figures to this JSON file; null where no object counts")
    parser.add_argument("--pictures", help="folder for pictures of the best and the worst images; needs --image-root")
    parser.add_argument("--image-root", help="folder of the images")
    args = parser.parse_args()
    if args.pictures and not args.image_root:
        parser.error("--pictures needs --image-root")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    coco = load_annotations(args.annotations)
    check_outputs(
        {"--output": args.output},
        inputs=[args.annotations, args.proposals],
        folders={"--pictures": args.pictures},
        images=[Path(args.image_root) / i["file_name"] for i in coco.imgs.values()] if args.pictures else [],
    )
    metrics = evaluate_proposal_json(coco, args.proposals)
    print(format_table(metrics))
    if args.output:
        write_json(metrics, args.output)
    if not args.pictures:
        return 0
    failed = FailedImages()
    results = load_json(args.proposals)
    print("\n".join(write_extremes(coco, results, args.image_root, args.pictures, failed=failed)))
    return failed.status()


if __name__ == "__main__":
    run(main)
