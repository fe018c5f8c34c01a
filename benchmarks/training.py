"""Measures the time of training steps."""

import statistics

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from sharpmask_d2.engine.trainer import Trainer
from sharpmask_d2.inference.preparation import autocast
from torch import nn

from .drawing import draw_image, draw_objects
from .limits import count_operations
from .turns import clock


def training_step(model: nn.Module, optimizer, batch: list, dtype: str) -> float:
    """Seconds of a step: losses, their gradients and the update."""
    started = clock(model.device)
    with EventStorage(), autocast(model.device, dtype):
        loss = sum(model(batch).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return clock(model.device) - started


class TrainingRun:
    """A config in one dtype, whose training step on one batch is timed run by run."""

    def __init__(self, name: str, cfg: CfgNode, dtype: str, image_size: tuple):
        """
        Args:
            name: for the figures.
            cfg: of a model that makes proposals alone.
            dtype: see `inference.preparation.autocast`.
            image_size: (height, width) of the drawn images.
        """
        self.name, self.dtype = name, dtype
        torch.manual_seed(0)
        self.model = Trainer.build_model(cfg).train()
        self.optimizer = Trainer.build_optimizer(cfg, self.model)
        image, objects = draw_image(*image_size), draw_objects(8, tuple(image_size), 80)
        self.batch = [{"image": image, "instances": objects} for _ in range(cfg.SOLVER.IMS_PER_BATCH)]
        self.patches = 0
        if mapper := getattr(self.model, "mapper", None):
            # Cut here, as cutting patches is the loader's work.
            self.batch = [
                mapper.cut_instances(image, objects, np.random.default_rng(i)) for i in range(len(self.batch))
            ]
            self.patches = sum(len(item["patches"]) for item in self.batch)
        # The backward pass has two products for each of the forward pass, where nothing is frozen.
        with EventStorage(), autocast(self.model.device, dtype):
            self.operations = 3 * count_operations(_Losses(self.model, self.batch), (torch.zeros(0),))
        self.laps = []

    def __call__(self) -> None:
        self.laps.append(training_step(self.model, self.optimizer, self.batch, self.dtype))

    def figures(self, rates: dict) -> dict:
        """Figures of all runs except for the first, which warms up.

        Args:
            rates: operations per second, by what reached them (see `best_rates`).
        """
        seconds = statistics.median(self.laps[1:])
        limit = self.operations / max(rates.values())
        return {
            "config": self.name,
            "dtype": self.dtype,
            "seconds per step": seconds,
            "fastest": min(self.laps[1:]),
            "slowest": max(self.laps[1:]),
            "images per second": len(self.batch) / seconds,
            "patches per second": self.patches / seconds if self.patches else None,
            "limit": limit,
            "times the limit": seconds / limit,
        }


class _Losses(nn.Module):
    """The sum of a batch's losses as a function of nothing, which is what fvcore can trace."""

    def __init__(self, model, batch: list):
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return sum(self.model(self.batch).values())
