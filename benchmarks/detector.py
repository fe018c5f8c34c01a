"""Measures the time and memory of a detector, for an image and for a training step."""

import statistics
from typing import Optional

import torch
from detectron2.config import CfgNode
from sharpmask_d2.checkpoint import StrictCheckpointer
from sharpmask_d2.engine.trainer import Trainer, makes_proposals
from sharpmask_d2.inference.preparation import autocast

from .drawing import draw_image, draw_objects, draw_proposals
from .memory import forget_peak, peak_megabytes
from .training import training_step
from .turns import clock


def time_detector(
    cfg: CfgNode, *, weights: Optional[str], image_size: tuple, num_proposals: Optional[int], dtype: str, repeat: int
) -> dict:
    """Medians of seconds, and peak memory of the process, for a drawn image and for a training step.

    Args:
        cfg: of the detector.
        weights: checkpoint; without it, random weights, whatever the config says.
        image_size: (height, width) in pixels.
        num_proposals: precomputed ones at test, if the detector reads them; None: as the config says.
        dtype: see `inference.preparation.autocast`.
        repeat: timed runs, after one that is not.
    """
    model = Trainer.build_model(cfg)
    if weights:
        StrictCheckpointer(model).load(weights)
    inputs, size = {"image": draw_image(*image_size)}, tuple(image_size)
    if cfg.MODEL.LOAD_PROPOSALS:
        count = num_proposals or cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
        inputs["proposals"] = draw_proposals(count, size)
    model.eval()
    forget_peak(model.device)
    seconds = [_inference(model, inputs, dtype) for _ in range(repeat + 1)]
    figures = {
        "seconds per image": statistics.median(seconds[1:]),
        "peak memory of an image (MB)": peak_megabytes(model.device),
    }
    if makes_proposals(cfg):
        # What is timed need not be good.
        model.proposal_generator.has_weights = True
    model.train()
    optimizer = Trainer.build_optimizer(cfg, model)
    objects = draw_objects(8, size, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    batch = [{**inputs, "instances": objects} for _ in range(cfg.SOLVER.IMS_PER_BATCH)]
    if cfg.MODEL.LOAD_PROPOSALS:
        for item in batch:
            item["proposals"] = draw_proposals(cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN, size)
    forget_peak(model.device)
    seconds = [training_step(model, optimizer, batch, dtype) for _ in range(repeat + 1)]
    return {
        **figures,
        "seconds per training step": statistics.median(seconds[1:]),
        "images per training step": len(batch),
        "peak memory of training (MB)": peak_megabytes(model.device),
    }


@torch.no_grad()
def _inference(model: torch.nn.Module, inputs: dict, dtype: str) -> float:
    started = clock(model.device)
    with autocast(model.device, dtype):
        model([inputs])
    return clock(model.device) - started
