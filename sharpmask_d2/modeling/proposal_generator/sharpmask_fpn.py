"""SharpMask on a feature pyramid: one pass of the backbone, scores of windows on every level, masks of the windows of highest score.

Shape letters: B images, L levels, C channels, h w height and width of a feature, Y X cells of a level, D kinds of windows (sides in cells),
T windows of an image, N windows whose masks are decoded, G objects of an image, M mask side in cells.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple, Optional

import torch
from detectron2.config import configurable
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor

from ...errors import UserError
from ...windows.geometry import square_windows
from ...windows.targets import mask_targets
from ..exporting import NotExportable
from ..feature_pyramid.decoder import DecoderTables, SampledDecoder, jittered_windows
from ..feature_pyramid.grid import PyramidWindows, spread
from ..feature_pyramid.labels import enlarged, score_targets
from ..feature_pyramid.levels import cells_inside, common_channels, pyramid_levels
from ..feature_pyramid.scores import WindowScores
from ..image_randomness import image_generators
from ..layers import without_gradients
from ..losses import quality_focal_loss, refinement_losses
from ..segment_generator import SegmentGenerator, Windows
from .learnt import LearntGenerator, check_masks, log_windows

# Number of candidate windows for each proposal, from which `spread` chooses.
_CANDIDATES = 4
# Objects whose larger side is below this, in pixels of the resized image, do not contribute to the losses of masks.
_SMALLEST = 6.0


class PyramidFeatures(NamedTuple):
    """What the generator computes once per batch of images."""

    # (H, W) of each image in pixels, without the padding of the batch.
    image_sizes: list[tuple[int, int]]
    # L maps (B, C, Y, X), fine to coarse.
    levels: list[Tensor]
    # (B, T) score logits of all windows, level by level, kind by kind, row by row; -inf for cells outside of an image.
    scores: Tensor
    # (Y, X) of each level.
    sizes: list[tuple[int, int]]
    # The features that masks are decoded from.
    tables: DecoderTables


@PROPOSAL_GENERATOR_REGISTRY.register()
class SharpMaskFPN(SegmentGenerator, LearntGenerator, NotExportable):
    """Generates segment proposals from a feature pyramid (FPN, section 6), with the refinement of SharpMask.

    It reads the features of the detector's backbone. Unless it is frozen, its losses also train the backbone.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        geometry: PyramidWindows,
        scores: WindowScores,
        decoder: SampledDecoder,
        negative_shift: float,
        negative_octaves: float,
        mask_window: float,
        num_refined: int,
        mask_windows_per_image: int,
        mask_jitter: tuple[float, float],
        window_nms_thresh: float,
        mask_loss_weight: float,
        score_loss_weight: float,
        freeze_feedforward: bool,
        frozen: bool,
        **settings,
    ):
        """
        Args:
            in_features: names of the backbone's features, fine to coarse.
            geometry: geometry of the windows on L levels, which are those of the features and coarser ones that are computed from them.
            scores: computes the scores of all windows.
            decoder: decodes the masks of selected windows.
            negative_shift, negative_octaves: see `labels.score_targets`.
            mask_window: side of the window whose mask is decoded, in sides of the window that is scored.
            num_refined: maximum number of proposals per image whose masks are refined; those of highest score are.
            mask_windows_per_image: number of windows per image with objects that contribute to the losses of masks.
            mask_jitter: shift and octaves of these windows, see `jittered_windows`.
            window_nms_thresh: see `grid.spread`; 1 selects the windows of highest score.
            mask_loss_weight, score_loss_weight: factors of the losses.
            freeze_feedforward: whether the scores have no loss and no gradients, so that the decoder alone is trained (and the backbone,
                unless it is frozen, too).
            frozen: whether the generator has no losses and no gradients.
            settings: see `SegmentGenerator`.

        Raises:
            UserError: see `SegmentGenerator`; or `negative_shift` or `negative_octaves` is not above 0; the message names the config key.
        """
        super().__init__(**settings)
        for name, limit in (("SHIFT", negative_shift), ("OCTAVES", negative_octaves)):
            if limit <= 0:
                raise UserError(f"MODEL.SHARPMASK.FPN.LABELS.NEGATIVE_{name} is {limit}: it must be above 0")
        self.in_features, self.geometry = list(in_features), geometry
        self.scores, self.decoder = scores, decoder
        self.negative_shift, self.negative_octaves = negative_shift, negative_octaves
        self.mask_window, self.num_refined = mask_window, num_refined
        self.mask_windows_per_image, self.mask_jitter = mask_windows_per_image, mask_jitter
        self.window_nms_thresh = window_nms_thresh
        self.loss_weights = {
            "loss_sharpmask_mask": mask_loss_weight,
            "loss_sharpmask_score": score_loss_weight,
            "loss_sharpmask_dice": 1.0,
            "loss_sharpmask_side": 1.0,
        }
        self.freeze_feedforward, self.frozen = freeze_feedforward, frozen
        if freeze_feedforward:
            self.scores.requires_grad_(False)
        if frozen:
            self.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg, input_shape):
        sharpmask = cfg.MODEL.SHARPMASK
        fpn = sharpmask.FPN
        if missing := [name for name in fpn.IN_FEATURES if name not in input_shape]:
            raise UserError(
                f"MODEL.SHARPMASK.FPN.IN_FEATURES: the backbone has no {missing}, its features are {list(input_shape)}"
            )
        shapes = [input_shape[name] for name in fpn.IN_FEATURES]
        channels = common_channels(shapes, "MODEL.SHARPMASK.FPN.IN_FEATURES")
        return {
            "in_features": fpn.IN_FEATURES,
            "geometry": PyramidWindows.from_config(cfg, [shape.stride for shape in shapes]),
            "scores": WindowScores(in_channels=channels, channels=fpn.SCORE_CHANNELS, window_cells=fpn.WINDOW_CELLS),
            "decoder": SampledDecoder.from_config(cfg, channels),
            "negative_shift": fpn.LABELS.NEGATIVE_SHIFT,
            "negative_octaves": fpn.LABELS.NEGATIVE_OCTAVES,
            "mask_window": fpn.MASK_WINDOW,
            "num_refined": fpn.NUM_REFINED,
            "mask_windows_per_image": fpn.MASK_WINDOWS_PER_IMAGE,
            "mask_jitter": (fpn.MASK_JITTER_SHIFT, fpn.MASK_JITTER_OCTAVES),
            "window_nms_thresh": fpn.WINDOW_NMS_THRESH,
            "mask_loss_weight": sharpmask.MASK_LOSS_WEIGHT,
            "score_loss_weight": sharpmask.SCORE_LOSS_WEIGHT,
            "freeze_feedforward": sharpmask.FREEZE_FEEDFORWARD,
            "frozen": sharpmask.GENERATOR.FROZEN,
            **cls.test_settings(cfg),
        }

    @property
    def strides(self) -> list[int]:
        """Strides of the L levels in pixels."""
        return self.geometry.strides

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: Optional[list[Instances]] = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Generates the proposals of a batch of images, and in training the losses of the generator.

        Args:
            images: B images; only their sizes are read.
            features: features of the backbone, name -> (B, C, h, w).
            gt_instances: one `Instances` per image with gt_boxes and gt_masks in the frame of the resized image; read in training unless
                the generator is frozen. Default: None.

        Returns:
            One `Instances` per image in the frame of the resized image, best first (see `SegmentGenerator.postprocess`). In training with
            ground truth they have no `proposal_masks`, because Detectron2 concatenates them with the ground truth, which has no such field.
            And a dict of losses, empty in evaluation and if the generator is frozen: loss_sharpmask_mask and loss_sharpmask_dice of the
            masks, loss_sharpmask_side of the coarse and intermediate masks, and loss_sharpmask_score of the scores, unless the
            feed-forward part is frozen.

        Raises:
            UserError: training without ground truth or without its masks, or training of a detector on a frozen generator without weights.
        """
        self.check_not_traced()
        trains = self.training and not self.frozen
        if self.training:
            self.check_weights()
        encoded = self.encode(images.image_sizes, features)
        losses = self.losses(encoded, gt_instances) if trains else {}
        proposals = self.propose(encoded)
        if self.training and gt_instances is not None:
            for proposed in proposals:
                proposed.remove("proposal_masks")
        return proposals, losses

    def encode(self, image_sizes: list[tuple[int, int]], features: dict[str, Tensor]) -> PyramidFeatures:
        """Computes the scores of all windows of a batch, and the features that masks are decoded from.

        The result has gradients in training, unless the generator is frozen.

        Args:
            image_sizes: (H, W) of each image in pixels, without the padding of the batch.
            features: features of the backbone, name -> (B, C, h, w).
        """
        with nullcontext() if self.training and not self.frozen else without_gradients():
            levels, extents = pyramid_levels([features[name] for name in self.in_features], image_sizes, self.strides)
            scores = []
            for number, feature in enumerate(levels):
                inside = cells_inside(feature, extents[:, number])
                # Not below the least number: minus infinity is the mark of cells outside, also where training has diverged.
                grid = self.scores(feature, inside.to(feature.dtype)).float().clamp(min=torch.finfo(torch.float32).min)
                scores.append(grid.masked_fill(~inside, -math.inf).flatten(1))
            tables = self.decoder.tables(levels, extents, self.strides)
        sizes = [tuple(x.shape[2:]) for x in levels]
        return PyramidFeatures(list(image_sizes), levels, torch.cat(scores, dim=1), sizes, tables)

    def losses(self, features: PyramidFeatures, gt_instances: list[Instances]) -> dict[str, Tensor]:
        """Computes the losses of the scores of all windows, and of the masks of windows that are drawn around the objects.

        Args:
            features: from `encode`, with gradients.
            gt_instances: see `forward`.

        Returns:
            The losses by name, weighted: see `forward`.

        Raises:
            UserError: there is no ground truth for every image, or it has no masks.
        """
        check_masks(gt_instances, len(features.scores))
        scores = features.scores.flatten()
        labels = self._labels(features, gt_instances).flatten()
        masks, targets = self._masks_and_targets(features, gt_instances)
        clear = (labels == 0) | (labels == 1)
        log_windows(scores[clear], labels[clear], masks[-1], targets, len(gt_instances))
        losses = {f"loss_sharpmask_{name}": loss for name, loss in refinement_losses(masks, targets).items()}
        if not self.freeze_feedforward:
            losses["loss_sharpmask_score"] = quality_focal_loss(scores, labels)
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}

    @torch.no_grad()
    def _labels(self, features: PyramidFeatures, gt_instances: list[Instances]) -> Tensor:
        """(B, T) float32: see `score_targets`; also -1 for cells outside an image."""
        numbers = torch.arange(features.scores.shape[1], device=features.scores.device)
        windows = self.geometry.windows(self.geometry.cells(numbers, features.sizes))
        labels = [
            score_targets(
                windows,
                enlarged(gt.gt_boxes.tensor, self.geometry.smallest_object),
                share=self.geometry.object_share,
                negative_shift=self.negative_shift,
                negative_octaves=self.negative_octaves,
                exhaustive=not gt.has("gt_exhaustive"),
            )
            for gt in gt_instances
        ]
        return torch.stack(labels).masked_fill(features.scores == -math.inf, -1)

    def _masks_and_targets(
        self, features: PyramidFeatures, gt_instances: list[Instances]
    ) -> tuple[list[Tensor], Tensor]:
        """Masks of N windows that are drawn around the objects, from `SampledDecoder.forward`, and their targets (N, M, M) bool."""
        shift, octaves = self.mask_jitter
        windows, owners, targets = [], [], []
        generators = image_generators(len(gt_instances), features.scores.device)
        for number, (gt, generator) in enumerate(zip(gt_instances, generators)):
            boxes = gt.gt_boxes.tensor
            large = ((boxes[:, 2:] - boxes[:, :2]).amax(dim=1) >= _SMALLEST).nonzero()[:, 0]
            drawn, objects = jittered_windows(
                enlarged(boxes[large], self.geometry.smallest_object),
                count=self.mask_windows_per_image,
                share=self.mask_share,
                shift=shift,
                octaves=octaves,
                generator=generator,
            )
            windows.append(drawn)
            owners.append(torch.full_like(objects, number))
            if len(drawn):
                targets.append(mask_targets(gt.gt_masks, large[objects], drawn, self.decoder.mask_size))
        windows, owners = torch.cat(windows), torch.cat(owners)
        side = self.decoder.mask_size
        targets = torch.cat(targets) if targets else windows.new_zeros((0, side, side), dtype=torch.bool)
        return self.decoder(features.tables, owners, windows), targets

    @property
    def mask_share(self) -> float:
        """Larger side of an object as a share of the side of the window in which its mask is decoded."""
        return self.geometry.object_share / self.mask_window

    def canonical_windows(self, boxes: Tensor) -> Tensor:
        """Returns the windows in which the masks of objects are decoded.

        Args:
            boxes: (G, 4) XYXY of the objects in the frame of the resized image, in pixels.

        Returns:
            (G, 4) XYXY squares in that frame: see `PyramidWindows.canonical_windows`.
        """
        return self.geometry.canonical_windows(boxes, self.mask_window)

    def select(self, features: PyramidFeatures) -> list[Windows]:
        """Selects windows of high score that overlap little, over all levels: see `grid.spread` and `SegmentGenerator.select`.

        The masks are decoded in larger windows than the scores, by the factor `mask_window`; the larger windows are returned.
        """
        selected = []
        for image, scores in enumerate(features.scores):
            scores, candidates = scores.topk(min(_CANDIDATES * self.num_proposals, len(scores)))
            boxes = self.geometry.windows(self.geometry.cells(candidates, features.sizes))
            order = spread(boxes, scores, self.window_nms_thresh, self.num_proposals)
            scores, by_score = scores[order].sort(descending=True)
            windows = square_windows(boxes[order[by_score]], 1 / self.mask_window)
            selected.append(Windows(windows, scores, image, refined=by_score < self.num_refined))
        return selected

    def decode(self, features: PyramidFeatures, windows: Windows) -> Tensor:
        """Decodes the masks of any windows: see `SegmentGenerator.decode`."""
        boxes = windows.boxes
        refined = boxes.new_ones(len(boxes), dtype=torch.bool) if windows.refined is None else windows.refined
        places, masks = [], []
        for chosen, is_refined in ((refined, True), (~refined, False)):
            for part in chosen.nonzero()[:, 0].split(self.windows_per_batch):
                images = torch.full_like(part, windows.image)
                masks.append(self.decoder.masks(features.tables, images, boxes[part], refined=is_refined))
                places.append(part)
        return torch.cat(masks)[torch.cat(places).argsort()]
