"""Training on several datasets at once: which of them are annotated exhaustively, and how large a share of an epoch each may take.

Shape letters: K datasets.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from torch.utils.data import Sampler

from ..errors import UserError


def load_datasets(cfg) -> tuple:
    """The images of DATASETS.TRAIN, one dataset after the other.

    Datasets are read one by one, because class-agnostic training mixes datasets with different categories.

    A dataset is not annotated exhaustively if DATASETS.NOT_EXHAUSTIVE names it or its metadata say so (`exhaustive` is False).

    Args:
        cfg: reads DATASETS.TRAIN, DATASETS.NOT_EXHAUSTIVE and DATALOADER.FILTER_EMPTY_ANNOTATIONS.

    Returns:
        list of Detectron2's dataset dicts, each with an entry `exhaustive` (bool); and the number of images of each of the K datasets.

    Raises:
        ValueError: DATASETS.NOT_EXHAUSTIVE names a dataset that is not in DATASETS.TRAIN.
    """
    datasets = cfg.DATASETS
    if unknown := set(datasets.NOT_EXHAUSTIVE) - set(datasets.TRAIN):
        raise UserError(f"DATASETS.NOT_EXHAUSTIVE names {sorted(unknown)}, which DATASETS.TRAIN does not have")
    dicts, sizes = [], []
    for name in datasets.TRAIN:
        images = get_detection_dataset_dicts([name], filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        exhaustive = name not in datasets.NOT_EXHAUSTIVE and MetadataCatalog.get(name).get("exhaustive", True)
        dicts += [{**image, "exhaustive": exhaustive} for image in images]
        sizes.append(len(images))
    return dicts, sizes


def epoch_counts(sizes: list, max_shares: list) -> list:
    """Images of each dataset in an epoch, so that no dataset exceeds its share.

    Args:
        sizes: number of images of each of the K datasets.
        max_shares: greatest share of each dataset in an epoch, in 0..1; 1 is no limit. A dataset without a limit is there as a whole.

    Returns:
        list of K ints.

    Raises:
        ValueError: every dataset has a limit, or the limits of datasets leave nothing for those without.
    """
    free = sum(size for size, share in zip(sizes, max_shares) if share >= 1)
    bound = [share < 1 for share in max_shares]
    if not free and any(bound):
        raise UserError("DATASETS.MAX_SHARES: one dataset at least has to be without a limit")
    while True:
        # Datasets that are smaller than their share are there as a whole, which leaves the others a smaller epoch to share.
        rest = 1 - sum(share for share, limited in zip(max_shares, bound) if limited)
        whole = sum(size for size, limited in zip(sizes, bound) if not limited)
        if rest <= 0:
            raise UserError(
                "DATASETS.MAX_SHARES: the shares add up to 1 or more, which leaves nothing for the other datasets"
            )
        total = whole / rest
        smaller = [limited and size <= share * total for size, share, limited in zip(sizes, max_shares, bound)]
        if not any(smaller):
            break
        bound = [limited and not small for limited, small in zip(bound, smaller)]
    return [math.floor(share * total) if limited else size for size, share, limited in zip(sizes, max_shares, bound)]


class MixingSampler(Sampler):
    """An endless, repeatable stream of images of K datasets, shuffled epoch by epoch.

    A dataset with a limit shows other images in the next epoch, until all of them were seen.
    """

    def __init__(self, *, sizes: list, counts: list, seed: int, rank: int = 0, world_size: int = 1):
        """
        Args:
            sizes: number of images of each dataset; images are numbered dataset by dataset.
            counts: images of each dataset in an epoch, see `epoch_counts`.
            seed: of the order; the same on all ranks.
            rank, world_size: this process takes every `world_size`-th image of the stream, from the `rank`-th.
        """
        self.sizes, self.counts = list(sizes), list(counts)
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self._stream(), self.rank, None, self.world_size)

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        firsts = itertools.accumulate([0, *self.sizes[:-1]])
        rounds = [_endless(size, first, generator) for size, first in zip(self.sizes, firsts)]
        while True:
            epoch = [number for images, count in zip(rounds, self.counts) for number in itertools.islice(images, count)]
            yield from (epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist())


def _endless(size: int, first: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from (torch.randperm(size, generator=generator) + first).tolist()
