"""SharpMask on a feature pyramid: one pass of the backbone, scores of windows on every level, masks of the best of them.

Shape letters: B images, L levels, C channels, Y X cells of a level, D kinds of windows, T windows of an image, N chosen windows, G objects
of an image, M mask side.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor

from ...errors import UserError
from ...structures import WindowMasks, build_proposals
from ...windows.geometry import pyramid_sizes, square_windows
from ...windows.targets import mask_targets
from ..exporting import NotExportable
from ..feature_pyramid.decoder import DecoderTables, SampledDecoder, jittered_windows
from ..feature_pyramid.grid import PyramidWindows, spread
from ..feature_pyramid.labels import enlarged, score_targets
from ..feature_pyramid.scores import WindowScores, coarser_levels
from ..losses import dice_loss, mask_loss, quality_focal_loss
from .learnt import LearntGenerator, aside, check_masks, log_windows

# Number of candidate windows for each proposal, from which `spread` chooses.
_CANDIDATES = 4
# Objects whose larger side is below this, in pixels of the resized image, do not contribute to the losses of masks.
_SMALLEST = 6.0


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


@PROPOSAL_GENERATOR_REGISTRY.register()
class SharpMaskFPN(LearntGenerator, NotExportable):
    """Segment proposals from a feature pyramid (FPN, section 6) with SharpMask's refinement on top.

    It reads the features of the detector's backbone, which it trains along unless it is frozen.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list,
        geometry: PyramidWindows,
        scores: WindowScores,
        decoder: SampledDecoder,
        negative_shift: float,
        negative_octaves: float,
        mask_window: float,
        num_refined: int,
        mask_windows_per_image: int,
        mask_jitter: tuple,
        num_proposals: int,
        window_nms_thresh: float,
        mask_threshold: float,
        nms_thresh: float,
        stability: bool,
        mask_nms: bool,
        windows_per_batch: int,
        mask_loss_weight: float,
        score_loss_weight: float,
        frozen: bool,
    ):
        """
        Args:
            in_features: names of the backbone's features, fine to coarse.
            geometry: of the windows on L levels: those of the features, and more that are made of the coarsest.
            scores: gives the scores of all windows.
            decoder: gives the masks of chosen windows.
            negative_shift, negative_octaves: see `pyramid_sampling.score_targets`.
            mask_window: side of the window whose mask is decoded, in sides of the window that is scored.
            num_refined: maximum number of proposals per image whose masks are refined, those of highest score.
            mask_windows_per_image: number of windows per image with objects that contribute to the losses of masks.
            mask_jitter: shift and octaves of these windows, see `jittered_windows`.
            num_proposals: maximum number of proposals per image.
            window_nms_thresh: see `pyramid_windows.spread`; 1 takes the windows of highest score.
            mask_threshold: probability above which a pixel is foreground.
            nms_thresh: IoU of boxes above which the lower score goes; 1 keeps all.
            stability, mask_nms: see `structures.build_proposals`.
            windows_per_batch: number of windows whose masks are decoded at a time.
            mask_loss_weight, score_loss_weight: factors of the losses.
            frozen: no losses, no gradients.

        Raises:
            UserError: a threshold outside 0..1, less than one proposal, or a limit of labels that is not above 0.
        """
        super().__init__()
        if not 0 < mask_threshold < 1:
            raise UserError(f"MODEL.SHARPMASK.TEST.MASK_THRESHOLD is {mask_threshold}: it must lie between 0 and 1")
        if num_proposals < 1:
            raise UserError(f"MODEL.SHARPMASK.TEST.NUM_PROPOSALS is {num_proposals}: it must be at least 1")
        for name, limit in (("SHIFT", negative_shift), ("OCTAVES", negative_octaves)):
            if limit <= 0:
                raise UserError(f"MODEL.SHARPMASK.FPN.LABELS.NEGATIVE_{name} is {limit}: it must be above 0")
        self.in_features, self.geometry = list(in_features), geometry
        self.scores, self.decoder = scores, decoder
        self.negative_shift, self.negative_octaves = negative_shift, negative_octaves
        self.mask_window, self.num_refined = mask_window, num_refined
        self.mask_windows_per_image, self.mask_jitter = mask_windows_per_image, mask_jitter
        self.num_proposals, self.window_nms_thresh = num_proposals, window_nms_thresh
        self.mask_threshold = math.log(mask_threshold / (1 - mask_threshold))
        self.nms_thresh, self.stability, self.mask_nms = nms_thresh, stability, mask_nms
        self.windows_per_batch = windows_per_batch
        self.loss_weights = {
            "loss_sharpmask_mask": mask_loss_weight,
            "loss_sharpmask_score": score_loss_weight,
            "loss_sharpmask_dice": 1.0,
            "loss_sharpmask_side": 1.0,
        }
        self.frozen = frozen
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
        channels = {input_shape[name].channels for name in fpn.IN_FEATURES}
        if len(channels) > 1:
            raise UserError(
                f"MODEL.SHARPMASK.FPN.IN_FEATURES: {fpn.IN_FEATURES} differ in their channels, {sorted(channels)}: one head reads them all"
            )
        (channels,) = channels
        strides = [input_shape[name].stride for name in fpn.IN_FEATURES]
        geometry = PyramidWindows(
            strides=strides + [strides[-1] * 2 ** (i + 1) for i in range(fpn.EXTRA_LEVELS)],
            window_cells=fpn.WINDOW_CELLS,
            object_share=fpn.OBJECT_SHARE,
        )
        return {
            "in_features": fpn.IN_FEATURES,
            "geometry": geometry,
            "scores": WindowScores(in_channels=channels, channels=fpn.SCORE_CHANNELS, window_cells=fpn.WINDOW_CELLS),
            "decoder": SampledDecoder(
                in_channels=channels, embed_dim=sharpmask.EMBED_DIM, channels=sharpmask.REFINEMENT.CHANNELS
            ),
            "negative_shift": fpn.LABELS.NEGATIVE_SHIFT,
            "negative_octaves": fpn.LABELS.NEGATIVE_OCTAVES,
            "mask_window": fpn.MASK_WINDOW,
            "num_refined": fpn.NUM_REFINED,
            "mask_windows_per_image": fpn.MASK_WINDOWS_PER_IMAGE,
            "mask_jitter": (fpn.MASK_JITTER_SHIFT, fpn.MASK_JITTER_OCTAVES),
            "num_proposals": sharpmask.TEST.NUM_PROPOSALS,
            "window_nms_thresh": fpn.WINDOW_NMS_THRESH,
            "mask_threshold": sharpmask.TEST.MASK_THRESHOLD,
            "nms_thresh": sharpmask.TEST.NMS_THRESH,
            "stability": sharpmask.TEST.MASK_STABILITY,
            "mask_nms": sharpmask.TEST.MASK_NMS,
            "windows_per_batch": sharpmask.TEST.WINDOWS_PER_BATCH,
            "mask_loss_weight": sharpmask.MASK_LOSS_WEIGHT,
            "score_loss_weight": sharpmask.SCORE_LOSS_WEIGHT,
            "frozen": sharpmask.GENERATOR.FROZEN,
        }

    @property
    def strides(self) -> list:
        """Strides of the L levels in pixels."""
        return self.geometry.strides

    def forward(self, images: ImageList, features: dict, gt_instances=None) -> tuple:
        """
        Args:
            images: of which only the sizes are read.
            features: of the backbone, name -> (B, C, h, w).
            gt_instances: Instances of each image with gt_boxes and gt_masks in the frame of the resized image; read in training unless
                the generator is frozen.

        Returns:
            list[Instances], one `Instances` per image in the frame of the resized image, best first (see `structures.build_proposals`). In
            training with ground truth they have no `proposal_masks`: Detectron2 joins them with the ground truth, which has none.
            A dict of losses, empty in evaluation or when frozen: loss_sharpmask_score of the scores, loss_sharpmask_mask and
            loss_sharpmask_dice of the masks, and loss_sharpmask_side of the masks before the last refinement.

        Raises:
            ValueError: training without ground truth or its masks, or of a detector on a frozen generator without weights.
        """
        self.check_not_traced()
        trains = self.training and not self.frozen
        if self.training:
            self.check_weights()
        pyramid = self.pyramid(images.image_sizes, features)
        losses = self.losses(pyramid, gt_instances) if trains else {}
        proposals = self.propose(pyramid, images.image_sizes)
        if self.training and gt_instances is not None:
            for proposed in proposals:
                proposed.remove("proposal_masks")
        return proposals, losses

    def pyramid(self, image_sizes: list, features: dict) -> Pyramid:
        """All levels of a batch and the scores of their windows, which have gradients in training unless the generator is frozen.

        Args:
            image_sizes: (height, width) of each image in pixels, without the batch's padding.
            features: name -> (B, C, h, w).
        """
        levels = [features[name] for name in self.in_features]
        extents = torch.tensor([pyramid_sizes(size, self.strides) for size in image_sizes], device=levels[0].device)
        coarsest = _inside(levels[-1], extents[:, len(levels) - 1])
        levels += coarser_levels(levels[-1], coarsest.to(levels[-1].dtype), len(self.strides) - len(levels))
        scores = []
        for number, feature in enumerate(levels):
            inside = _inside(feature, extents[:, number])
            with nullcontext() if self.training and not self.frozen else aside():
                # Not below the least number: minus infinity is the mark of cells outside, also where training has diverged.
                grid = self.scores(feature, inside.to(feature.dtype)).float().clamp(min=torch.finfo(torch.float32).min)
            scores.append(grid.masked_fill(~inside, -math.inf).flatten(1))
        return Pyramid(levels, extents, torch.cat(scores, dim=1), [tuple(x.shape[2:]) for x in levels])

    def losses(self, pyramid: Pyramid, gt_instances: list) -> dict:
        """Losses of the scores of all windows, and of the masks of windows that are jittered around the objects: see `forward`."""
        check_masks(gt_instances, len(pyramid.scores))
        scores = pyramid.scores.flatten()
        labels = self._labels(pyramid, gt_instances).flatten()
        masks, targets = self._masks_and_targets(pyramid, gt_instances)
        clear = (labels == 0) | (labels == 1)
        log_windows(scores[clear], labels[clear], masks[-1], targets, len(gt_instances))
        every = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
        side = self.decoder.mask_size
        reduced = [F.avg_pool2d(targets.float()[:, None], side // mask.shape[-1])[:, 0] for mask in masks]
        losses = {
            "loss_sharpmask_mask": mask_loss(masks[-1], reduced[-1], every),
            "loss_sharpmask_dice": dice_loss(masks[-1], reduced[-1]),
            "loss_sharpmask_side": sum(mask_loss(mask, part, every) for mask, part in zip(masks[:-1], reduced)),
            "loss_sharpmask_score": quality_focal_loss(scores, labels),
        }
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}

    @torch.no_grad()
    def _labels(self, pyramid: Pyramid, gt_instances: list) -> Tensor:
        """(B, T): see `score_targets`; -1 for cells outside of an image, too."""
        numbers = torch.arange(pyramid.scores.shape[1], device=pyramid.scores.device)
        windows = self.geometry.windows(self.geometry.cells(numbers, pyramid.sizes))
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
        return torch.stack(labels).masked_fill(pyramid.scores == -math.inf, -1)

    def _masks_and_targets(self, pyramid: Pyramid, gt_instances: list) -> tuple:
        """What `SampledDecoder.forward` makes of N windows that are jittered around the objects, and their targets (N, M, M) bool."""
        tables = self.decoder.tables(pyramid.features, pyramid.extents, self.strides)
        shift, octaves = self.mask_jitter
        windows, owners, targets = [], [], []
        for number, gt in enumerate(gt_instances):
            boxes = gt.gt_boxes.tensor
            large = ((boxes[:, 2:] - boxes[:, :2]).amax(dim=1) >= _SMALLEST).nonzero()[:, 0]
            drawn, objects = jittered_windows(
                enlarged(boxes[large], self.geometry.smallest_object),
                count=self.mask_windows_per_image,
                share=self.mask_share,
                shift=shift,
                octaves=octaves,
            )
            windows.append(drawn)
            owners.append(torch.full_like(objects, number))
            if len(drawn):
                targets.append(mask_targets(gt.gt_masks, large[objects], drawn, self.decoder.mask_size))
        windows, owners = torch.cat(windows), torch.cat(owners)
        side = self.decoder.mask_size
        targets = torch.cat(targets) if targets else windows.new_zeros((0, side, side), dtype=torch.bool)
        return self.decoder(tables, owners, windows), targets

    @property
    def mask_share(self) -> float:
        """Larger side of an object as a share of the side of the window that its mask is decoded in."""
        return self.geometry.object_share / self.mask_window

    def canonical_windows(self, boxes: Tensor) -> Tensor:
        """The windows that the masks of objects are decoded in.

        Args:
            boxes: (G, 4) XYXY of the objects in the frame of the resized image, in pixels. Objects that are too small for the smallest
                window get that window.

        Returns:
            (G, 4) XYXY squares in that frame.
        """
        return square_windows(enlarged(boxes, self.geometry.smallest_object), self.mask_share)

    def decode(
        self, pyramid: Pyramid, images: Tensor, windows: Tensor, *, tables=None, num_refined: Optional[int] = None
    ) -> Tensor:
        """Masks of any windows.

        Args:
            pyramid: of the images.
            images: (N,) int64, the image of each window.
            windows: (N, 4) XYXY squares in the frame of the resized image, in pixels.
            tables: what `SampledDecoder.tables` made of the pyramid, if it is there already.
            num_refined: how many of the windows, the first ones, have refined masks; the others have coarse ones. None refines all.

        Returns:
            (N, M, M) logits.
        """
        tables = tables or self.decoder.tables(pyramid.features, pyramid.extents, self.strides)
        masks = []
        for chosen, refined in ((slice(num_refined), True), (slice(num_refined, None), False)):
            if refined or num_refined is not None:
                parts = zip(images[chosen].split(self.windows_per_batch), windows[chosen].split(self.windows_per_batch))
                masks += [self.decoder.masks(tables, *part, refined=refined) for part in parts]
        return torch.cat(masks)

    @aside()
    def propose(self, pyramid: Pyramid, image_sizes: list, output_sizes: Optional[list] = None) -> list:
        """The best windows of each image as proposals, without gradients: see `forward`.

        Args:
            pyramid: of the images.
            image_sizes: (height, width) of each in pixels.
            output_sizes: (height, width) of each as the proposals are asked for, if that is another one.
        """
        tables = self.decoder.tables(pyramid.features, pyramid.extents, self.strides)
        return [
            self._propose_image(number, tuple(size), tuple(output_size), pyramid, tables)
            for number, (size, output_size) in enumerate(zip(image_sizes, output_sizes or image_sizes))
        ]

    def _propose_image(
        self, number: int, image_size: tuple, output_size: tuple, pyramid: Pyramid, tables: DecoderTables
    ) -> Instances:
        candidates = pyramid.scores[number].topk(min(_CANDIDATES * self.num_proposals, pyramid.scores.shape[1])).indices
        windows = self.geometry.windows(self.geometry.cells(candidates, pyramid.sizes))
        order = spread(windows, pyramid.scores[number, candidates], self.window_nms_thresh, self.num_proposals)
        scores, windows = (
            pyramid.scores[number, candidates[order]],
            square_windows(windows[order], 1 / self.mask_window),
        )
        images = torch.full_like(order, number)
        masks = self.decode(pyramid, images, windows, tables=tables, num_refined=self.num_refined)
        scores, order = scores.sort(descending=True)
        window_masks = WindowMasks(
            masks.index_select(0, order), windows[order], image_size, threshold=self.mask_threshold
        )
        if output_size != image_size:
            # Before `build_proposals`, so that the pixels of the masks are found only once.
            (height, width), (new_height, new_width) = image_size, output_size
            window_masks = window_masks.scale(new_width / width, new_height / height, output_size)
        return build_proposals(
            scores, window_masks, nms_thresh=self.nms_thresh, stability=self.stability, mask_nms=self.mask_nms
        )
