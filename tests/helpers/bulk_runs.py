"""Bulk runs that are slow enough to be killed in the middle. The processes of Ray import this module."""

import os
import time
from pathlib import Path

import sharpmask_d2.bulk.ray as bulk
from sharpmask_d2.console import console

# Seconds that each image takes longer.
WAIT = 0.25


def prepare_slowly(threads: int, *, cfg, dtype: str):
    """As `prepare_proposals`; leaves a file with the number of the process beside the config's output folder."""
    processes = Path(f"{cfg.OUTPUT_DIR}.processes")
    processes.mkdir(parents=True, exist_ok=True)
    work = _PREPARE(threads, cfg=cfg, dtype=dtype)
    (processes / str(os.getpid())).touch()

    def work_slowly(pixels):
        time.sleep(WAIT)
        return work(pixels)

    return work_slowly


_PREPARE = bulk.prepare_proposals


def run_slowly(**options) -> int:
    """`compute_in_bulk` with two actors, whose images take longer."""
    bulk.prepare_proposals = prepare_slowly
    try:
        with console(quiet=True):
            return bulk.compute_in_bulk(**options, actors=(2, 2), images_per_file=2)
    finally:
        bulk.prepare_proposals = _PREPARE
