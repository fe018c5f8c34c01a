"""Measures the time and memory of proposals: every model in a process of its own, so that none runs in memory that another left behind."""

import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from detectron2.config import CfgNode
from sharpmask_d2.inference.caching import keep_between_images
from sharpmask_d2.inference.predictor import ProposalPredictor, load_model, prepare_image
from sharpmask_d2.inference.preparation import autocast
from sharpmask_d2.modeling.layers import fold_batch_norm

from .limits import count_operations
from .memory import forget_peak, peak_megabytes
from .stages import STAGES, StageClock


class ProposalRun:
    """A model in one dtype, for one number of proposals and one batch size. It is timed run by run in a process of its own, which waits
    between runs and warms up before each."""

    def __init__(
        self,
        name: str,
        cfg: CfgNode,
        image: np.ndarray,
        *,
        num_proposals: int,
        dtype: str,
        compiled: bool,
        batch_size: int,
    ):
        """
        Args:
            name: for the figures.
            cfg: of a network that makes proposals alone, with weights or, where MODEL.WEIGHTS is empty, random ones.
            image: (H, W, 3) uint8, BGR; resized as the config says, which counts as making the pyramid.
            num_proposals: maximum number of proposals per image; 0: that of the config.
            dtype, compiled: see `ProposalPredictor`.
            batch_size: how often the image is in a batch.
        """
        self.name, self.dtype = f"{name}, compiled" if compiled else name, dtype
        self.batch_size = batch_size
        cfg = cfg.clone()
        cfg.defrost()
        if num_proposals:
            cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = num_proposals
        self._process = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_load, initargs=(cfg, image, dtype, compiled, batch_size)
        )
        self.peak = self._process.submit(_peak).result()
        self.laps, self.counts = [], []

    def __call__(self) -> None:
        seconds, count = self._process.submit(_lap).result()
        self.laps.append(seconds)
        self.counts.append(count)

    def close(self) -> None:
        """Let the process end."""
        self._process.shutdown()

    def figures(self, rates: dict) -> dict:
        """Figures of all runs except for the first, which warms up. To be called before `close`.

        Args:
            rates: operations per second, by what reached them (see `best_rates`).
        """
        # After the runs, whose memory it would leave in pieces.
        operations = self._process.submit(_operations).result()
        return {
            "model": self.name,
            "dtype": self.dtype,
            "batch": self.batch_size,
            "proposals": self.counts[-1],
            **summarize(self.laps[1:], self.batch_size, operations, rates),
            "peak MB": self.peak,
        }


def summarize(laps: list, batch_size: int, operations: int, rates: dict) -> dict:
    """Figures of an image from the laps of a batch.

    Args:
        laps: stage -> seconds of a batch, of each lap.
        batch_size: images of a batch.
        operations: floating-point operations of an image.
        rates: see `ProposalRun.figures`.

    Returns:
        medians by image, "images per second" of which without RLE, and "limit", the seconds that the operations take.
    """
    laps = [{stage: seconds / batch_size for stage, seconds in lap.items()} for lap in laps]
    seconds = [sum(lap.values()) for lap in laps]
    total, limit = statistics.median(seconds), operations / max(rates.values())
    return {
        "images per second": 1 / statistics.median(sum(lap.values()) - lap["RLE"] for lap in laps),
        "seconds": total,
        "fastest": min(seconds),
        "slowest": max(seconds),
        **{stage: statistics.median(lap.get(stage, 0.0) for lap in laps) for stage in (*STAGES, "RLE")},
        "GFLOP": operations / 1e9,
        "limit": limit,
        "times the limit": total / limit,
    }


class _Measured:
    """State of the process of a ProposalRun: the config, the image, the predictor, and the memory of the process after loading."""

    def __init__(self, cfg: CfgNode, image: np.ndarray, dtype: str, compiled: bool, batch_size: int):
        self.cfg, self.image, self.batch = cfg, image, [image] * batch_size
        torch.manual_seed(0)
        self.predictor = ProposalPredictor(cfg, dtype=dtype, compiled=compiled)
        self.device = self.predictor.model.device
        forget_peak(self.device)
        self.loaded = peak_megabytes(self.device)


def _load(*args) -> None:
    global _measured
    keep_between_images()
    _measured = _Measured(*args)


def _peak() -> float:
    """Peak memory that two batches need beside the loaded model, in MB."""
    for _ in range(2):
        _encode(_measured.predictor.of_batch(_measured.batch))
    # Linux counts pages in batches, so that nothing at all can look like less than that.
    return max(0.0, peak_megabytes(_measured.device) - _measured.loaded)


def _encode(outputs: list) -> None:
    for proposals in outputs:
        proposals.proposal_masks.rle()


@torch.no_grad()
def _operations() -> int:
    # The tracer sees neither into a compiled model nor into fused convolutions.
    torch.manual_seed(0)
    plain = fold_batch_norm(load_model(_measured.cfg).eval())
    predictor = _measured.predictor
    with autocast(_measured.device, predictor.dtype):
        return count_operations(plain, [prepare_image(_measured.image, predictor.resize, predictor.cfg)])


def _lap() -> tuple:
    """Seconds by stage, and the number of proposals, of a batch that follows another at once, so that the process is awake."""
    _encode(_measured.predictor.of_batch(_measured.batch))
    with StageClock(_measured.predictor.model) as clock:
        with clock.stage("windows"):
            outputs = _measured.predictor.of_batch(_measured.batch)
        with clock.stage("RLE"):
            _encode(outputs)
    return dict(clock.seconds), len(outputs[0])
