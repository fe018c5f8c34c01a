"""Numbered streams of training batches: a training that is resumed at batch k reads the batches that it would have read."""

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
    """An endless stream of batches, each a list of mapped images.

    Batch k depends only on the seed, on k and on the rank: neither on the number of workers nor on earlier random numbers.
    """

    def __init__(self, *, start: int = 0):
        """
        Args:
            start: number of the first batch; 0 by default.
        """
        self.start = start

    def plans(self) -> Iterable[Any]:
        """A plan of each batch, from number 0 on. Plans are cheap, because every worker makes all of them."""
        raise NotImplementedError

    def make(self, plan: Any) -> list[dict]:
        """The batch of a plan."""
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
        images_per_batch: int,
        group_by_shape: bool,
        seed: int,
        start: int = 0,
    ):
        """
        Args:
            dicts: Detectron2's dataset dicts.
            mapper: turns a dict into an input of the model; it may use the random numbers of torch, numpy and Python.
            sampler: yields numbers of dicts for this process without end, the same numbers in every iteration.
            images_per_batch: of this process.
            group_by_shape: put wide images and other images into separate batches.
            seed: of the mapper's random numbers.
            start: number of the first batch; 0 by default.
        """
        super().__init__(start=start)
        self.dicts, self.mapper, self.sampler = DatasetFromList(dicts, copy=False), mapper, sampler
        self.images_per_batch, self.seed, self.rank = images_per_batch, seed, comm.get_rank()
        # Images of unknown size are all in the same group.
        wide = [group_by_shape and d.get("width", 0) > d.get("height", 0) for d in dicts]
        self.groups = np.array(wide, dtype=np.int64)

    def plans(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (position in the sampler's stream, number of the dict)."""
        groups: tuple[list, list] = [], []
        for place, index in enumerate(self.sampler):
            group = groups[self.groups[index]]
            group.append((place, int(index)))
            if len(group) == self.images_per_batch:
                yield group[:]
                group.clear()

    def make(self, plan: list[tuple[int, int]]) -> list[dict]:
        return [self._map(*sample) for sample in plan]

    def _map(self, place: int, index: int) -> dict[str, Any]:
        with seeded(self.seed, self.rank, place, SAMPLES):
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


def share_batch(total_batch_size: int) -> int:
    """The number of images per batch of this process.

    Args:
        total_batch_size: number of images per batch, over all processes.

    Raises:
        UserError: the number of processes does not divide the batch.
    """
    world = comm.get_world_size()
    if total_batch_size % world:
        raise UserError(f"SOLVER.IMS_PER_BATCH is {total_batch_size}: it must be a multiple of the {world} processes")
    return total_batch_size // world


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
        sampler: yields numbers of dicts for this process without end, the same numbers in every iteration; by default that of
            DATALOADER.SAMPLER_TRAIN.

    Returns:
        ResumableLoader over lists of mapped images.

    Raises:
        UserError: the number of processes does not divide the batch, or a training with the sampler cannot be resumed.
    """
    images_per_batch = share_batch(cfg.SOLVER.IMS_PER_BATCH)
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
        sampler=parts["sampler"],
        images_per_batch=images_per_batch,
        group_by_shape=parts["aspect_ratio_grouping"],
        seed=seed,
    )
    return ResumableLoader(batches, num_workers=parts["num_workers"])
