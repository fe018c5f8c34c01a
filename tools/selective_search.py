#!/usr/bin/env python
"""Selective Search boxes of every image of a data set, as COCO result JSON: a baseline for box recall.

Source: Uijlings et al., "Selective Search for Object Recognition", IJCV 2013; `cv2.ximgproc.segmentation` of
opencv-contrib.
"""

import argparse
import os
import time

import cv2
from sharpmask_d2.cli.command import positive, run
from sharpmask_d2.data.coco import load_images
from sharpmask_d2.data.failed_images import FailedImages
from sharpmask_d2.data.images import read_image
from sharpmask_d2.errors import UserError
from sharpmask_d2.evaluation.proposal_evaluation import write_json
from sharpmask_d2.io.outputs import check_outputs


def selective_search(image, mode: str):
    """Boxes of one image, best first.

    Args:
        image: H x W x 3 uint8, BGR; used at its own size.
        mode: "fast" (one colour space, two similarity measures) or "quality" (more of both: slower, more boxes).

    Returns:
        D x 4 int32 boxes, XYWH in pixels, without repeats.
    """
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(image)
    if mode == "fast":
        search.switchToSelectiveSearchFast()
    else:
        search.switchToSelectiveSearchQuality()
    return search.process()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True, help="COCO annotation file; only its list of images is used")
    parser.add_argument("--image-root", required=True, help="folder of the images")
    parser.add_argument("--output", required=True, help="the COCO result JSON to write")
    parser.add_argument("--mode", choices=("fast", "quality"), default="fast")
    parser.add_argument("--num-proposals", type=positive, default=1000, help="at most this many boxes an image")
    parser.add_argument("--num-threads", type=int, default=1, help="threads of OpenCV")
    args = parser.parse_args()
    if not hasattr(cv2, "ximgproc"):
        raise UserError("This OpenCV has no cv2.ximgproc: install opencv-contrib-python-headless in place of it")
    cv2.setNumThreads(args.num_threads)

    images = load_images(args.annotations)
    paths = [os.path.join(args.image_root, record.file_name) for record in images]
    check_outputs({"--output": args.output}, inputs=[args.annotations], images=paths)
    results = []
    seconds = 0.0
    failed = FailedImages()
    for done, (record, path) in enumerate(zip(images, paths), start=1):
        boxes = []
        with failed.named(record.id, path):
            image = read_image(path)
            started = time.perf_counter()
            boxes = selective_search(image, args.mode)[: args.num_proposals]
            seconds += time.perf_counter() - started
        results.extend(
            {
                "image_id": record.id,
                "category_id": 1,
                "bbox": box.tolist(),
                # Selective Search gives an order only; the first box scores 1, the last possible one just above 0.
                "score": 1.0 - rank / args.num_proposals,
            }
            for rank, box in enumerate(boxes)
        )
        print(f"{done}/{len(images)} images, {seconds / done:.2f} s an image, {len(boxes)} boxes", flush=True)
    write_json(results, args.output)
    return failed.status()


if __name__ == "__main__":
    run(main)
