"""Training data as a numbered stream of batches: a training that is resumed at batch k sees what it would have seen."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Optional

import cv2
import numpy as np
import torch
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from ..errors import UserError
from .seeding import SAMPLER, SAMPLES, seeded


class BatchStream(IterableDataset):
    """An endless stream of batches, each a list of mapped images.

    Batch k depends on the seed, k and the rank only, not on the number of workers nor on what was drawn before.
    """

    def __init__(self, *, start: int = 0):
        """
        Args:
            start: number of the first batch.
        """
        self.start = start

    def plans(self) -> Iterable:
        """What each batch is made of, from number 0 on: cheap, as every worker goes through all of them."""
        raise NotImplementedError

    def make(self, plan) -> list:
        """The batch of a plan."""
        raise NotImplementedError

    def __iter__(self) -> Iterator:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.make, itertools.islice(self.plans(), self.start + first, None, step))


class MappedBatches(BatchStream):
    """The batches that Detectron2's training loader makes of a dataset, as a `BatchStream`."""

    def __init__(
        self,
        dicts: list,
        mapper,
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
            mapper: makes of a dict what the model reads; it may draw from torch, numpy and Python.
            sampler: endless numbers of dicts for this process, the same whenever it is iterated over.
            images_per_batch: of this process.
            group_by_shape: no batch has wide images and others.
            seed: of what the mapper draws.
            start: see `BatchStream`.
        """
        super().__init__(start=start)
        self.dicts, self.mapper, self.sampler = DatasetFromList(dicts, copy=False), mapper, sampler
        self.images_per_batch, self.seed, self.rank = images_per_batch, seed, comm.get_rank()
        # Images whose size is not known are all in one group.
        wide = [group_by_shape and d.get("width", 0) > d.get("height", 0) for d in dicts]
        self.groups = np.array(wide, dtype=np.int64)

    def plans(self) -> Iterator:
        """Batches of (place in the stream, number of the dict)."""
        groups = [], []
        for place, index in enumerate(self.sampler):
            group = groups[self.groups[index]]
            group.append((place, int(index)))
            if len(group) == self.images_per_batch:
                yield group[:]
                group.clear()

    def make(self, plan: list) -> list:
        return [self._map(*sample) for sample in plan]

    def _map(self, place: int, index: int) -> dict:
        with seeded(self.seed, self.rank, place, SAMPLES):
            return self.mapper(self.dicts[index])


class ResumableLoader:
    """Iterates over a `BatchStream` with workers, from batch `start` on, which may be set until the first batch is asked for."""

    def __init__(self, batches: BatchStream, *, num_workers: int):
        """
        Args:
            batches: the stream.
            num_workers: processes that read and map; 0 does it in this one.
        """
        self.batches, self.num_workers = batches, num_workers
        self.start = batches.start

    def __iter__(self) -> Iterator:
        self.batches.start = self.start
        yield from single_threaded_loader(
            self.batches,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=None,
            # Its own: starting would draw from torch's, and a resumed training would see other dropout in its first step.
            generator=torch.Generator(),
        )


def single_threaded_loader(dataset, **options) -> DataLoader:
    """A loader whose workers map images with one thread each, so that they do not fight the trainer for the cores."""
    # Here and not in the workers: a forked process waits for ever for OpenCV's threads of its parent when it changes their number.
    cv2.setNumThreads(0)
    return DataLoader(dataset, **options)


def share_batch(total_batch_size: int) -> int:
    """Images per batch of this process.

    Raises:
        ValueError: the number of processes does not divide the batch.
    """
    world = comm.get_world_size()
    if total_batch_size % world:
        raise UserError(f"SOLVER.IMS_PER_BATCH is {total_batch_size}: it must be a multiple of the {world} processes")
    return total_batch_size // world


def build_resumable_train_loader(
    cfg, *, mapper: Optional[DatasetMapper] = None, dataset: Optional[list] = None, sampler: Optional[Sampler] = None
) -> ResumableLoader:
    """Detectron2's `build_detection_train_loader`, whose batches are those of a `BatchStream`.

    Args:
        cfg: reads DATASETS.TRAIN, DATALOADER, SOLVER.IMS_PER_BATCH and SEED, of which a negative one is another one in every run.
        mapper: Detectron2's own if there is none.
        dataset: dataset dicts, those of DATASETS.TRAIN if there are none.
        sampler: endless numbers of dicts for this process, the same whenever it is iterated over; that of DATALOADER.SAMPLER_TRAIN if there
            is none.

    Returns:
        ResumableLoader over lists of what the mapper returns.

    Raises:
        ValueError: a batch that the processes cannot share, or a sampler that is none.
    """
    images_per_batch = share_batch(cfg.SOLVER.IMS_PER_BATCH)
    seed = comm.shared_random_seed() if cfg.SEED < 0 else cfg.SEED
    # Samplers draw a seed of their own.
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
