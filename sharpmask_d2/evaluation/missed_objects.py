"""Why objects are missed: no window was near, the mask in it was bad, or the proposal came too late.

Shape letters:
    D: proposals of an image, best first
    G: objects of an image
    T: IoU thresholds
    A: area ranges
"""

from typing import NamedTuple

import numpy as np
import torch

from ..windows.labels import window_offsets
from .proposed_image import ProposedImage
from .recall import AREA_RANGES, IOU_THRESHOLDS, PROPOSAL_COUNTS, RecallAccumulator
from .tables import Table, percent

COUNTS = (100, 1000)
FOUND, NO_WINDOW, BAD_MASK, BAD_RANK, TAKEN = CAUSES = ("found", "no window near", "bad mask", "bad rank", "taken")


class WindowRule(NamedTuple):
    """Which windows are near to an object: those that DeepMask's rule calls positive (see `modeling.windows.label_windows`).

    share: larger side of an object that fits its window, as a share of the window's side. shift, as a share of the window's side, and
    octaves: how far a window that is near may be from the canonical one.
    """

    share: float
    shift: float
    octaves: float

    def near(self, windows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """
        Args:
            windows: (D, 4) XYXY in pixels of the image.
            boxes: (G, 4) XYXY of the objects in the same frame.

        Returns:
            (D, G) bool.
        """
        shift, octaves = window_offsets(torch.from_numpy(windows), torch.from_numpy(boxes), share=self.share)
        return ((shift <= self.shift) & (octaves <= self.octaves)).numpy()


def causes(ranks: np.ndarray, ious: np.ndarray, near: np.ndarray, count: int) -> np.ndarray:
    """What became of each object at `count` proposals an image.

    Args:
        ranks: (A, T, G), the proposals that took the objects, see `recall.match_ranks`.
        ious: (D, G) of all proposals, those after the first `count` too.
        near: (G,) bool, whether one of the proposals has a window near to the object.
        count: how many proposals of an image count.

    Returns:
        (A, T, G) int, numbers of CAUSES: found; or, where the object is missed at this IoU threshold,
        no window near: no proposal's mask reaches the threshold, and none has a window near to the object;
        bad mask: no proposal's mask reaches the threshold, though a window is near;
        bad rank: a mask reaches the threshold, but none of the first `count`;
        taken: a mask among the first `count` reaches the threshold, but is counted for another object.
    """
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    first, every = (x.max(axis=0, initial=0) >= thresholds for x in (ious[:count], ious))  # T x G
    missed = np.where(first, CAUSES.index(TAKEN), CAUSES.index(BAD_RANK))
    without = np.where(near, CAUSES.index(BAD_MASK), CAUSES.index(NO_WINDOW))
    missed = np.where(every, missed, without)
    return np.where(ranks < count, CAUSES.index(FOUND), missed)


class MissedObjects:
    """Collects, image by image, why objects are missed."""

    def __init__(self, rule: WindowRule) -> None:
        """
        Args:
            rule: of the model that the proposals come from.
        """
        self._rule = rule
        # One array T x (objects that count) for each image.
        self._causes = {(count, area): [] for count in COUNTS for area in AREA_RANGES}

    def add(self, image: ProposedImage) -> None:
        """
        Args:
            image: with the windows of its proposals.
        """
        recall = RecallAccumulator()
        recall.add(image.image_id, image.objects.truth, image.masks, -np.arange(len(image.masks)))
        ranks, counted = recall.images[image.image_id]
        near = self._rule.near(image.windows, image.objects.boxes).any(axis=0)
        for count in COUNTS:
            of_areas = causes(ranks, image.ious, near, count)
            for area, found, chosen in zip(AREA_RANGES, of_areas, counted):
                self._causes[count, area].append(found[:, chosen])

    def tables(self) -> list:
        """The shares of all objects in percent: what is found is recall, and its mean over the thresholds AR."""
        rows = []
        for (count, area), parts in self._causes.items():
            found = np.concatenate([np.empty((len(IOU_THRESHOLDS), 0), dtype=int), *parts], axis=1)
            for number, cause in enumerate(CAUSES):
                # Where all proposals count, none comes too late.
                if cause != BAD_RANK or count < PROPOSAL_COUNTS[-1]:
                    shares = [percent(row == number) for row in found]
                    rows.append([count, area, found.shape[1], cause, percent(found == number), *shares])
        title = (
            "Missed objects: share of the objects that are found among the first proposals; or missed as no window is near (as the label\n"
            "rule has it), as masks in near windows are bad, as a good mask comes later, or as another object takes the good mask.\n"
            "In percent, mean over the IoU thresholds and at each of them"
        )
        header = [
            "proposals",
            "objects",
            "number",
            "cause",
            "mean",
            *(f"{threshold:.2f}" for threshold in IOU_THRESHOLDS),
        ]
        return [Table("missed objects", title, header, rows)]
