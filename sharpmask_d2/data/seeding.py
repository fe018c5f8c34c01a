"""Seeds random numbers by their purpose, so that they do not depend on random numbers drawn before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Purposes of random numbers, which are mixed with the seed, the rank and a running number: the steps of a training, the samples of a
# loader, and the order of its samples.
STEPS, SAMPLES, SAMPLER = range(3)


def mix_seeds(*numbers: int) -> tuple[int, np.ndarray, int]:
    """Seeds for torch, numpy and Python that differ where the numbers differ.

    Args:
        numbers: non-negative, such as the training's seed, the rank and the iteration; equally many for every call of one purpose.

    Returns:
        for_torch: a whole number.
        for_numpy: (3,) uint32.
        for_python: a whole number.
    """
    # numpy hashes the numbers. With a sum, seed 1 at iteration 2 would equal seed 2 at iteration 1.
    words = np.random.SeedSequence(numbers).generate_state(7)
    joined = [int(high) << 32 | int(low) for high, low in (words[:2], words[2:4])]
    return joined[0], words[4:], joined[1]


def seed_all(*numbers: int) -> None:
    """Seed torch on all devices, numpy and Python with the seeds of `mix_seeds`."""
    for_torch, for_numpy, for_python = mix_seeds(*numbers)
    torch.manual_seed(for_torch)
    np.random.seed(for_numpy)  # noqa: NPY002  (Detectron2's transforms draw from it)
    random.seed(for_python)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Context manager in which random numbers on the CPU depend on `numbers` alone. The former states are restored afterwards.

    Args:
        numbers: see `mix_seeds`.
    """
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for_torch, for_numpy, for_python = mix_seeds(*numbers)
    # torch.manual_seed would also seed CUDA.
    torch.default_generator.manual_seed(for_torch)
    np.random.seed(for_numpy)  # noqa: NPY002  (Detectron2's transforms draw from it)
    random.seed(for_python)
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        random.setstate(state[2])
