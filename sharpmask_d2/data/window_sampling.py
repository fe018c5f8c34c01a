"""Draws the windows of an image from which training patches are cut.

Shape letters: G objects, P windows.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from ..windows.geometry import object_windows
from ..windows.labels import label_windows
from .objects import ImageObjects

# Number of candidates per negative window. If none of them is negative, the first one is used, as in the released code.
_TRIES = 100


class WindowSamples(NamedTuple):
    """P windows of an image with their labels."""

    windows: np.ndarray  # (P, 4) float64, XYXY squares in pixels of the image
    labels: np.ndarray  # (P,) int64, 1 for a positive and 0 for a negative window
    objects: np.ndarray  # (P,) int64, index of the object of a positive window, -1 for a negative one
    in_mask_loss: np.ndarray  # (P,) bool, whether the window contributes to the mask loss
    in_score_loss: np.ndarray  # (P,) bool, whether the window contributes to the score loss


class WindowSampler:
    """Draws the training windows of an image (DeepMask, section 3.2; in the released code: mask samples and score samples).

    A share of the P windows are positives with jitter of position and scale, which contribute to the mask loss. As in the released code,
    the other windows contribute to the score loss, and half of them are positives without jitter, half negatives. As in the paper
    (`shared_positives`), all windows contribute to the score loss, and the others are negatives.
    """

    def __init__(
        self,
        *,
        window_size: int,
        exponents: list[float],
        mask_fraction: float,
        shared_positives: bool,
        near_negatives: float,
        label_rule: dict[str, float],
    ):
        """
        Args:
            window_size: side of a window in pixels of the patch.
            exponents: scales of the pyramid as exponents of 2; negatives are drawn between the lowest and the highest.
            mask_fraction: share of the windows, 0..1, that are positives with jitter and contribute to the mask loss.
            shared_positives: whether these windows also contribute to the score loss, as in the paper.
            near_negatives: share of the negatives, 0..1, that are drawn around an object; the others are drawn anywhere in the image.
            label_rule: keyword arguments of `windows.labels.label_windows`.
        """
        self.window_size = window_size
        self.exponents = (min(exponents) - 0.25, max(exponents) + 0.25)
        self.mask_fraction = mask_fraction
        self.shared_positives = shared_positives
        self.near_negatives = near_negatives
        self.label_rule = dict(label_rule)

    def __call__(
        self,
        objects: ImageObjects,
        weights: np.ndarray,
        image_size: tuple[int, int],
        count: int,
        rng: np.random.Generator,
    ) -> WindowSamples:
        """Draws the windows of an image.

        Args:
            objects: of the image.
            weights: (G,) relative frequency with which each object is drawn; zero for objects that are not training targets.
            image_size: (height, width) in pixels.
            count: P.
            rng: source of all random numbers.

        Returns:
            The windows; all of them are negative if there is no target.
        """
        masks = _round_randomly(count * self.mask_fraction, rng) if weights.any() else 0
        unjittered = 0
        if not self.shared_positives and weights.any():
            unjittered = _round_randomly((count - masks) / 2, rng)
        chosen = (
            rng.choice(len(weights), size=masks + unjittered, p=weights / weights.sum())
            if masks + unjittered
            else np.zeros(0, int)
        )
        windows = np.concatenate(
            [
                self._jittered(objects.boxes[chosen[:masks]], rng),
                self._at_pyramid_levels(objects.boxes[chosen[masks:]]),
                self._negatives(objects, image_size, count - masks - unjittered, rng),
            ]
        )
        labels = np.arange(count) < masks + unjittered
        in_mask_loss = np.arange(count) < masks
        return WindowSamples(
            windows=windows,
            labels=labels.astype(np.int64),
            objects=np.concatenate([chosen, np.full(count - len(chosen), -1)]),
            in_mask_loss=in_mask_loss,
            in_score_loss=np.ones(count, bool) if self.shared_positives else ~in_mask_loss,
        )

    def _jittered(self, boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Canonical windows of objects, moved and scaled at random within the limits of positives."""
        rule, n = self.label_rule, len(boxes)
        centres, sides = _centres_and_sides(object_windows(torch.from_numpy(boxes).double(), self.window_size).numpy())
        sides = sides * 2.0 ** rng.uniform(-rule["positive_octaves"], rule["positive_octaves"], (n, 1))
        shift = rng.uniform(-rule["positive_shift"], rule["positive_shift"], (n, 2))
        return _squares(centres + shift * sides / self.window_size, sides)

    def _at_pyramid_levels(self, boxes: np.ndarray) -> np.ndarray:
        """Windows centred on objects, at the level of the pyramid that is nearest to their canonical scale."""
        centres, sides = _centres_and_sides(object_windows(torch.from_numpy(boxes).double(), self.window_size).numpy())
        # The levels of the pyramid are half octaves apart.
        exponents = np.round(2 * np.log2(self.window_size / sides)) / 2
        return _squares(centres, self.window_size / 2.0**exponents)

    def _negatives(
        self, objects: ImageObjects, image_size: tuple[int, int], count: int, rng: np.random.Generator
    ) -> np.ndarray:
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
        x, y = centres.reshape(-1, 2, 1).transpose(1, 0, 2)  # (candidates, 1) each, to be compared with all crowds
        boxes = objects.crowd_boxes
        in_crowd = (x >= boxes[:, 0]) & (x < boxes[:, 2]) & (y >= boxes[:, 1]) & (y < boxes[:, 3])
        negative &= ~in_crowd.any(axis=1)
        # argmax finds the first negative candidate, or the first candidate where none is negative.
        first = negative.reshape(count, _TRIES).argmax(axis=1)
        return candidates.reshape(count, _TRIES, 4)[np.arange(count), first]

    def _around(
        self, boxes: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Centres and sides of windows near the boundary between positive and negative of a random object."""
        canonical = object_windows(torch.from_numpy(boxes).double(), self.window_size).numpy()
        centres, sides = (part[rng.integers(len(boxes), size=shape)] for part in _centres_and_sides(canonical))
        reach = 2 * self.label_rule["negative_shift"]
        octaves = rng.uniform(-2, 2, (*shape, 1)) * self.label_rule["negative_octaves"]
        sides = sides * 2.0**octaves
        return centres + rng.uniform(-reach, reach, (*shape, 2)) * sides / self.window_size, sides


def _round_randomly(value: float, rng: np.random.Generator) -> int:
    """The whole number below or above `value`, drawn so that the mean is `value`."""
    return math.floor(value) + int(rng.random() < value - math.floor(value))


def _centres_and_sides(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (windows[:, :2] + windows[:, 2:]) / 2, windows[:, 2:3] - windows[:, 0:1]


def _squares(centres: np.ndarray, sides: np.ndarray) -> np.ndarray:
    return np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
