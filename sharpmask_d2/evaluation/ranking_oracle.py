"""What better orders of given proposals would be worth: AR of the proposals as scored, and sorted with the help of the true masks.

Shape letters:
    D: proposals of an image, best first
    G: objects of an image
"""

import numpy as np

from .proposed_image import ProposedImage
from .recall import AREA_RANGES, PROPOSAL_COUNTS, RecallAccumulator
from .tables import Table


def by_overlap(ious: np.ndarray) -> np.ndarray:
    """The order of proposals by the highest IoU with an object: what a perfect prediction of the IoU gives, without suppression.

    Args:
        ious: (D, G).

    Returns:
        (D,) numbers of the proposals, best first; equal ones stay as they are.
    """
    return np.argsort(-ious.max(axis=1, initial=0), kind="stable")


def one_of_each_first(ious: np.ndarray) -> np.ndarray:
    """The order of proposals that shows every object once before it shows one again: nearly the best there is.

    Pairs of a proposal and an object are chosen by falling IoU, each proposal and each object once; the chosen proposals come first, then
    the others as in `by_overlap`. (The best order differs with the IoU that is asked for.)

    Args:
        ious: (D, G).

    Returns:
        (D,) numbers of the proposals, best first.
    """
    left = ious.copy()
    chosen = []
    for _ in range(min(ious.shape)):
        proposal, thing = np.unravel_index(left.argmax(), left.shape)
        if left[proposal, thing] <= 0:
            break
        chosen.append(proposal)
        left[proposal], left[:, thing] = -1, -1
    others = by_overlap(ious)
    return np.concatenate([np.array(chosen, dtype=int), others[~np.isin(others, chosen)]])


class RankingOracle:
    """Collects, image by image, the recall of proposals in several orders."""

    _ORDERS = {
        "as scored": lambda ious: np.arange(len(ious)),
        "by their IoU": by_overlap,
        "one of each object first": one_of_each_first,
    }

    def __init__(self) -> None:
        self._recalls = {name: RecallAccumulator() for name in self._ORDERS}

    def add(self, image: ProposedImage) -> None:
        for name, recall in self._recalls.items():
            order = self._ORDERS[name](image.ious)
            masks = [image.masks[i] for i in order]
            recall.add(image.image_id, image.objects.truth, masks, -np.arange(len(masks)))

    def tables(self) -> list:
        """AR in percent, by order and size of the objects."""
        rows = [
            [name, area, *(100 * recall.average_recall(PROPOSAL_COUNTS, area))]
            for name, recall in self._recalls.items()
            for area in AREA_RANGES
        ]
        title = "Order: mask AR of the proposals as scored, and of these proposals in orders that know the true masks; in percent"
        return [Table("order", title, ["order", "objects", *(f"AR@{count}" for count in PROPOSAL_COUNTS)], rows)]
