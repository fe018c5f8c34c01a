"""Which windows of an image are trained on.

Shape letters: G objects, P patches.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from ..windows.geometry import object_windows
from ..windows.labels import label_windows
from .objects import ImageObjects

# Tries before a window that is no negative is taken for one all the same, as in the released code.
_TRIES = 100


class WindowSamples(NamedTuple):
    """Windows (P, 4) XYXY squares in the image, float64; labels (P,) 1 or 0; objects (P,) or -1; pays_mask, pays_score (P,) bool."""

    windows: np.ndarray
    labels: np.ndarray
    objects: np.ndarray
    pays_mask: np.ndarray
    pays_score: np.ndarray


class WindowSampler:
    """Draws the windows of an image that training looks at (DeepMask, section 3.2; fair_code: mask samples and score samples).

    Of P windows, a share are positives with shift and scale jitter, which pay the mask loss. As in the released code the others pay the
    score loss, half of them positives without jitter, half negatives; or, as in the paper, all pay it and the others are negatives.
    """

    def __init__(
        self,
        *,
        window_size: int,
        exponents: list,
        mask_fraction: float,
        shared_positives: bool,
        near_negatives: float,
        label_rule: dict,
    ):
        """
        Args:
            window_size: W in pixels of the patch.
            exponents: scales (exponents of 2) between which negatives are drawn.
            mask_fraction: share of jittered positives that pay the mask loss.
            shared_positives: these pay the score loss, too (paper).
            near_negatives: share of the negatives that are drawn around an object.
            label_rule: keyword arguments of `windows.label_windows`.
        """
        self.window_size = window_size
        self.exponents = (min(exponents) - 0.25, max(exponents) + 0.25)
        self.mask_fraction = mask_fraction
        self.shared_positives = shared_positives
        self.near_negatives = near_negatives
        self.label_rule = dict(label_rule)

    def __call__(self, objects: ImageObjects, weights: np.ndarray, image_size: tuple, count: int, rng) -> WindowSamples:
        """
        Args:
            objects: of the image.
            weights: (G,) how often each object is chosen; zero for those that are no targets.
            image_size: (height, width).
            count: P.
            rng: numpy.random.Generator.

        Returns:
            WindowSamples; without any target all are negatives.
        """
        masks = _round_randomly(count * self.mask_fraction, rng) if weights.any() else 0
        still = 0
        if not self.shared_positives and weights.any():
            still = _round_randomly((count - masks) / 2, rng)
        chosen = (
            rng.choice(len(weights), size=masks + still, p=weights / weights.sum())
            if masks + still
            else np.zeros(0, int)
        )
        windows = np.concatenate(
            [
                self._jittered(objects.boxes[chosen[:masks]], rng),
                self._bucketed(objects.boxes[chosen[masks:]]),
                self._negatives(objects, image_size, count - masks - still, rng),
            ]
        )
        labels = np.arange(count) < masks + still
        pays_mask = np.arange(count) < masks
        return WindowSamples(
            windows=windows,
            labels=labels.astype(np.int64),
            objects=np.concatenate([chosen, np.full(count - len(chosen), -1)]),
            pays_mask=pays_mask,
            pays_score=np.ones(count, bool) if self.shared_positives else ~pays_mask,
        )

    def _jittered(self, boxes: np.ndarray, rng) -> np.ndarray:
        rule, n = self.label_rule, len(boxes)
        centres, sides = _centres_and_sides(object_windows(torch.from_numpy(boxes).double(), self.window_size).numpy())
        sides = sides * 2.0 ** rng.uniform(-rule["positive_octaves"], rule["positive_octaves"], (n, 1))
        shift = rng.uniform(-rule["positive_shift"], rule["positive_shift"], (n, 2))
        return _squares(centres + shift * sides / self.window_size, sides)

    def _bucketed(self, boxes: np.ndarray) -> np.ndarray:
        centres, sides = _centres_and_sides(object_windows(torch.from_numpy(boxes).double(), self.window_size).numpy())
        # The pyramid has half octaves: the level nearest to the canonical scale.
        exponents = np.round(2 * np.log2(self.window_size / sides)) / 2
        return _squares(centres, self.window_size / 2.0**exponents)

    def _negatives(self, objects: ImageObjects, image_size: tuple, count: int, rng) -> np.ndarray:
        if count == 0:
            return np.zeros((0, 4))
        height, width = image_size
        sides = self.window_size / 2.0 ** rng.uniform(*self.exponents, (count, _TRIES, 1))
        centres = rng.uniform(0, 1, (count, _TRIES, 2)) * (width, height)
        if len(objects.boxes):
            near = rng.random(count) < self.near_negatives
            centres[near], sides[near] = self._around(objects.boxes, (int(near.sum()), _TRIES), rng)
        candidates = _squares(centres.reshape(-1, 2), sides.reshape(-1, 1))
        labels, _ = label_windows(
            torch.from_numpy(candidates), torch.from_numpy(objects.boxes).double(), self.window_size, **self.label_rule
        )
        negative = labels.numpy() == 0
        x, y = centres.reshape(-1, 2, 1).transpose(1, 0, 2)  # each tries x 1 against crowds
        boxes = objects.crowd_boxes
        in_crowd = (x >= boxes[:, 0]) & (x < boxes[:, 2]) & (y >= boxes[:, 1]) & (y < boxes[:, 3])
        negative &= ~in_crowd.any(axis=1)
        # argmax finds the first negative of the tries, and the first try where there is none.
        first = negative.reshape(count, _TRIES).argmax(axis=1)
        return candidates.reshape(count, _TRIES, 4)[np.arange(count), first]

    def _around(self, boxes: np.ndarray, shape: tuple, rng) -> tuple:
        """Centres and sides of windows near the border between positive and negative of some object."""
        canonical = object_windows(torch.from_numpy(boxes).double(), self.window_size).numpy()
        centres, sides = (part[rng.integers(len(boxes), size=shape)] for part in _centres_and_sides(canonical))
        reach = 2 * self.label_rule["negative_shift"]
        octaves = rng.uniform(-2, 2, (*shape, 1)) * self.label_rule["negative_octaves"]
        sides = sides * 2.0**octaves
        return centres + rng.uniform(-reach, reach, (*shape, 2)) * sides / self.window_size, sides


def _round_randomly(value: float, rng) -> int:
    """The whole number below or above, with the right mean."""
    return math.floor(value) + int(rng.random() < value - math.floor(value))


def _centres_and_sides(windows: np.ndarray) -> tuple:
    return (windows[:, :2] + windows[:, 2:]) / 2, windows[:, 2:3] - windows[:, 0:1]


def _squares(centres: np.ndarray, sides: np.ndarray) -> np.ndarray:
    return np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
