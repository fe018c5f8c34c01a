"""Loaders of patches: an endless, repeatable stream for training, and a fixed set for the per-patch evaluation."""

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import get_detection_dataset_dicts
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .objects import ImageObjects
from .patch_mapper import PatchMapper
from .resumable import BatchStream, ResumableLoader, check_batch_size, share_of_batch, single_threaded_loader


class PatchBatches(BatchStream):
    """A `BatchStream` of patches: each image is drawn with a probability proportional to the weights of its objects."""

    def __init__(self, dicts: list[dict], mapper: PatchMapper, *, total_batch_size: int, seed: int, start: int = 0):
        """
        Args:
            dicts: Detectron2's dataset dicts.
            mapper: makes the patches of an image.
            total_batch_size: number of images per batch, over all processes.
            seed: of all random numbers.
            start: number of the first batch; 0 by default.

        Raises:
            UserError: no image has an object that is a training target.
        """
        super().__init__(start=start)
        self.dicts, self.mapper = dicts, mapper
        self.total_batch_size, self.seed = total_batch_size, seed
        self.share = share_of_batch()
        weights = np.array([mapper.weights(mapper.objects(d)).sum() for d in dicts], dtype=np.float64)
        if not weights.any():
            raise UserError(
                "no image of DATASETS.TRAIN has an object to learn from: objects need masks, iscrowd 0, and at least the size in "
                "MODEL.SHARPMASK.SAMPLING.MIN_AREA and MIN_SIDE"
            )
        self.probabilities = weights / weights.sum()

    def plans(self) -> Iterable[int]:
        """The numbers of the batches."""
        return itertools.count()

    def make(self, plan: int) -> list[dict]:
        rng = np.random.default_rng([self.seed, plan, 0])
        images = rng.choice(len(self.dicts), size=self.total_batch_size, p=self.probabilities)
        # Each image has its own random numbers, because this process may have any images of the batch.
        numbered = list(enumerate(images, 1))[self.share]
        return [self.mapper(self.dicts[i], np.random.default_rng([self.seed, plan, number])) for number, i in numbered]


def category_weights(objects: Iterable[ImageObjects]) -> dict[int, float]:
    """Weights of objects with which all categories are drawn equally often.

    Args:
        objects: of all images.

    Returns:
        category_id -> 1 / number of targets of the category.
    """
    counts = Counter(category for o in objects for category in o.categories[o.targets].tolist())
    return {category: 1 / count for category, count in counts.items()}


def _train_arguments(cfg: CfgNode) -> dict[str, Any]:
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
    dataset: list[dict],
    mapper: PatchMapper,
    total_batch_size: int,
    balance_categories: bool = False,
    num_workers: int = 0,
    seed: int = -1,
):
    """Build a training loader of patches. As `build_detection_train_loader`, it takes a config or these arguments.

    Args:
        dataset: Detectron2's dataset dicts.
        mapper: makes the patches of an image.
        total_batch_size: number of images per batch, over all processes.
        balance_categories: give the mapper weights with which all categories are drawn equally often; False by default.
        num_workers: number of worker processes of each process; 0 by default, which loads in the process itself.
        seed: of all random numbers; a negative one, the default, stands for another seed in every run.

    Returns:
        ResumableLoader over lists of dicts from `PatchMapper`.

    Raises:
        UserError: the number of processes does not divide the batch, or no image has an object that is a training target.
    """
    check_batch_size(total_batch_size)
    seed = comm.shared_random_seed() if seed < 0 else seed
    if balance_categories:
        mapper.category_weights = category_weights(mapper.objects(d) for d in dataset)
    batches = PatchBatches(dataset, mapper, total_batch_size=total_batch_size, seed=seed)
    return ResumableLoader(batches, num_workers=num_workers)


class FixedPatches(Dataset):
    """Patches that are equal in every pass: an image's random numbers are seeded with its number in the whole dataset."""

    def __init__(self, numbered_dicts: list[tuple[int, dict]], mapper: PatchMapper):
        """
        Args:
            numbered_dicts: (number in the whole dataset, Detectron2's dataset dict) of each image.
            mapper: makes the patches of an image.
        """
        self.numbered_dicts, self.mapper = numbered_dicts, mapper

    def __len__(self) -> int:
        return len(self.numbered_dicts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, dataset_dict = self.numbered_dicts[index]
        return self.mapper(dataset_dict, np.random.default_rng(number))


def build_patch_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build a loader for the per-patch evaluation.

    Args:
        cfg: the config.
        dataset_name: of a registered dataset.

    Returns:
        Loader with one batch per image, of this process' share of the dataset.
    """
    dicts = get_detection_dataset_dicts(dataset_name, filter_empty=True)
    mapper = PatchMapper(cfg, category_weights={}, is_train=False)
    share = list(enumerate(dicts))[comm.get_rank() :: comm.get_world_size()]
    patches = FixedPatches(share, mapper)
    return single_threaded_loader(patches, batch_size=1, num_workers=cfg.DATALOADER.NUM_WORKERS, collate_fn=list)
