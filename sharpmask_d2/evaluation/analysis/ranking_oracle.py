"""Ranking oracle: AR of the proposals as scored, and in orders that use the true masks, which bounds what better scores can gain.

Shape letters:
    D: proposals of an image, sorted by descending score
    G: objects of an image
"""

import numpy as np

from ..recall import AREA_RANGES, PROPOSAL_COUNTS, RecallAccumulator
from .image_proposals import ImageProposals
from .tables import Table


def by_overlap(ious: np.ndarray) -> np.ndarray:
    """Sort proposals by their highest IoU with any object, as scores that predict the IoU perfectly do without suppression.

    Args:
        ious: (D, G) IoUs of proposals and objects.

    Returns:
        (D,) int indices of the proposals, best first; proposals of equal IoU keep their order.
    """
    return np.argsort(-ious.max(axis=1, initial=0), kind="stable")


def one_of_each_first(ious: np.ndarray) -> np.ndarray:
    """Sort proposals so that every object is covered once before any object is covered again, which is nearly the best order.

    Pairs of a proposal and an object are selected greedily by descending IoU, and each proposal and each object belongs to at most one
    pair. The proposals of the pairs come first, the others follow as in `by_overlap`. No single order is the best at every IoU threshold.

    Args:
        ious: (D, G) IoUs of proposals and objects.

    Returns:
        (D,) int indices of the proposals, best first.
    """
    remaining = ious.copy()
    chosen = []
    for _ in range(min(ious.shape)):
        proposal, object_index = np.unravel_index(remaining.argmax(), remaining.shape)
        if remaining[proposal, object_index] <= 0:
            break
        chosen.append(proposal)
        remaining[proposal], remaining[:, object_index] = -1, -1
    others = by_overlap(ious)
    return np.concatenate([np.array(chosen, dtype=int), others[~np.isin(others, chosen)]])


class RankingOracle:
    """Collects the recall of the proposals in several orders."""

    _ORDERS = {
        "as scored": lambda ious: np.arange(len(ious)),
        "by their IoU": by_overlap,
        "one of each object first": one_of_each_first,
    }

    def __init__(self) -> None:
        self._recalls = {name: RecallAccumulator() for name in self._ORDERS}

    def add(self, image: ImageProposals) -> None:
        """Match the proposals of one image in every order.

        Args:
            image: an image with its proposals.
        """
        for name, recall in self._recalls.items():
            order = self._ORDERS[name](image.ious)
            masks = [image.masks[i] for i in order]
            recall.add(image.image_id, image.objects.truth, masks, -np.arange(len(masks)))

    def tables(self) -> list[Table]:
        """Report AR in percent, by order of the proposals and size of the objects.

        Returns:
            One table, "order".
        """
        rows = [
            [name, area, *(100 * recall.average_recall(PROPOSAL_COUNTS, area))]
            for name, recall in self._recalls.items()
            for area in AREA_RANGES
        ]
        title = "Order: mask AR of the proposals as scored, and of the same proposals in orders that use the true masks; in percent"
        return [Table("order", title, ["order", "objects", *(f"AR@{count}" for count in PROPOSAL_COUNTS)], rows)]
