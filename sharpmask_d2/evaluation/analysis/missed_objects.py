"""Missed objects: why a proposal set misses an object (no window near it, a bad mask, a low rank, or its mask matched another object).

Shape letters:
    D: proposals of an image, sorted by descending score
    G: objects of an image
    T: IoU thresholds
    A: area ranges
"""

from typing import NamedTuple

import numpy as np
import torch

from ...windows.labels import window_offsets
from ..recall import AREA_RANGES, IOU_THRESHOLDS, PROPOSAL_COUNTS, RecallAccumulator
from .image_proposals import ImageProposals
from .tables import Table, percent

# Numbers of proposals per image for which causes are reported.
COUNTS = (100, 1000)
FOUND, NO_WINDOW, BAD_MASK, BAD_RANK, TAKEN = CAUSES = ("found", "no window near", "bad mask", "bad rank", "taken")


class WindowRule(NamedTuple):
    """Decides which windows are near an object: those that DeepMask's label rule calls positive (see `windows.labels.label_windows`)."""

    # Larger side of the object in its canonical window, as a share of the window's side.
    share: float
    # Maximum distance of a near window's centre from the object's centre, as a share of the window's side.
    shift: float
    # Maximum difference in size between a near window and the canonical window, in octaves.
    octaves: float

    def near(self, windows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Decide which windows are near which objects.

        Args:
            windows: (D, 4) float64, XYXY in pixels of the original image.
            boxes: (G, 4) float64, XYXY of the objects in the same frame.

        Returns:
            (D, G) bool.
        """
        shift, octaves = window_offsets(torch.from_numpy(windows), torch.from_numpy(boxes), share=self.share)
        return ((shift <= self.shift) & (octaves <= self.octaves)).numpy()


def causes(ranks: np.ndarray, ious: np.ndarray, near: np.ndarray, count: int) -> np.ndarray:
    """Decide whether each object is found among the first `count` proposals and, if not, why.

    * found: a proposal among the first `count` is matched to the object.
    * no window near: no mask reaches the IoU threshold, and no window is near the object.
    * bad mask: no mask reaches the threshold, although a window is near the object.
    * bad rank: a mask reaches the threshold, but none among the first `count` does.
    * taken: a mask among the first `count` reaches the threshold but is matched to another object.

    Args:
        ranks: (A, T, G) int32, rank of the proposal matched to each object; see `recall.match_ranks`.
        ious: (D, G) IoUs of all proposals, including those after the first `count`.
        near: (G,) bool, whether the window of any proposal is near the object.
        count: number of proposals per image that are considered.

    Returns:
        (A, T, G) int, indices into `CAUSES`.
    """
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    first, every = (x.max(axis=0, initial=0) >= thresholds for x in (ious[:count], ious))  # T x G
    missed = np.where(first, CAUSES.index(TAKEN), CAUSES.index(BAD_RANK))
    without = np.where(near, CAUSES.index(BAD_MASK), CAUSES.index(NO_WINDOW))
    missed = np.where(every, missed, without)
    return np.where(ranks < count, CAUSES.index(FOUND), missed)


class MissedObjects:
    """Collects why the objects of each image are missed."""

    def __init__(self, rule: WindowRule) -> None:
        """
        Args:
            rule: the label rule of the model that made the proposals.
        """
        self._rule = rule
        # Per number of proposals and area range: one array T x (objects in the range) per image.
        self._causes = {(count, area): [] for count in COUNTS for area in AREA_RANGES}

    def add(self, image: ImageProposals) -> None:
        """Match the proposals of one image and decide the cause for each object.

        Args:
            image: an image with `windows`.
        """
        recall = RecallAccumulator()
        recall.add(image.image_id, image.objects.truth, image.masks, -np.arange(len(image.masks)))
        matched = recall.images[image.image_id]
        near = self._rule.near(image.windows, image.objects.boxes).any(axis=0)
        for count in COUNTS:
            by_area = causes(matched.ranks, image.ious, near, count)
            for area, found, chosen in zip(AREA_RANGES, by_area, matched.counted):
                self._causes[count, area].append(found[:, chosen])

    def tables(self) -> list[Table]:
        """Report the share of each cause in all objects, in percent. The share of "found" is the recall, and its mean over thresholds AR.

        Returns:
            One table, "missed objects".
        """
        rows = []
        for (count, area), parts in self._causes.items():
            found = np.concatenate([np.empty((len(IOU_THRESHOLDS), 0), dtype=int), *parts], axis=1)
            for number, cause in enumerate(CAUSES):
                # If all proposals are considered, no rank is too low.
                if cause != BAD_RANK or count < PROPOSAL_COUNTS[-1]:
                    shares = [percent(row == number) for row in found]
                    rows.append([count, area, found.shape[1], cause, percent(found == number), *shares])
        title = (
            "Missed objects: share of the objects that are found among the first proposals, or missed because no window is near (by the\n"
            "label rule), because masks in near windows are bad, because a good mask has a lower rank, or because the good mask is\n"
            "matched to another object. In percent, mean over the IoU thresholds and at each of them"
        )
        header = ["proposals", "objects", "number", "cause", "mean", *(f"{t:.2f}" for t in IOU_THRESHOLDS)]
        return [Table("missed objects", title, header, rows)]
