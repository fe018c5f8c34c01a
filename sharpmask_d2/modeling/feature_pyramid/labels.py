"""Which windows of a feature pyramid learn, and what.

Shape letters: B images, T windows of an image, N sampled windows, P of them near objects, G objects of an image, M mask side.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...windows.geometry import label_windows, object_windows, window_offsets
from ...windows.targets import balance_windows, mask_targets
from .grid import PyramidWindows

# Share of the distance at which windows become negative within which they are fully positive.
_FULL = 0.25


class WindowSample(NamedTuple):
    """Windows that pay losses, kind by kind: images and numbers of windows, (N,) int64; labels (N,): 1, 0 or, if they do not learn a
    score, -1; near (N,) bool: not negative; around (N,) bool: they learn a mask; targets (P, M, M) bool: the masks of the near ones."""

    images: Tensor
    numbers: Tensor
    labels: Tensor
    near: Tensor
    around: Tensor
    targets: Tensor


class PyramidSampler:
    """Draws the windows of images that pay losses.

    Positive and negative windows, by the label rule, learn scores. Positive ones and others around an object learn its mask. These, some
    that are farther from objects, and negatives learn how good their masks are.
    """

    def __init__(
        self,
        *,
        geometry: PyramidWindows,
        label_rule: dict,
        mask_rule: dict,
        windows_per_image: int,
        positive_fraction: float,
        hard_fraction: float,
    ):
        """
        Args:
            geometry: where windows lie.
            label_rule: the keywords of `windows.label_windows`.
            mask_rule: positive_shift and positive_octaves of the windows that learn masks, not below those of the label rule nor above the
                limits of negatives.
            windows_per_image: windows of an image that learn scores, at most.
            positive_fraction: share of them that is positive, at most. At most as many learn masks, and half as many more qualities.
            hard_fraction: see `window_targets.balance_windows`.
        """
        self.geometry = geometry
        self.label_rule, self.mask_rule = label_rule, mask_rule
        self.windows_per_image, self.positive_fraction = windows_per_image, positive_fraction
        self.hard_fraction = hard_fraction

    def __call__(self, scores: Tensor, sizes: list, gt_instances: list, mask_size: int) -> WindowSample:
        """
        Args:
            scores: (B, T) logits, -inf for cells outside of an image.
            sizes: (Y, X) of each level.
            gt_instances: Instances of each image with gt_boxes and, where there are objects, gt_masks, in the frame of the windows.
            mask_size: M.
        """
        cells = self.geometry.cells(torch.arange(scores.shape[1], device=scores.device), sizes)
        windows = self.geometry.windows(cells)
        patches = self.geometry.patches(windows)
        most = int(self.windows_per_image * self.positive_fraction)
        parts, targets = [], [windows.new_zeros((0, mask_size, mask_size), dtype=torch.bool)]
        for number, (gt, image_scores) in enumerate(zip(gt_instances, scores)):
            labels, around, objects = self.label(patches, gt.gt_boxes.tensor, image_scores != -math.inf)
            positives, negatives = balance_windows(
                labels,
                cells.levels,
                image_scores,
                num_windows=self.windows_per_image,
                positive_fraction=self.positive_fraction,
                hard_fraction=self.hard_fraction,
            )
            others = (around & (labels != 1)).nonzero()[:, 0]
            others = others[torch.randperm(len(others), device=others.device)[: most - len(positives)]]
            # Of those farther from an object, the ones that would be proposed.
            rated = ((objects >= 0) & ~around).nonzero()[:, 0]
            rated = rated[image_scores[rated].topk(min(most // 2, len(rated))).indices]
            near = torch.cat([positives, others, rated])
            chosen = torch.cat([near, negatives])
            is_near = torch.arange(len(chosen), device=chosen.device) < len(near)
            parts.append((torch.full_like(chosen, number), chosen, labels[chosen], is_near, around[chosen]))
            if len(near):
                targets.append(mask_targets(gt.gt_masks, objects[near], windows[near], mask_size))
        joined, targets = [torch.cat(x) for x in zip(*parts)], torch.cat(targets)
        _, numbers, _, near, _ = joined
        order = cells.kinds[numbers].argsort(stable=True)
        place_among_near = near.cumsum(0) - 1
        return WindowSample(*(x[order] for x in joined), targets[place_among_near[order][near[order]]])

    def score_targets(self, scores: Tensor, sizes: list, gt_instances: list) -> Tensor:
        """What the scores of all windows learn.

        A window within a quarter of the distance from which it is negative by the label rule has a target of 1, from there on the target
        falls linearly to 0. Objects that are too small for the smallest window count as large enough. In images whose annotations are
        not exhaustive (a field `gt_exhaustive`), the target of a window that is far from every object is known only inside an object's
        canonical window: elsewhere there may be an object that nobody annotated.

        Args:
            scores: (B, T) logits, -inf for cells outside of an image.
            sizes: (Y, X) of each level.
            gt_instances: Instances of each image with gt_boxes in the frame of the windows.

        Returns:
            (B, T) float32 in 0..1, -1 where a window learns nothing.
        """
        cells = self.geometry.cells(torch.arange(scores.shape[1], device=scores.device), sizes)
        patches, size = self.geometry.patches(self.geometry.windows(cells)), self.geometry.window_size
        targets = []
        for gt, image_scores in zip(gt_instances, scores):
            boxes = enlarged(gt.gt_boxes.tensor, self.geometry.smallest_object)
            target = torch.zeros_like(image_scores)
            if len(boxes):
                shift, octaves = window_offsets(patches, boxes, size)
                distance = torch.maximum(
                    shift / self.label_rule["negative_shift"], octaves / self.label_rule["negative_octaves"]
                ).amin(dim=1)
                target = ((1 - distance) / (1 - _FULL)).clamp(0, 1)
            if gt.has("gt_exhaustive"):
                far = (target == 0).nonzero()[:, 0]
                target[far[~_within(patches[far], object_windows(boxes, size))]] = -1
            targets.append(target.masked_fill(image_scores == -math.inf, -1))
        return torch.stack(targets)

    def label(self, patches: Tensor, boxes: Tensor, inside: Tensor) -> tuple:
        """Label the windows of an image.

        Args:
            patches: (T, 4) XYXY of the windows, see `PyramidWindows.patches`.
            boxes: (G, 4) XYXY of the objects.
            inside: (T,) bool, windows whose cell is in the image.

        Returns:
            labels (T,) by the label rule: 1 positive, 0 negative, -1 neither; around (T,) bool: near enough to an object to learn its mask;
            objects (T,) of all windows inside that are not negative, -1 for the others.
        """
        size, rule = self.geometry.window_size, self.label_rule
        limits = {"positive_shift": rule["negative_shift"], "positive_octaves": rule["negative_octaves"]}
        labels, objects = label_windows(patches, boxes, size, **{**rule, **limits})
        labels, objects = labels.masked_fill(~inside, -1), objects.masked_fill(~inside, -1)
        near, around = (objects >= 0).nonzero()[:, 0], torch.zeros_like(inside)
        if len(near):
            closer, objects_around = label_windows(patches[near], boxes, size, **{**rule, **self.mask_rule})
            positive, objects_of_positive = label_windows(patches[near], boxes, size, **rule)
            labels[near] = torch.where(positive == 1, 1, -1)
            around[near] = closer == 1
            # The nearest object depends on how shift and scale are weighed: the strictest rule that a window meets decides.
            nearest = torch.where(closer == 1, objects_around, objects[near])
            objects[near] = torch.where(positive == 1, objects_of_positive, nearest)
        return labels, around, objects


def enlarged(boxes: Tensor, smallest: float) -> Tensor:
    """Boxes (G, 4) XYXY about their centres, scaled up where the larger side is below `smallest` pixels to have that side."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    sides = boxes[:, 2:] - boxes[:, :2]
    half = sides * (smallest / sides.amax(dim=1, keepdim=True).clamp(min=1e-6)).clamp(min=1) / 2
    return torch.cat([centres - half, centres + half], dim=1)


def _within(windows: Tensor, others: Tensor) -> Tensor:
    """(N,) bool: which windows (N, 4) XYXY lie inside one of the others (G, 4)."""
    low = (windows[:, None, :2] >= others[None, :, :2]).all(dim=2)
    high = (windows[:, None, 2:] <= others[None, :, 2:]).all(dim=2)
    return (low & high).any(dim=1)
