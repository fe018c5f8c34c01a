"""Measures how fast one worker of a data loader cuts patches."""

import time

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.data.datasets import load_coco_json
from sharpmask_d2.data import PatchMapper
from sharpmask_d2.data.loader import PatchBatches


def time_sampler(cfg: CfgNode, *, annotations: str, image_root: str, batches: int) -> dict:
    """Patches and images per second, in this process, which has one thread from then on.

    Args:
        cfg: of a network that learns from patches.
        annotations, image_root: a COCO JSON and the folder of its images.
        batches: timed ones, after one that is not.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    dicts = [d for d in load_coco_json(annotations, image_root) if d["annotations"]]
    mapper = PatchMapper(cfg, category_weights={})
    stream = iter(PatchBatches(dicts, mapper, total_batch_size=cfg.SOLVER.IMS_PER_BATCH, seed=max(cfg.SEED, 0)))
    next(stream)
    started = time.perf_counter()
    patches = sum(len(image["patches"]) for _ in range(batches) for image in next(stream))
    seconds = time.perf_counter() - started
    return {
        "patches per second": patches / seconds,
        "images per second": batches * cfg.SOLVER.IMS_PER_BATCH / seconds,
        "patches": patches,
        "seconds": seconds,
    }
