"""Measures a run of `sharpmask propose` over photographs: the seconds of each stage, and those of the whole run."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from sharpmask_d2.inference import image_files, propose
from sharpmask_d2.inference.predictor import ProposalPredictor
from sharpmask_d2.io.proposal_files import ProposalWriter

from .stages import STAGES, StageClock

# In the order in which they run. "writing" encodes results as JSON and adds them to the partial file, "finish" writes the output from it.
RUN_STAGES = ("digest", "reading", *STAGES, "RLE", "writing", "finish")


def time_photographs(cfg: CfgNode, paths: Sequence[str], *, dtype: str, repeat: int) -> dict:
    """Measure runs over photographs, from the first image to the finished file. The model is loaded and warm.

    Args:
        cfg: of a network that makes proposals alone.
        paths: photographs, and folders of them.
        dtype: see `ProposalPredictor`.
        repeat: number of runs with and without timed stages, in turn.

    Returns:
        Medians by photograph: "model alone" (the predictor and RLE), "run" (a run without timed stages), "times the model", "images per
        second", the seconds of each stage, and their "sum". Stages in several threads overlap, so that the sum may exceed the run.
    """
    images = image_files.list_inputs(paths)
    predictor = ProposalPredictor(cfg, dtype=dtype)
    pixels = [image_files.read_image(image.path) for image in images]
    for image in pixels:
        predictor(image)
    models, runs, laps = [], [], []
    for _ in range(repeat):
        started = time.perf_counter()
        for image in pixels:
            predictor(image).proposal_masks.rle()
        models.append((time.perf_counter() - started) / len(images))
        runs.append(_run(images, predictor) / len(images))
        with StageClock(predictor.model, also=_parts_of_run()) as clock:
            _run(images, predictor, clock)
        laps.append({stage: seconds / len(images) for stage, seconds in clock.seconds.items()})
    model, run = statistics.median(models), statistics.median(runs)
    stages = {stage: statistics.median(lap.get(stage, 0.0) for lap in laps) for stage in RUN_STAGES}
    return {
        "photographs": len(images),
        "model alone": model,
        "run": run,
        "times the model": run / model,
        "images per second": 1 / run,
        **stages,
        "sum": sum(stages.values()),
    }


def _parts_of_run() -> list:
    """(stage, object, name of its function or method) of what a run does besides the network."""
    return [
        ("digest", image_files, "digest_file"),
        ("reading", image_files, "read_image"),
        ("RLE", propose, "to_results"),
        ("writing", ProposalWriter, "add"),
        ("finish", ProposalWriter, "finish"),
    ]


def _run(images: Sequence[image_files.InputImage], predictor, clock=None) -> float:
    """Seconds of a run over images."""

    def work(image, pixels):
        if clock is None:
            proposals = predictor(pixels)
        else:
            with clock.stage("windows"):
                proposals = predictor(pixels)
        return propose.to_results(proposals, image.image_id, **image.extra)

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with ProposalWriter(str(Path(folder) / "proposals.json"), {}) as writer:
            finished, failed = image_files.process_images(images, writer, work, desc="proposals")
            writer.finish(images=finished)
        seconds = time.perf_counter() - started
    if failed:
        raise RuntimeError("photographs failed, see above")
    return seconds
