"""Numbered streams of training batches: a training that is resumed at batch k reads the batches that it would have read.

All processes of a training share each batch: of W processes, the process of rank r has the images r, r + W, r + 2 W, ... of the batch. A
batch thus does not depend on W, and a training may be resumed with another number of processes.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Optional, Union

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ..errors import UserError
from .seeding import SAMPLER, SAMPLES, seeded


class BatchStream(IterableDataset):
    """An endless stream of this process' parts of batches, each a list of mapped images.

    Batch k depends only on the seed and on k: neither on the number of processes and workers nor on earlier random numbers.
    """

    def __init__(self, *, start: int = 0):
        """
        Args:
            start: number of the first batch; 0 by default.
        """
        self.start = start

    def plans(self) -> Iterable[Any]:
        """A plan of this process' part of each batch, from number 0 on. Plans are cheap, because every worker makes all of them."""
        raise NotImplementedError

    def make(self, plan: Any) -> list[dict]:
        """The part of a batch that a plan describes."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[dict]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.make, itertools.islice(self.plans(), self.start + first, None, step))


class MappedBatches(BatchStream):
    """A `BatchStream` of the batches that Detectron2's training loader makes of a dataset."""

    def __init__(
        self,
        dicts: list[dict],
        mapper: Callable[[dict], dict],
        *,
        sampler: Sampler,
        total_batch_size: int,
        group_by_shape: bool,
        seed: int,
        start: int = 0,
    ):
        """
        Args:
            dicts: Detectron2's dataset dicts.
            mapper: turns a dict into an input of the model; it may use the random numbers of torch, numpy and Python.
            sampler: yields numbers of dicts for all processes without end, the same numbers in every iteration and every process.
            total_batch_size: number of images per batch, over all processes.
            group_by_shape: put wide images and other images into separate batches.
            seed: of the mapper's random numbers.
            start: number of the first batch; 0 by default.
        """
        super().__init__(start=start)
        self.dicts, self.mapper, self.sampler = DatasetFromList(dicts, copy=False), mapper, sampler
        self.total_batch_size, self.seed = total_batch_size, seed
        self.share = share_of_batch()
        # Images of unknown size are all in the same group.
        wide = [group_by_shape and d.get("width", 0) > d.get("height", 0) for d in dicts]
        self.groups = np.array(wide, dtype=np.int64)

    def plans(self) -> Iterator[list[tuple[int, int]]]:
        """For each image of this process in each batch: (position in the sampler's stream, number of the dict)."""
        groups: tuple[list, list] = [], []
        for place, index in enumerate(self.sampler):
            group = groups[self.groups[index]]
            group.append((place, int(index)))
            if len(group) == self.total_batch_size:
                yield group[self.share]
                group.clear()

    def make(self, plan: list[tuple[int, int]]) -> list[dict]:
        return [self._map(*sample) for sample in plan]

    def _map(self, place: int, index: int) -> dict[str, Any]:
        # Other purposes have the rank in the second place; no process draws other numbers for a sample.
        with seeded(self.seed, 0, place, SAMPLES):
            return self.mapper(self.dicts[index])


class ResumableLoader:
    """Iterates over a `BatchStream` with worker processes.

    Attributes:
        start: number of the first batch; it may be changed before an iteration begins.
    """

    def __init__(self, batches: BatchStream, *, num_workers: int):
        """
        Args:
            batches: the stream.
            num_workers: number of processes that read and map images; 0 for this process itself.
        """
        self.batches, self.num_workers = batches, num_workers
        self.start = batches.start

    def __iter__(self) -> Iterator[list[dict]]:
        self.batches.start = self.start
        yield from single_threaded_loader(
            self.batches,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=None,
            # Its own generator: otherwise starting the workers would draw from torch's, and the first step of a resumed training would have
            # other dropout.
            generator=torch.Generator(),
        )


def single_threaded_loader(dataset: Union[Dataset, IterableDataset], **options: Any) -> DataLoader:
    """A loader whose workers use one thread each, so that they do not compete with the trainer for cores.

    Args:
        dataset: to load from.
        options: further arguments of DataLoader.
    """
    # Set here and not in the workers: a forked process that changes the number of OpenCV's threads waits for those of its parent forever.
    cv2.setNumThreads(0)
    return DataLoader(dataset, **options)


def share_of_batch() -> slice:
    """The images of a batch that belong to this process."""
    return slice(comm.get_rank(), None, comm.get_world_size())


def check_batch_size(total_batch_size: int) -> None:
    """Checks that all processes have equally many images of a batch.

    Args:
        total_batch_size: number of images per batch, over all processes.

    Raises:
        UserError: the number of processes does not divide the batch.
    """
    world = comm.get_world_size()
    if total_batch_size % world:
        raise UserError(f"SOLVER.IMS_PER_BATCH is {total_batch_size}: it must be a multiple of the {world} processes")


def _undivided(sampler: Sampler) -> Sampler:
    """A sampler of Detectron2 that yields the numbers of all processes, not only those of this one; it is changed in place."""
    for name, value in (("_rank", 0), ("_world_size", 1)):
        if hasattr(sampler, name):
            setattr(sampler, name, value)
    return sampler


def build_resumable_train_loader(
    cfg: CfgNode,
    *,
    mapper: Optional[Callable[[dict], dict]] = None,
    dataset: Optional[list[dict]] = None,
    sampler: Optional[Sampler] = None,
) -> ResumableLoader:
    """Build a training loader of full images as Detectron2's `build_detection_train_loader` does, which can be resumed.

    Args:
        cfg: the config, of which DATASETS.TRAIN, DATALOADER, SOLVER.IMS_PER_BATCH and SEED are read. A negative SEED stands for another
            seed in every run.
        mapper: turns a dict into an input of the model; by default Detectron2's mapper.
        dataset: Detectron2's dataset dicts; by default those of DATASETS.TRAIN.
        sampler: yields numbers of dicts for all processes without end, the same numbers in every iteration and every process; by default
            that of DATALOADER.SAMPLER_TRAIN.

    Returns:
        ResumableLoader over lists of mapped images.

    Raises:
        UserError: the number of processes does not divide the batch, or a training with the sampler cannot be resumed.
    """
    check_batch_size(cfg.SOLVER.IMS_PER_BATCH)
    seed = comm.shared_random_seed() if cfg.SEED < 0 else cfg.SEED
    # A sampler draws a seed of its own.
    with seeded(seed, 0, 0, SAMPLER):
        parts = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset, sampler=sampler)
    if not isinstance(parts["sampler"], Sampler):
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN {cfg.DATALOADER.SAMPLER_TRAIN}: a training with it cannot be resumed; choose TrainingSampler, "
            "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
        )
    batches = MappedBatches(
        parts["dataset"],
        parts["mapper"],
        sampler=_undivided(parts["sampler"]),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        group_by_shape=parts["aspect_ratio_grouping"],
        seed=seed,
    )
    return ResumableLoader(batches, num_workers=parts["num_workers"])
