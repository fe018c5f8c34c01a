"""Random numbers that depend on what they are drawn for, and not on what was drawn before."""

import random
from contextlib import contextmanager

import numpy as np
import torch

# What random numbers are drawn for, to be mixed with the seed, the rank and a running number: the steps of a training, the samples of a
# loader, the order of its samples.
STEPS, SAMPLES, SAMPLER = range(3)


def mix_seeds(*numbers: int) -> tuple:
    """Seeds for torch, numpy and Python, such that other numbers give other streams.

    Args:
        numbers: non-negative, such as the training's seed, the rank and the iteration; always as many for one purpose.

    Returns:
        a whole number, an array of uint32, and a whole number.
    """
    # numpy hashes them: sums would let seed 1 at iteration 2 draw what seed 2 draws at iteration 1.
    words = np.random.SeedSequence(numbers).generate_state(7)
    joined = [int(high) << 32 | int(low) for high, low in (words[:2], words[2:4])]
    return joined[0], words[4:], joined[1]


def seed_all(*numbers: int) -> None:
    """Seed torch on all devices, numpy and Python; see `mix_seeds`."""
    for_torch, for_numpy, for_python = mix_seeds(*numbers)
    torch.manual_seed(for_torch)
    np.random.seed(for_numpy)  # noqa: NPY002  (the one that Detectron2's transforms draw from)
    random.seed(for_python)


@contextmanager
def seeded(*numbers: int):
    """Inside, what is drawn on the CPU depends on the numbers alone; afterwards, all goes on as if nothing had been drawn."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for_torch, for_numpy, for_python = mix_seeds(*numbers)
    # Not torch.manual_seed, which seeds CUDA as well.
    torch.default_generator.manual_seed(for_torch)
    np.random.seed(for_numpy)  # noqa: NPY002  (the one that Detectron2's transforms draw from)
    random.seed(for_python)
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        random.setstate(state[2])
