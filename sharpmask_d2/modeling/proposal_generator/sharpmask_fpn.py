"""SharpMask on a feature pyramid: one pass of the backbone, windows on every level, refinement with finer levels.

Shape letters: B images, L levels, C channels, Y X cells of a level, D kinds of windows, T windows of an image, N sampled or chosen windows,
P positive ones, M mask side.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ...structures import WindowMasks, build_proposals
from ...structures.mask_nms import log_to_logit
from ..feature_table import FeatureTable
from ..losses import mask_iou, mask_loss, score_loss
from ..pyramid_heads import WindowDecoder, WindowScores, coarser_levels
from ..window_targets import balance_windows, mask_targets
from ..windows import canonical_size, centred_windows, label_windows, pyramid_sizes
from .targets import aside, check_masks, log_windows


class Pyramid(NamedTuple):
    """What is computed once for a batch: L features (B, C, Y, X), fine to coarse; extents (B, L, 2), see `FeatureTable`; score logits
    (B, T), level by level, kind by kind, row by row, -inf for cells outside of an image; and the grids' sizes (Y, X)."""

    features: list
    extents: Tensor
    scores: Tensor
    sizes: list


def _inside(feature: Tensor, extents: Tensor) -> Tensor:
    """Which cells of a level (B, C, Y, X) belong to their image, of extents (B, 2): (B, 1, Y, X) bool."""
    rows, columns = (torch.arange(side, device=feature.device) for side in feature.shape[2:])
    return (rows < extents[:, :1])[:, None, :, None] & (columns < extents[:, 1:])[:, None, None]


class Cells(NamedTuple):
    """Windows by their cells, all (N,) int64: level, kind, row, column."""

    levels: Tensor
    kinds: Tensor
    ys: Tensor
    xs: Tensor


class Sample(NamedTuple):
    """Windows that pay losses. images and places in `Pyramid.scores`, (N,) int64; labels (N,): 1, 0 or, if they do not learn a score, -1;
    near (N,) bool: not negative; around (N,) bool: they learn a mask; targets (P, M, M) bool: the masks of the near ones."""

    images: Tensor
    places: Tensor
    labels: Tensor
    near: Tensor
    around: Tensor
    targets: Tensor


@PROPOSAL_GENERATOR_REGISTRY.register()
class SharpMaskFPN(nn.Module):
    """Segment proposals from a feature pyramid (FPN, section 6) with SharpMask's refinement on top.

    It reads the features of the detector's backbone, which it trains along unless it is frozen.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list,
        strides: list,
        extra_levels: int,
        window_cells: list,
        object_share: float,
        scores: WindowScores,
        decoder: WindowDecoder,
        window_size: int,
        label_rule: dict,
        mask_rule: dict,
        windows_per_image: int,
        positive_fraction: float,
        hard_fraction: float,
        num_proposals: int,
        mask_threshold: float,
        nms_thresh: float,
        mask_nms: bool,
        windows_per_batch: int,
        mask_loss_weight: float,
        score_loss_weight: float,
        quality_loss_weight: float,
        frozen: bool,
    ):
        """
        Args:
            in_features: L' names of the backbone's features, fine to coarse.
            strides: of these, in pixels.
            extra_levels: levels made by halving the coarsest of them; with them there are L.
            window_cells: side of each kind of window in cells of its level; two that differ by a half octave cover all sizes.
            object_share: larger side of an object that fits its window canonically, as a share of the window's.
            scores: gives the scores of all windows.
            decoder: gives the masks of chosen windows.
            window_size: side of the patch that the label rule speaks of, in its pixels.
            label_rule: the keywords of `windows.label_windows`.
            mask_rule: positive_shift and positive_octaves of the windows that learn masks, not below those of the label rule nor above the
                limits of negatives.
            windows_per_image: windows of an image that learn scores, at most.
            positive_fraction: share of them that is positive, at most. At most as many learn masks, and half as many more qualities.
            hard_fraction: see `window_targets.balance_windows`.
            num_proposals: most proposals of an image.
            mask_threshold: probability above which a pixel is foreground.
            nms_thresh: IoU of boxes above which the lower score goes; 1 keeps all.
            mask_nms: see `structures.build_proposals`.
            windows_per_batch: windows whose masks are made at a time.
            mask_loss_weight, score_loss_weight, quality_loss_weight: factors of the losses.
            frozen: no losses, no gradients.

        Raises:
            ValueError: an even number of cells, or strides that do not double.
        """
        super().__init__()
        if any(cells % 2 == 0 for cells in window_cells):
            raise ValueError(
                f"MODEL.SHARPMASK.FPN.WINDOW_CELLS is {list(window_cells)}: windows lie around a cell, so they have odd sides"
            )
        if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:])):
            raise ValueError(
                f"MODEL.SHARPMASK.FPN.IN_FEATURES: {list(in_features)} have strides {list(strides)}, each has to be twice the one before"
            )
        self.in_features, self.window_cells = list(in_features), list(window_cells)
        self.extra_levels, self.object_share = extra_levels, object_share
        self.strides = [*strides, *(strides[-1] * 2 ** (i + 1) for i in range(extra_levels))]
        self.scores, self.decoder = scores, decoder
        self.window_size, self.label_rule, self.mask_rule = window_size, label_rule, mask_rule
        self.windows_per_image, self.positive_fraction = windows_per_image, positive_fraction
        self.hard_fraction = hard_fraction
        self.num_proposals = num_proposals
        self.mask_threshold = math.log(mask_threshold / (1 - mask_threshold))
        self.nms_thresh, self.mask_nms, self.windows_per_batch = nms_thresh, mask_nms, windows_per_batch
        self.loss_weights = {
            "loss_sharpmask_mask": mask_loss_weight,
            "loss_sharpmask_score": score_loss_weight,
            "loss_sharpmask_quality": quality_loss_weight,
        }
        self.frozen = frozen
        if frozen:
            self.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg, input_shape):
        sharpmask = cfg.MODEL.SHARPMASK
        fpn, rule, refinement = sharpmask.FPN, sharpmask.LABELS, sharpmask.REFINEMENT
        if missing := [name for name in fpn.IN_FEATURES if name not in input_shape]:
            raise ValueError(
                f"MODEL.SHARPMASK.FPN.IN_FEATURES: the backbone has no {missing}, its features are {list(input_shape)}"
            )
        channels = {input_shape[name].channels for name in fpn.IN_FEATURES}
        if len(channels) > 1:
            raise ValueError(
                f"MODEL.SHARPMASK.FPN.IN_FEATURES: {fpn.IN_FEATURES} differ in their channels, {sorted(channels)}: one head reads them all"
            )
        (channels,) = channels
        return {
            "in_features": fpn.IN_FEATURES,
            "strides": [input_shape[name].stride for name in fpn.IN_FEATURES],
            "extra_levels": fpn.EXTRA_LEVELS,
            "window_cells": fpn.WINDOW_CELLS,
            "object_share": fpn.OBJECT_SHARE,
            "scores": WindowScores(in_channels=channels, channels=fpn.SCORE_CHANNELS, window_cells=fpn.WINDOW_CELLS),
            "decoder": WindowDecoder(
                in_channels=channels,
                window_cells=fpn.WINDOW_CELLS,
                embed_dim=sharpmask.EMBED_DIM,
                num_refinements=fpn.NUM_REFINEMENTS,
                channels=refinement.CHANNELS,
                schedule=refinement.SCHEDULE,
                upsampling=refinement.UPSAMPLING,
                quality=fpn.QUALITY,
            ),
            "window_size": sharpmask.WINDOW_SIZE,
            "label_rule": {
                "positive_shift": rule.POSITIVE_SHIFT,
                "positive_octaves": rule.POSITIVE_OCTAVES,
                "negative_shift": rule.NEGATIVE_SHIFT,
                "negative_octaves": rule.NEGATIVE_OCTAVES,
            },
            "mask_rule": {"positive_shift": fpn.MASK_SHIFT, "positive_octaves": fpn.MASK_OCTAVES},
            "windows_per_image": sharpmask.GENERATOR.WINDOWS_PER_IMAGE,
            "positive_fraction": sharpmask.GENERATOR.POSITIVE_FRACTION,
            "hard_fraction": fpn.HARD_FRACTION,
            "num_proposals": sharpmask.TEST.NUM_PROPOSALS,
            "mask_threshold": sharpmask.TEST.MASK_THRESHOLD,
            "nms_thresh": sharpmask.TEST.NMS_THRESH,
            "mask_nms": sharpmask.TEST.MASK_NMS,
            "windows_per_batch": sharpmask.TEST.WINDOWS_PER_BATCH,
            "mask_loss_weight": sharpmask.MASK_LOSS_WEIGHT,
            "score_loss_weight": sharpmask.SCORE_LOSS_WEIGHT,
            "quality_loss_weight": fpn.QUALITY_LOSS_WEIGHT,
            "frozen": sharpmask.GENERATOR.FROZEN,
        }

    def forward(self, images: ImageList, features: dict, gt_instances=None) -> tuple:
        """
        Args:
            images: of which only the sizes are read.
            features: of the backbone, name -> (B, C, h, w).
            gt_instances: Instances of each image with gt_boxes and gt_masks in the frame of the resized image; read in training unless
                the generator is frozen.

        Returns:
            list[Instances], one an image, in the frame of the resized image, best first (see `structures.build_proposals`). In training
            with ground truth they have no `proposal_masks`: Detectron2 joins them with the ground truth, which has none.
            A dict of losses: loss_sharpmask_mask, loss_sharpmask_score, loss_sharpmask_quality; empty in evaluation or when frozen.

        Raises:
            ValueError: training without ground truth or its masks.
        """
        trains = self.training and not self.frozen
        pyramid = self.pyramid(images.image_sizes, features)
        losses = self.losses(pyramid, gt_instances) if trains else {}
        with aside():
            proposals = self.propose(pyramid, images.image_sizes)
        if self.training and gt_instances is not None:
            for proposed in proposals:
                proposed.remove("proposal_masks")
        return proposals, losses

    def pyramid(self, image_sizes: list, features: dict) -> Pyramid:
        """All levels of a batch and the scores of their windows, these without gradients.

        Args:
            image_sizes: (height, width) of each image in pixels, without the batch's padding.
            features: name -> (B, C, h, w).
        """
        levels = [features[name] for name in self.in_features]
        extents = torch.tensor([pyramid_sizes(size, self.strides) for size in image_sizes], device=levels[0].device)
        coarsest = _inside(levels[-1], extents[:, len(levels) - 1])
        levels += coarser_levels(levels[-1], coarsest.to(levels[-1].dtype), self.extra_levels)
        scores = []
        for number, feature in enumerate(levels):
            inside = _inside(feature, extents[:, number])
            with aside():
                grid = self.scores(feature, inside.to(feature.dtype)).float()
            scores.append(grid.masked_fill(~inside, -math.inf).flatten(1))
        return Pyramid(levels, extents, torch.cat(scores, dim=1), [tuple(x.shape[2:]) for x in levels])

    def cells(self, numbers: Tensor, sizes: list) -> Cells:
        """From the places of windows in `Pyramid.scores`, (N,), to their cells."""
        kinds = len(self.window_cells)
        counts = torch.tensor([kinds * rows * columns for rows, columns in sizes], device=numbers.device)
        ends = counts.cumsum(0)
        levels = torch.searchsorted(ends, numbers, right=True)
        rows, columns = torch.tensor(sizes, device=numbers.device).T
        inside = numbers - (ends - counts)[levels]
        kind, cell = inside // (rows * columns)[levels], inside % (rows * columns)[levels]
        return Cells(levels, kind, cell // columns[levels], cell % columns[levels])

    def windows(self, cells: Cells) -> Tensor:
        """(N, 4) XYXY in the frame of the image, in pixels."""
        strides, sides = (torch.tensor(x, device=cells.ys.device) for x in (self.strides, self.window_cells))
        return centred_windows(cells.ys, cells.xs, strides[cells.levels], sides[cells.kinds])

    def patches(self, windows: Tensor) -> Tensor:
        """Patches (N, 4) XYXY in which an object that fits a window has the size and place that the label rule asks for."""
        factor = self.object_share * self.window_size / canonical_size(self.window_size)
        centres, half = (windows[:, :2] + windows[:, 2:]) / 2, (windows[:, 2:] - windows[:, :2]) * (factor / 2)
        return torch.cat([centres - half, centres + half], dim=1)

    def losses(self, pyramid: Pyramid, gt_instances: list) -> dict:
        """Losses of a sample of the windows: see `forward`."""
        check_masks(gt_instances, len(pyramid.scores))
        sample = self._sample(pyramid, gt_instances)
        images, cells, near = sample.images, self.cells(sample.places, pyramid.sizes), sample.near
        table = FeatureTable(pyramid.features, pyramid.extents, self.strides)
        cuts = self._cut(table, images, cells)
        # Not the scores of the whole grid: most of it pays nothing, and its gradient is dear.
        scores = torch.cat([self.scores.of_windows(*cut, kind) for kind, cut in enumerate(cuts)])
        embeddings = self.decoder.embeddings([cut for cut, _ in cuts])
        skips = self.decoder.horizontal(pyramid.features, pyramid.extents, self.strides)
        masks = self.decoder.masks(embeddings[near], skips, images[near], cells.levels[near], self.windows(cells)[near])
        quality = None if self.decoder.quality is None else self.decoder.quality(embeddings)[:, 0]
        known, around = sample.labels != -1, sample.around[near]
        log_windows(scores[known], sample.labels[known], masks[around], sample.targets[around], len(gt_instances))
        return self._weighted(sample, scores, masks, quality)

    def _sample(self, pyramid: Pyramid, gt_instances: list) -> Sample:
        """Windows that pay losses, kind by kind."""
        cells = self.cells(torch.arange(pyramid.scores.shape[1], device=pyramid.scores.device), pyramid.sizes)
        windows, size = self.windows(cells), self.decoder.mask_size
        patches = self.patches(windows)
        most = int(self.windows_per_image * self.positive_fraction)
        parts, targets = [], [windows.new_zeros((0, size, size), dtype=torch.bool)]
        for number, (gt, scores) in enumerate(zip(gt_instances, pyramid.scores)):
            labels, around, objects = self._label(patches, gt.gt_boxes.tensor, scores > -math.inf)
            positives, negatives = balance_windows(
                labels,
                cells.levels,
                scores,
                num_windows=self.windows_per_image,
                positive_fraction=self.positive_fraction,
                hard_fraction=self.hard_fraction,
            )
            others = (around & (labels != 1)).nonzero()[:, 0]
            others = others[torch.randperm(len(others), device=others.device)[: most - len(positives)]]
            # Of those farther from an object, which only learn how good their masks are, the ones that would be proposed.
            rated = ((objects >= 0) & ~around).nonzero()[:, 0]
            rated = rated[scores[rated].topk(min(most // 2, len(rated))).indices]
            near = torch.cat([positives, others, rated])
            chosen = torch.cat([near, negatives])
            is_near = torch.arange(len(chosen), device=chosen.device) < len(near)
            parts.append(Sample(torch.full_like(chosen, number), chosen, labels[chosen], is_near, around[chosen], None))
            if len(near):
                targets.append(mask_targets(gt.gt_masks, objects[near], windows[near], size))
        joined = Sample(*(torch.cat(x) for x in list(zip(*parts))[:-1]), torch.cat(targets))
        order = cells.kinds[joined.places].argsort(stable=True)
        place = joined.near.cumsum(0) - 1
        return Sample(*(x[order] for x in joined[:-1]), joined.targets[place[order][joined.near[order]]])

    def _label(self, patches: Tensor, boxes: Tensor, inside: Tensor) -> tuple:
        """Labels of windows, given by their patches (T, 4).

        Returns:
            labels (T,) by the label rule; whether they are around an object, whose mask they learn, (T,) bool; objects (T,), of all windows
            that are not negative, else -1.
        """
        rule = self.label_rule
        limits = {"positive_shift": rule["negative_shift"], "positive_octaves": rule["negative_octaves"]}
        labels, objects = label_windows(patches, boxes, self.window_size, **{**rule, **limits})
        labels = labels.masked_fill(~inside, -1)
        objects = objects.masked_fill(~inside, -1)
        near = (objects >= 0).nonzero()[:, 0]
        around = torch.zeros_like(inside)
        labels[near] = -1
        if len(near):
            closer, objects_around = label_windows(patches[near], boxes, self.window_size, **{**rule, **self.mask_rule})
            around[near] = closer == 1
            objects[near] = torch.where(closer == 1, objects_around, objects[near])
            positive, objects_of_positive = label_windows(patches[near], boxes, self.window_size, **rule)
            labels[near] = torch.where(positive == 1, 1, -1)
            objects[near] = torch.where(positive == 1, objects_of_positive, objects[near])
        return labels, around, objects

    def _cut(self, table: FeatureTable, images: Tensor, cells: Cells) -> list:
        """What `FeatureTable.cut` gives for each kind of the windows, which come kind by kind."""
        counts = torch.bincount(cells.kinds, minlength=len(self.window_cells)).tolist()
        parts = zip(*(x.split(counts) for x in (images, cells.levels, cells.ys, cells.xs)))
        return [table.cut(*part, side) for part, side in zip(parts, self.window_cells)]

    def _weighted(self, sample: Sample, scores: Tensor, masks: Tensor, quality) -> dict:
        losses = {
            "loss_sharpmask_mask": mask_loss(masks, sample.targets, sample.around[sample.near]),
            "loss_sharpmask_score": score_loss(scores, sample.labels == 1, sample.labels != -1),
        }
        if quality is not None:
            overlaps = torch.zeros_like(scores, dtype=torch.float32)
            overlaps[sample.near] = mask_iou(masks, sample.targets, self.mask_threshold)
            losses["loss_sharpmask_quality"] = score_loss(quality, overlaps, torch.ones_like(sample.near))
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}

    def propose(self, pyramid: Pyramid, image_sizes: list) -> list:
        """The best windows of each image as proposals: see `forward`."""
        table = FeatureTable(pyramid.features, pyramid.extents, self.strides)
        skips = self.decoder.horizontal(pyramid.features, pyramid.extents, self.strides)
        return [
            self._propose_image(number, tuple(size), pyramid, table, skips) for number, size in enumerate(image_sizes)
        ]

    def _propose_image(
        self, number: int, image_size: tuple, pyramid: Pyramid, table: FeatureTable, skips: list
    ) -> Instances:
        scores, chosen = pyramid.scores[number].topk(min(self.num_proposals, pyramid.scores.shape[1]))
        cells = self.cells(chosen, pyramid.sizes)
        by_kind = cells.kinds.argsort(stable=True)
        scores, cells = scores[by_kind], Cells(*(x[by_kind] for x in cells))
        windows, images = self.windows(cells), torch.full_like(chosen, number)
        masks, quality = [], []
        for part in torch.arange(len(chosen), device=chosen.device).split(self.windows_per_batch):
            cuts = self._cut(table, images[part], Cells(*(x[part] for x in cells)))
            embeddings = self.decoder.embeddings([cut for cut, _ in cuts])
            masks.append(self.decoder.masks(embeddings, skips, images[part], cells.levels[part], windows[part]))
            if self.decoder.quality is not None:
                quality.append(self.decoder.quality(embeddings)[:, 0])
        masks = torch.cat(masks)
        if quality:
            # The logit of the product of both probabilities.
            scores = log_to_logit(F.logsigmoid(scores) + F.logsigmoid(torch.cat(quality).float()))
        scores, order = scores.sort(descending=True)
        window_masks = WindowMasks(masks[order], windows[order], image_size, threshold=self.mask_threshold)
        return build_proposals(scores, window_masks, nms_thresh=self.nms_thresh, mask_nms=self.mask_nms)
