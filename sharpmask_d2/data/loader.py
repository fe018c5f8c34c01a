"""Loaders of patches: an endless, repeatable stream for training and a fixed set for the per-patch evaluation."""

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
from detectron2.config import configurable
from detectron2.data import get_detection_dataset_dicts
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .patch_mapper import PatchMapper
from .resumable import BatchStream, ResumableLoader, share_batch, single_threaded_loader


class PatchBatches(BatchStream):
    """A `BatchStream` of patches."""

    def __init__(self, dicts: list, mapper: PatchMapper, *, images_per_batch: int, seed: int, start: int = 0):
        """
        Args:
            dicts: Detectron2's dataset dicts.
            mapper: makes patches.
            images_per_batch: of this process.
            seed: of everything drawn.
            start: see `BatchStream`.

        Raises:
            ValueError: no image has an object to learn from.
        """
        super().__init__(start=start)
        self.dicts, self.mapper = dicts, mapper
        self.images_per_batch, self.seed, self.rank = images_per_batch, seed, comm.get_rank()
        weights = np.array([mapper.weights(mapper.objects(d)).sum() for d in dicts], dtype=np.float64)
        if not weights.any():
            raise UserError(
                "no image of DATASETS.TRAIN has an object to learn from: they need masks, iscrowd 0, and the size that "
                "MODEL.SHARPMASK.SAMPLING.MIN_AREA and MIN_SIDE ask for"
            )
        self.probabilities = weights / weights.sum()

    def plans(self) -> Iterable:
        """The batches' numbers."""
        return itertools.count()

    def make(self, plan: int) -> list:
        rng = np.random.default_rng([self.seed, plan, self.rank])
        images = rng.choice(len(self.dicts), size=self.images_per_batch, p=self.probabilities)
        return [self.mapper(self.dicts[i], rng) for i in images]


def category_weights(objects: Iterable) -> dict:
    """Weights that give every category the same share of what is chosen: category_id -> 1 / number of its targets.

    Args:
        objects: `objects.ImageObjects` of all images.
    """
    counts = Counter(category for o in objects for category in o.categories[o.targets].tolist())
    return {category: 1 / count for category, count in counts.items()}


def _train_arguments(cfg):
    return {
        "dataset": get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=True),
        "mapper": PatchMapper(cfg, category_weights={}),
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "balance_categories": cfg.MODEL.SHARPMASK.SAMPLING.BALANCE_CATEGORIES,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "seed": cfg.SEED,
    }


@configurable(from_config=_train_arguments)
def build_patch_train_loader(
    *,
    dataset: list,
    mapper: PatchMapper,
    total_batch_size: int,
    balance_categories: bool = False,
    num_workers: int = 0,
    seed: int = -1,
):
    """A training loader of patches, in the manner of `build_detection_train_loader`.

    Args:
        dataset: dataset dicts.
        mapper: makes patches.
        total_batch_size: images per batch over all processes.
        balance_categories: give the mapper weights with which every category of the dataset is chosen equally often.
        num_workers: per process.
        seed: negative for another one in every run.

    Returns:
        ResumableLoader over lists of dicts as `PatchMapper` makes them.
    """
    images_per_batch = share_batch(total_batch_size)
    seed = comm.shared_random_seed() if seed < 0 else seed
    if balance_categories:
        mapper.category_weights = category_weights(mapper.objects(d) for d in dataset)
    batches = PatchBatches(dataset, mapper, images_per_batch=images_per_batch, seed=seed)
    return ResumableLoader(batches, num_workers=num_workers)


class FixedPatches(Dataset):
    """The same patches of every image each time: the random generator is seeded with the image's number in the whole dataset."""

    def __init__(self, numbered_dicts: list, mapper: PatchMapper):
        self.numbered_dicts, self.mapper = numbered_dicts, mapper

    def __len__(self) -> int:
        return len(self.numbered_dicts)

    def __getitem__(self, index: int) -> dict:
        number, dataset_dict = self.numbered_dicts[index]
        return self.mapper(dataset_dict, np.random.default_rng(number))


def build_patch_test_loader(cfg, dataset_name: str) -> DataLoader:
    """Patches for the per-patch evaluation: one batch an image, this process' share of the dataset."""
    dicts = get_detection_dataset_dicts(dataset_name, filter_empty=True)
    mapper = PatchMapper(cfg, category_weights={}, is_train=False)
    share = list(enumerate(dicts))[comm.get_rank() :: comm.get_world_size()]
    patches = FixedPatches(share, mapper)
    return single_threaded_loader(patches, batch_size=1, num_workers=cfg.DATALOADER.NUM_WORKERS, collate_fn=list)
