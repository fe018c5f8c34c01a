"""The processes of a training: those that torchrun has started, or those that Detectron2 starts, one per GPU."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Union

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch import distributed

from ..errors import UserError


def started_by_torchrun() -> bool:
    """Whether the environment says that this process is one of several, as torchrun sets it."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def join_processes(device: Union[str, torch.device]) -> None:
    """Connects this process with the others that torchrun has started: through NCCL on GPUs, and through gloo on CPUs.

    It does nothing in a process that torchrun has not started, and in one that is connected.

    Args:
        device: of the model, such as "cuda" or "cpu". On "cuda", the process number n of a machine uses GPU number n.

    Raises:
        UserError: the machine has fewer GPUs than processes, or machines have different numbers of processes.
    """
    if not started_by_torchrun() or distributed.is_initialized():
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        if local_size > torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc_per_node is {local_size}, but torch finds {torch.cuda.device_count()} GPUs: start one process per "
                "GPU, or set MODEL.DEVICE cpu"
            )
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if world % local_size:
        raise UserError(
            f"torchrun has started {world} processes, {local_size} of them here: start equally many per machine"
        )
    # Detectron2's own launch, which torchrun replaces, sets this variable of Detectron2. All processes have to create all groups.
    for first in range(0, world, local_size):
        ranks = list(range(first, first + local_size))
        group = distributed.new_group(ranks)
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def check_joined() -> None:
    """Checks that a process that torchrun has started is connected with the others.

    Raises:
        UserError: it is not, so that each process would train a model of its own and write into the folder of the others.
    """
    if started_by_torchrun() and not distributed.is_initialized():
        raise UserError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, which are not connected: call "
            "sharpmask_d2.engine.join_processes(cfg.MODEL.DEVICE) at the start of the script"
        )


def run_processes(
    work: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    device: Union[str, torch.device],
    num_gpus: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
) -> None:
    """Runs a function in the processes that torchrun has started, this one being one of them, or in those that Detectron2 starts.

    Args:
        work: a function that can be pickled.
        arguments: of `work`.
        device: see `join_processes`.
        num_gpus, num_machines, machine_rank, dist_url: see Detectron2's `launch`; not used under torchrun.

    Raises:
        UserError: see `join_processes`; or torchrun and Detectron2 are both to start processes; or another process has ended.
    """
    if not started_by_torchrun():
        launch(work, num_gpus, num_machines, machine_rank, dist_url, args=tuple(arguments))
        return
    if num_gpus > 1 or num_machines > 1:
        raise UserError("torchrun starts the processes: leave out --num-gpus and --num-machines")
    join_processes(device)
    with _lost_connections_named():
        work(*arguments)
        comm.synchronize()
    distributed.destroy_process_group()


@contextmanager
def _lost_connections_named() -> Iterator[None]:
    """Context manager that says what it means when the connection to another process breaks."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no type of its own; its messages name its source files.
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            "another process of the training has ended: its own error says why, or it was killed, for example because memory ran out. "
            "--resume continues from the last checkpoint"
        ) from error
