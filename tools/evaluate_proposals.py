#!/usr/bin/env python
"""Recall of class-agnostic proposals: AR at 10, 100 and 1000, AUC, by object size and by IoU, of masks and boxes."""

import argparse

from sharpmask_d2.evaluation.proposal_evaluation import evaluate_proposal_json, format_table, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", required=True, help="COCO annotation file")
    parser.add_argument("--proposals", required=True, help="COCO result file; without segmentations only boxes count")
    parser.add_argument("--output", help="write the figures to this JSON file; null where no object counts")
    args = parser.parse_args()
    try:
        metrics = evaluate_proposal_json(args.annotations, args.proposals)
        print(format_table(metrics))
        if args.output:
            write_json(metrics, args.output)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
