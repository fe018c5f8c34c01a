#!/usr/bin/env python
"""What the masks of proposals are like, and why objects are missed: straight edges, repetition, the worth of a perfect order.

tools/analyze_proposals.py --annotations instances.json --proposals proposals.json
"""

import argparse

from sharpmask_d2.evaluation.proposal_analysis import analyze
from sharpmask_d2.evaluation.proposal_evaluation import load_annotations, write_json
from sharpmask_d2.evaluation.proposed_image import images_of_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True, help="COCO annotation file")
    parser.add_argument("--proposals", required=True, help="COCO result file with segmentations")
    parser.add_argument("--output", help="write the tables to this JSON file; null where there was nothing to count")
    args = parser.parse_args()
    try:
        tables = analyze(images_of_results(load_annotations(args.annotations), args.proposals))
        print("\n\n".join(table.text() for table in tables))
        if args.output:
            write_json({table.name: table.records() for table in tables}, args.output)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
