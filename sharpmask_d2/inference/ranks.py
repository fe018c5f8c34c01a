"""Divides a run over the processes that torchrun starts: each rank works on one shard, and the rank that ends last merges them."""

import os
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from ..io.outputs import PARTIAL, OutputError, open_locked
from ..io.shards import LIST, Shard, merge_shards

# What torchrun sets in the environment of each process.
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


class Merged(NamedTuple):
    """What the rank that ends last has written: see `merge_shards`."""

    num_images: int
    num_results: int
    failed: list[str]


def shard_of_rank() -> Optional[Shard]:
    """The shard of this process; None if torchrun has not started it, or has started no other."""
    if not all(name in os.environ for name in _VARIABLES) or int(os.environ["WORLD_SIZE"]) == 1:
        return None
    return Shard(int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"]))


def is_first_rank() -> bool:
    """Whether this process is the first one of torchrun, or the only one."""
    shard = shard_of_rank()
    return shard is None or shard.number == 1


def shard_path(output: Union[str, Path], shard: Shard) -> Path:
    """The result file of a rank, beside the output of the run."""
    output = Path(output)
    return output.with_name(f"{output.name}.{shard.number}-of-{shard.count}")


def merge_ranks(output: Union[str, Path], count: int, **options: Any) -> Optional[Merged]:
    """Merge the shards of all ranks into the output if all of them are done, and remove their files.

    Partial files stay if an image failed, so that a run after the images were repaired processes only those.

    Args:
        output: path of the file to write.
        count: number of ranks.
        options: of `merge_shards`.

    Returns:
        None if another rank is still at work, or merges.

    Raises:
        UserError, OutputError: see `merge_shards`; the shards stay.
    """
    paths = [shard_path(output, Shard(number, count)) for number in range(1, count + 1)]
    lists = [path.with_name(path.name + LIST) for path in paths]
    lock = Path(output).with_name(Path(output).name + ".merging")
    try:
        file = open_locked(lock)
    except OutputError:
        return None
    with file:
        try:
            # A rank that held the lock has removed the lists.
            if not all(path.exists() for path in lists):
                return None
            merged = Merged(*merge_shards(paths, output, **options))
            # Lists first: a shard without its list is not merged again.
            for path in [*lists, *paths]:
                path.unlink()
            if not merged.failed:
                for path in paths:
                    path.with_name(path.name + PARTIAL).unlink(missing_ok=True)
            return merged
        finally:
            lock.unlink(missing_ok=True)
