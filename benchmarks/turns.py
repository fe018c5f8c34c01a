"""Interleaved measurements, A B A B, so that other work on the machine affects all of them."""

import time

import torch

from .limits import best_rates


def in_turn(runs: list, dtypes: list, *, device: torch.device, repeat: int) -> dict:
    """Call all runs once to warm up, then `repeat` times.

    Args:
        runs: what to call.
        dtypes: names of those in which they compute.
        device: where.
        repeat: how often.

    Returns:
        dtype -> the best rates of the machine, measured before and after the runs (see `best_rates`).
    """
    before = {dtype: best_rates(device, getattr(torch, dtype)) for dtype in dtypes}
    for _ in range(repeat + 1):
        for run in runs:
            run()
    after = {dtype: best_rates(device, getattr(torch, dtype)) for dtype in dtypes}
    return {
        dtype: {name: max(rate, after[dtype][name]) for name, rate in rates.items()} for dtype, rates in before.items()
    }


def clock(device: torch.device) -> float:
    """The time in seconds, once the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
