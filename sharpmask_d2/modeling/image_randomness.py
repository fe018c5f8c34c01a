"""Random numbers of single images in training, which do not depend on how many processes share a batch."""

import torch
from detectron2.utils import comm
from torch import distributed

from ..data.seeding import mix_seeds


def image_seeds(count: int, device: torch.device) -> list[int]:
    """Draws a seed for each image of this process' part of a batch, with the random numbers of torch in the first process.

    All processes have to call it equally often.

    Args:
        count: number of images of this process; of W processes, each has every W-th image of the batch (see `data.resumable`).
        device: of the model, over which the processes are connected.

    Returns:
        `count` seeds.
    """
    drawn = torch.randint(2**62, (1,))
    rank, world = comm.get_rank(), comm.get_world_size()
    if world > 1:
        drawn = drawn.to(device)
        distributed.broadcast(drawn, 0)
    step = drawn.item()
    return [mix_seeds(step, rank + world * i)[0] for i in range(count)]


def image_generators(count: int, device: torch.device) -> list[torch.Generator]:
    """Makes a source of random numbers on `device` for each image of this process' part of a batch: see `image_seeds`."""
    return [torch.Generator(device).manual_seed(seed) for seed in image_seeds(count, device)]
