"""Runs code in two processes that are connected as torchrun connects them."""

import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from drawing import ROOT
from sharpmask_d2.engine import join_processes


def torchrun(*arguments) -> subprocess.CompletedProcess:
    """Runs `torchrun --nproc_per_node 2 ...`; what the processes print comes back together."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=240,
    )


def torchrun_environment(rank: int, port: int) -> dict:
    """The environment variables that torchrun sets in the first or second of two processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def in_two_processes(work: Callable, *arguments: Any, folder) -> list:
    """What `work(rank, *arguments)` returns in each of two connected processes. They are forked, which saves the time of importing.

    Args:
        work: a function.
        arguments: of the function.
        folder: a Path, where the results are stored.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(rank, port, folder, work, arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in (0, 1)]


def _work(rank: int, port: int, folder, work: Callable, arguments: tuple) -> None:
    try:
        os.environ.update(torchrun_environment(rank, port))
        join_processes("cpu")
        torch.save(work(rank, *arguments), folder / f"{rank}.pth")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # At once, as a process that dies: a process with an error could wait for the other one when it ends its connections.
    os._exit(0)
