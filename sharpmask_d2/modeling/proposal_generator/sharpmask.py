"""SharpMask as the proposal generator of a detector.

Shape letters: B images, C channels, H W image, N sampled windows, P positive ones, M side of the target masks.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor, nn

from ...checkpoint import StrictCheckpointer
from ...errors import UserError
from ...windows.labels import label_rule
from ...windows.targets import mask_targets, sample_windows
from ..backbone import trunk_features
from ..exporting import NotExportable
from ..image_pyramid.generator import GridFeatures, ImagePyramid
from ..image_pyramid.levels import grid_size, grid_windows, split_cells
from ..image_pyramid.network import GivenFeatures, WindowGrid, evaluating
from ..image_pyramid.resizing import resize
from ..layers import without_gradients
from ..losses import mask_loss, score_loss
from .learnt import LearntGenerator, check_masks, log_windows


class WindowOutputs(NamedTuple):
    """Outputs and targets of sampled windows: scores and labels (N,); logits and targets of masks (P, M, M), of the positive ones."""

    scores: Tensor
    labels: Tensor
    masks: Tensor
    targets: Tensor


class SharpMaskGenerator(LearntGenerator, NotExportable):
    """SharpMask as a proposal generator of a detector: registered as `SharpMask`, configured by MODEL.SHARPMASK.

    It has a trunk of its own or reads the features of the detector's backbone, and is frozen or learns from windows of the detector's
    images.
    """

    way_to_weights = "name its checkpoint in MODEL.SHARPMASK.GENERATOR.WEIGHTS (or one of the detector that holds it in MODEL.WEIGHTS)"

    @configurable
    def __init__(
        self,
        *,
        pyramid: ImagePyramid,
        pixel_mean: list,
        pixel_std: list,
        flip_channels: bool,
        frozen: bool,
        shared_backbone: bool,
        reference_side: int,
        windows_per_image: int,
        positive_fraction: float,
        label_rule: dict,
        mask_size: int,
        mask_loss_weight: float,
        score_loss_weight: float,
        saved: bool = True,
        has_weights: bool = False,
    ):
        """
        Args:
            pyramid: makes the proposals.
            pixel_mean, pixel_std: with which the detector normalised its images.
            flip_channels: the detector's channel order is not the network's.
            frozen: no losses and no gradients, in evaluation mode always; else trained, but for what the network itself froze.
            shared_backbone: the pyramid's network has no trunk and a single level: it reads the detector's features.
            reference_side: longer side in pixels of the images that the pyramid's scales refer to; 0: the detector's images.
            windows_per_image: windows of an image that pay losses, at most.
            positive_fraction: share of them that is positive, at most.
            label_rule: the keywords of `windows.label_windows`.
            mask_size: M.
            mask_loss_weight, score_loss_weight: factors of the two losses.
            saved: its parameters belong into checkpoints of the detector; otherwise they need not be there.
            has_weights: the pyramid's weights were loaded.
        """
        super().__init__()
        self.pyramid = pyramid
        self.flip_channels = flip_channels
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.frozen, self.shared_backbone, self.reference_side = frozen, shared_backbone, reference_side
        self.windows_per_image, self.positive_fraction = windows_per_image, positive_fraction
        self.label_rule, self.mask_size = label_rule, mask_size
        self.loss_weights = {"loss_sharpmask_mask": mask_loss_weight, "loss_sharpmask_score": score_loss_weight}
        self.has_weights = has_weights
        if frozen:
            pyramid.requires_grad_(False)
            pyramid.eval()
        if not saved:
            self._stay_out_of_checkpoints()

    @classmethod
    def from_config(cls, cfg, input_shape):
        sharpmask = cfg.MODEL.SHARPMASK
        generator = sharpmask.GENERATOR
        trunk = GivenFeatures(shared_features(cfg, input_shape)) if generator.SHARED_BACKBONE else None
        pyramid = ImagePyramid(cfg, trunk=trunk)
        if generator.WEIGHTS:
            # Its parameters then have the names of the stand-alone model's.
            StrictCheckpointer(nn.ModuleDict({"pyramid": pyramid})).load(generator.WEIGHTS)
        return {
            "pyramid": pyramid,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "flip_channels": cfg.INPUT.FORMAT != sharpmask.FORMAT,
            "frozen": generator.FROZEN,
            "shared_backbone": generator.SHARED_BACKBONE,
            "reference_side": generator.REFERENCE_SIDE,
            "windows_per_image": generator.WINDOWS_PER_IMAGE,
            "positive_fraction": generator.POSITIVE_FRACTION,
            "label_rule": label_rule(cfg, of_cells=not generator.FROZEN),
            # As in the training on patches.
            "mask_size": 2 * sharpmask.COARSE_MASK_SIZE
            if sharpmask.REFINEMENT.NAME == "none"
            else sharpmask.WINDOW_SIZE,
            "mask_loss_weight": sharpmask.MASK_LOSS_WEIGHT,
            "score_loss_weight": sharpmask.SCORE_LOSS_WEIGHT,
            # A file of its own has them already.
            "saved": not (generator.FROZEN and generator.WEIGHTS),
            "has_weights": bool(generator.WEIGHTS),
        }

    def _stay_out_of_checkpoints(self) -> None:
        # Besides their size: Detectron2 matches ImageNet weights by the ends of names, and must not find this trunk beside the backbone.
        names = tuple(self.state_dict())

        def drop(module, state: dict, prefix: str, metadata) -> None:
            for name in [name for name in state if name.startswith(prefix)]:
                del state[name]

        def forgive(module, incompatible) -> None:
            incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(names)]

        self._register_state_dict_hook(drop)
        self.register_load_state_dict_post_hook(forgive)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            self.pyramid.eval()
        return self

    def forward(self, images: ImageList, features: dict, gt_instances=None) -> tuple:
        """
        Args:
            images: normalised by the detector.
            features: of the detector's backbone, name -> (B, C, h, w); read with a shared backbone only.
            gt_instances: Instances of each image with gt_boxes and gt_masks in the frame of the resized image; read in training if the
                generator is not frozen.

        Returns:
            list[Instances], one an image, in the frame of the resized image, best first (see `SegmentGenerator.postprocess`). In training
            with ground truth they have no `proposal_masks`: Detectron2 joins them with the ground truth, which has none.
            A dict of losses: loss_sharpmask_mask and loss_sharpmask_score; empty in evaluation or when frozen.

        Raises:
            ValueError: training without ground truth or its masks, or of a detector on a frozen generator without weights.
        """
        self.check_not_traced()
        trains = self.training and not self.frozen
        if self.training:
            self.check_weights()
        if trains:
            check_masks(gt_instances, len(images))
        proposals, outputs = [], []
        for i, image in enumerate(images):
            image_size = tuple(image.shape[1:])
            levels = self.pyramid.levels(image_size, self._octaves(image_size))
            source = self._features(features, i, image_size) if self.shared_backbone else self._pixels(image)
            if trains:
                grids, output = self._train_image(source, levels, gt_instances[i])
                outputs.append(output)
            else:
                with torch.no_grad():
                    # The largest level first: it needs the most memory, and nothing of the others is kept yet.
                    grids = [self._grid(source, level) for level in reversed(levels)][::-1]
            proposals += self.pyramid.propose(GridFeatures(levels, grids, [image_size]))
        if self.training and gt_instances is not None:
            for proposed in proposals:
                proposed.remove("proposal_masks")
        return proposals, self._losses(outputs) if trains else {}

    def _octaves(self, image_size: tuple) -> float:
        return math.log2(self.reference_side / max(image_size)) if self.reference_side else 0.0

    def _pixels(self, image: Tensor) -> Tensor:
        pixels = image * self.pixel_std + self.pixel_mean
        return pixels.flip(0) if self.flip_channels else pixels

    def _features(self, features: dict, index: int, image_size: tuple) -> dict:
        """One image's features, (1, C, h, w) each, without the batch's padding and with a border of half a window of zeros."""
        network = self.pyramid.network
        cut = {}
        for name, stride in network.strides.items():
            height, width = (-(-side // stride) for side in image_size)
            border = network.window_size // 2 // stride
            cut[name] = F.pad(features[name][index : index + 1, :, :height, :width], (border,) * 4)
        return cut

    def _grid(self, source, level) -> WindowGrid:
        if self.shared_backbone:
            return self.pyramid.network.grid_from_features(source)
        return self.pyramid.level_grid(source[None], level)

    def _train_image(self, source, levels: list, gt) -> tuple:
        """Run all levels of an image, with gradients those that have sampled windows.

        Returns:
            the grids of all levels for the proposals, and WindowOutputs.
        """
        network = self.pyramid.network
        geometry = network.window_size, network.stride
        sizes = [grid_size(level, *geometry, network.size_divisibility) for level in levels]
        windows = grid_windows(levels, sizes, *geometry, network.device)
        positives, negatives, objects = sample_windows(
            windows,
            gt.gt_boxes.tensor,
            network.window_size,
            label_rule=self.label_rule,
            num_windows=self.windows_per_image,
            positive_fraction=self.positive_fraction,
        )
        if network.freeze_feedforward:
            # Scores are not trained.
            negatives = negatives[:0]
        grids = []
        scores, labels = [windows.new_zeros(0)], [windows.new_zeros(0)]
        masks = [windows.new_zeros((0, self.mask_size, self.mask_size))]
        for level, size, inside, outside in zip(
            levels, sizes, split_cells(positives, sizes), split_cells(negatives, sizes)
        ):
            ys, xs = (torch.cat(pair) for pair in zip(inside, outside))
            if len(ys) == 0:
                with without_gradients(), evaluating(network):
                    grids.append(self._grid(source, level))
                continue
            grid = self._grid(source, level)
            if tuple(grid.scores.shape[1:]) != size:
                raise ValueError(f"the trunk's grid is {tuple(grid.scores.shape[1:])} where its stride makes {size}")
            scores.append(grid.scores[0, ys, xs])
            labels.append((torch.arange(len(ys), device=ys.device) < len(inside[0])).float())
            if len(inside[0]):
                masks.append(self._masks(grid, *inside))
            with without_gradients():
                grids.append(network.rescore(grid))
        targets = windows.new_zeros((0, self.mask_size, self.mask_size), dtype=torch.bool)
        if len(positives):
            targets = mask_targets(gt.gt_masks, objects, windows[positives], self.mask_size)
        return grids, WindowOutputs(torch.cat(scores), torch.cat(labels), torch.cat(masks), targets)

    def _masks(self, grid: WindowGrid, ys: Tensor, xs: Tensor) -> Tensor:
        network = self.pyramid.network
        first = torch.zeros_like(ys)
        masks = network.masks(grid, first, ys, xs, windows_per_batch=self.pyramid.windows_per_batch)
        return resize(masks[:, None], (self.mask_size, self.mask_size), network.resizing)[:, 0]

    def _losses(self, outputs: list) -> dict:
        scores, labels, masks, targets = (torch.cat(parts) for parts in zip(*outputs))
        # Without samples the losses are 0, but of every parameter, as DistributedDataParallel needs it.
        attached = 0.0 * sum(p.sum() for p in self.pyramid.parameters() if p.requires_grad)
        losses = {"loss_sharpmask_mask": attached + mask_loss(masks, targets, _all(masks))}
        if not self.pyramid.network.freeze_feedforward:
            losses["loss_sharpmask_score"] = attached + score_loss(scores, labels, _all(scores))
        log_windows(scores, labels, masks, targets, len(outputs))
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}


def _all(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool, device=x.device)


def shared_features(cfg, input_shape: dict) -> dict:
    """The features of a detector's backbone that a generator without a trunk reads.

    Args:
        cfg: a config with MODEL.SHARPMASK.GENERATOR.SHARED_BACKBONE.
        input_shape: name -> ShapeSpec of the backbone.

    Returns:
        the part of `input_shape` that IN_FEATURE and SKIP_FEATURES name.

    Raises:
        ValueError: features that are not there, or keys that do not fit the strides; the message names the key.
    """
    sharpmask = cfg.MODEL.SHARPMASK
    strides = {name: shape.stride for name, shape in input_shape.items()}
    names = trunk_features(cfg)
    if missing := [name for name in names if name not in strides]:
        key = "IN_FEATURE" if sharpmask.IN_FEATURE in missing else "REFINEMENT.SKIP_FEATURES"
        raise UserError(f"MODEL.SHARPMASK.{key}: the detector's backbone has no {missing}, its strides are {strides}")
    stride = strides[sharpmask.IN_FEATURE]
    if coarse := [name for name in names if strides[name] > stride]:
        raise UserError(
            f"MODEL.SHARPMASK.REFINEMENT.SKIP_FEATURES: {coarse} are coarser than IN_FEATURE, the strides are {strides}"
        )
    if sharpmask.WINDOW_SIZE % (2 * stride):
        raise UserError(
            f"MODEL.SHARPMASK.WINDOW_SIZE is {sharpmask.WINDOW_SIZE}: with GENERATOR.SHARED_BACKBONE it must be a multiple of twice the "
            f"stride of IN_FEATURE, {2 * stride}"
        )
    required = (
        ("TEST.SCALES", list(sharpmask.TEST.SCALES), [0.0]),
        ("GRID_STRIDE", sharpmask.GRID_STRIDE, stride),
        ("GENERATOR.REFERENCE_SIDE", sharpmask.GENERATOR.REFERENCE_SIDE, 0),
    )
    for key, value, needed in required:
        if value != needed:
            raise UserError(
                f"MODEL.SHARPMASK.{key} is {value}: with GENERATOR.SHARED_BACKBONE and IN_FEATURE {sharpmask.IN_FEATURE} of stride "
                f"{stride} it must be {needed}"
            )
    return {name: input_shape[name] for name in names}


# The registry takes a class's own name, and SharpMask is what users write in a config.
PROPOSAL_GENERATOR_REGISTRY._do_register("SharpMask", SharpMaskGenerator)
