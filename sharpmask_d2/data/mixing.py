"""Mixes datasets in training: which of them are annotated exhaustively, and how large a share of an epoch each may have.

Shape letters: K datasets.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from torch.utils.data import Sampler

from ..errors import UserError


def load_datasets(cfg: CfgNode) -> tuple[list[dict], list[int]]:
    """The images of DATASETS.TRAIN, dataset by dataset.

    Each dataset is read on its own, because class-agnostic training mixes datasets with different categories. A dataset is not annotated
    exhaustively if DATASETS.NOT_EXHAUSTIVE names it or its metadata say so (`exhaustive` is False).

    Args:
        cfg: the config, of which DATASETS.TRAIN, DATASETS.NOT_EXHAUSTIVE and DATALOADER.FILTER_EMPTY_ANNOTATIONS are read.

    Returns:
        dicts: Detectron2's dataset dicts, each with an entry `exhaustive` (bool).
        sizes: K, number of images of each dataset.

    Raises:
        UserError: DATASETS.NOT_EXHAUSTIVE names a dataset that is not in DATASETS.TRAIN.
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


def epoch_counts(sizes: list[int], max_shares: list[float]) -> list[int]:
    """The number of images of each dataset in an epoch in which no dataset exceeds its share.

    Args:
        sizes: K, number of images of each dataset.
        max_shares: K, maximum share of each dataset in an epoch, in 0..1; 1 is no limit. An epoch has all images of a dataset without a
            limit.

    Returns:
        K numbers of images.

    Raises:
        UserError: every dataset has a limit, or the limits add up to 1 or more.
    """
    free = sum(size for size, share in zip(sizes, max_shares) if share >= 1)
    bound = [share < 1 for share in max_shares]
    if not free and any(bound):
        raise UserError("DATASETS.MAX_SHARES: at least one dataset has to be without a limit")
    while True:
        # A dataset that is smaller than its share is used as a whole. The epoch of the others is then smaller, too.
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

    Successive epochs take different images of a dataset with a limit, until all of them have been used.
    """

    def __init__(self, *, sizes: list[int], counts: list[int], seed: int):
        """
        Args:
            sizes: K, number of images of each dataset; images are numbered dataset by dataset.
            counts: K, number of images of each dataset in an epoch, see `epoch_counts`.
            seed: of the order, equal on all ranks.
        """
        self.sizes, self.counts, self.seed = list(sizes), list(counts), seed

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        firsts = itertools.accumulate([0, *self.sizes[:-1]])
        rounds = [_endless(size, first, generator) for size, first in zip(self.sizes, firsts)]
        while True:
            epoch = [number for images, count in zip(rounds, self.counts) for number in itertools.islice(images, count)]
            yield from (epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist())


def _endless(size: int, first: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from (torch.randperm(size, generator=generator) + first).tolist()
