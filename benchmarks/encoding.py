"""Measures the time of encoding masks of proposals and of comparing them with objects."""

import statistics
import time

import numpy as np
import torch
from pycocotools import mask as mask_utils
from sharpmask_d2.evaluation.recall import GroundTruth, RecallAccumulator
from sharpmask_d2.structures import WindowMasks

from .drawing import draw_objects, draw_proposals


def time_encoding(*, image_size: tuple, num_proposals: int, num_objects: int, repeat: int) -> dict:
    """Medians of seconds for an image's proposals: noisy round masks of 160 x 160 logits in windows of all sizes.

    Args:
        image_size: (height, width) in pixels.
        num_proposals, num_objects: of the image.
        repeat: timed runs, after one that is not.

    Returns:
        seconds by what they were spent on.
    """
    size = tuple(image_size)
    truth = draw_objects(num_objects, size, 1)
    rles = [mask_utils.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in truth.gt_masks.tensor]
    boxes, areas = truth.gt_boxes.tensor.double().numpy(), mask_utils.area(rles).astype(float)
    objects = {"masks": rles, "boxes": np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)}
    # Round masks in windows of all sizes, with some noise on their borders.
    side = 160
    steps = (torch.arange(side) + 0.5) / side - 0.5
    blob = 8 * (0.3 - (steps[:, None] ** 2 + steps**2).sqrt())
    logits = blob + 0.1 * torch.randn(num_proposals, side, side, generator=torch.Generator().manual_seed(0))
    windows = draw_proposals(num_proposals, size).proposal_boxes.tensor
    laps = {"runs and RLE": [], "masks against objects": [], "boxes against objects": []}
    for _ in range(repeat + 1):
        started = time.perf_counter()
        found = WindowMasks(logits, windows, size)
        masks = found.rle()
        laps["runs and RLE"].append(time.perf_counter() - started)
        corners = found.boxes().tensor.double().numpy()
        results = {"masks": masks, "boxes": np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)}
        for kind, regions in results.items():
            started = time.perf_counter()
            ground_truth = GroundTruth(objects[kind], areas=areas, is_crowd=np.zeros(len(areas), dtype=bool))
            RecallAccumulator(max_proposals=len(masks)).add(1, ground_truth, regions, np.arange(len(masks)))
            laps[f"{kind} against objects"].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in laps.items()}
