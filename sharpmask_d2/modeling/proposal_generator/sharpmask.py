"""SharpMask on an image pyramid as the proposal generator of a detector.

Shape letters: B images, C channels, H W height and width of an image in pixels, h w of a feature, N windows that contribute to the losses,
P positive windows among them, M side of the target masks in cells.
"""

import math
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ...checkpoint import StrictCheckpointer
from ...errors import UserError
from ...windows.labels import label_rule
from ...windows.targets import mask_targets, sample_windows
from ..backbone import trunk_features
from ..exporting import NotExportable
from ..image_pyramid.generator import GridFeatures, ImagePyramid
from ..image_pyramid.levels import Level, grid_size, grid_windows, split_cells
from ..image_pyramid.network import GivenFeatures, WindowGrid, evaluating
from ..image_pyramid.resizing import resize
from ..image_randomness import image_generators
from ..layers import without_gradients
from ..losses import mask_loss, score_loss
from .learnt import LearntGenerator, check_masks, log_windows


class WindowOutputs(NamedTuple):
    """Outputs of the network for windows that contribute to the losses, and their targets."""

    # (N,) logits.
    scores: Tensor
    # (N,) float32 in {0, 1}.
    labels: Tensor
    # (P, M, M) logits.
    masks: Tensor
    # (P, M, M) bool.
    targets: Tensor


class SharpMaskGenerator(LearntGenerator, NotExportable):
    """Proposal generator of a detector, registered as `SharpMask` and configured by MODEL.SHARPMASK.

    The generator has a trunk of its own, or reads the features of the detector's backbone. It is either frozen, or trained on windows of
    the images of the detector.
    """

    way_to_weights = "name its checkpoint in MODEL.SHARPMASK.GENERATOR.WEIGHTS (or one of the detector that holds it in MODEL.WEIGHTS)"

    @configurable
    def __init__(
        self,
        *,
        pyramid: ImagePyramid,
        pixel_mean: list[float],
        pixel_std: list[float],
        flip_channels: bool,
        frozen: bool,
        shared_backbone: bool,
        reference_side: int,
        windows_per_image: int,
        positive_fraction: float,
        label_rule: dict[str, float],
        mask_size: int,
        mask_loss_weight: float,
        score_loss_weight: float,
        saved: bool = True,
        has_weights: bool = False,
    ):
        """
        Args:
            pyramid: generates the proposals.
            pixel_mean, pixel_std: mean and standard deviation of each channel, in 0..255, with which the detector normalises its images.
            flip_channels: whether the channel order of the detector is the reverse of that of the network.
            frozen: whether the generator has no losses and no gradients and is always in evaluation mode. Otherwise everything is trained
                that the network has not frozen itself.
            shared_backbone: whether the network has no trunk and a single level, and reads the features of the detector.
            reference_side: longer side in pixels of the images that the scales of the pyramid refer to; 0 for the detector's images.
            windows_per_image: maximum number of windows per image that contribute to the losses.
            positive_fraction: maximum share of positive windows among them, in 0..1.
            label_rule: keyword arguments of `windows.labels.label_windows`.
            mask_size: M.
            mask_loss_weight, score_loss_weight: factors of the two losses.
            saved: whether checkpoints of the detector contain the parameters of the generator. Default: True.
            has_weights: whether the weights of the pyramid have been loaded. Default: False.
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
            # The resolution of the targets is that of the training on patches.
            "mask_size": 2 * sharpmask.COARSE_MASK_SIZE
            if sharpmask.REFINEMENT.NAME == "none"
            else sharpmask.WINDOW_SIZE,
            "mask_loss_weight": sharpmask.MASK_LOSS_WEIGHT,
            "score_loss_weight": sharpmask.SCORE_LOSS_WEIGHT,
            # The parameters of a frozen generator stay in its own file.
            "saved": not (generator.FROZEN and generator.WEIGHTS),
            "has_weights": bool(generator.WEIGHTS),
        }

    def _stay_out_of_checkpoints(self) -> None:
        # Detectron2 matches ImageNet weights by the ends of names, and must not load them into this trunk instead of the backbone.
        names = tuple(self.state_dict())

        def drop(module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
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

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: Optional[list[Instances]] = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Generates the proposals of a batch of images, and in training the losses of the generator.

        Args:
            images: B images, normalised by the detector.
            features: features of the detector's backbone, name -> (B, C, h, w); read only with a shared backbone.
            gt_instances: one `Instances` per image with gt_boxes and gt_masks in the frame of the resized image; read in training unless
                the generator is frozen. Default: None.

        Returns:
            One `Instances` per image in the frame of the resized image, best first (see `SegmentGenerator.postprocess`). In training with
            ground truth they have no `proposal_masks`, because Detectron2 concatenates them with the ground truth, which has no such field.
            And a dict of losses, loss_sharpmask_mask and loss_sharpmask_score; empty in evaluation and if the generator is frozen.

        Raises:
            UserError: training without ground truth or without its masks, or training of a detector on a frozen generator without weights.
        """
        self.check_not_traced()
        trains = self.training and not self.frozen
        if self.training:
            self.check_weights()
        if trains:
            check_masks(gt_instances, len(images))
            generators = image_generators(len(images), self.pyramid.network.device)
        proposals, outputs = [], []
        for i, image in enumerate(images):
            image_size = tuple(image.shape[1:])
            levels = self.pyramid.levels(image_size, self._octaves(image_size))
            source = self._features(features, i, image_size) if self.shared_backbone else self._pixels(image)
            if trains:
                grids, output = self._train_image(source, levels, gt_instances[i], generators[i])
                outputs.append(output)
            else:
                with torch.no_grad():
                    # The largest level runs first: it needs the most memory, and the grids of the others are not in memory yet.
                    grids = [self._grid(source, level) for level in reversed(levels)][::-1]
            proposals += self.pyramid.propose(GridFeatures(levels, grids, [image_size]))
        if self.training and gt_instances is not None:
            for proposed in proposals:
                proposed.remove("proposal_masks")
        return proposals, self._losses(outputs) if trains else {}

    def _octaves(self, image_size: tuple[int, int]) -> float:
        """Octaves from the size of the image to that of the images that the scales refer to."""
        return math.log2(self.reference_side / max(image_size)) if self.reference_side else 0.0

    def _pixels(self, image: Tensor) -> Tensor:
        """The image (3, H, W) in 0..255, in the channel order of the network."""
        pixels = image * self.pixel_std + self.pixel_mean
        return pixels.flip(0) if self.flip_channels else pixels

    def _features(self, features: dict[str, Tensor], index: int, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """The features of one image, (1, C, h, w) each, without the padding of the batch and with a border of zeros of half a window."""
        network = self.pyramid.network
        cut = {}
        for name, stride in network.strides.items():
            height, width = (-(-side // stride) for side in image_size)
            border = network.window_size // 2 // stride
            cut[name] = F.pad(features[name][index : index + 1, :, :height, :width], (border,) * 4)
        return cut

    def _grid(self, source: Union[Tensor, dict[str, Tensor]], level: Level) -> WindowGrid:
        """The grid of one level of an image, from its pixels or, with a shared backbone, from its features."""
        if self.shared_backbone:
            return self.pyramid.network.grid_from_features(source)
        return self.pyramid.level_grid(source[None], level)

    def _train_image(
        self,
        source: Union[Tensor, dict[str, Tensor]],
        levels: list[Level],
        gt: Instances,
        generator: torch.Generator,
    ) -> tuple[list[WindowGrid], WindowOutputs]:
        """Runs the network on all levels of an image, with gradients only on levels with windows that contribute to the losses.

        Returns:
            The grids of all levels for the proposals, and the outputs for these windows.
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
            generator=generator,
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
                raise ValueError(
                    f"the grid of the trunk is {tuple(grid.scores.shape[1:])}, but its stride implies {size}"
                )
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
        """(P, M, M) logits of the masks of cells (y, x) of the grid of an image."""
        network = self.pyramid.network
        first = torch.zeros_like(ys)
        masks = network.masks(grid, first, ys, xs, windows_per_batch=self.pyramid.windows_per_batch)
        return resize(masks[:, None], (self.mask_size, self.mask_size), network.resizing)[:, 0]

    def _losses(self, outputs: list[WindowOutputs]) -> dict[str, Tensor]:
        scores, labels, masks, targets = (torch.cat(parts) for parts in zip(*outputs))
        # DistributedDataParallel needs a gradient of every parameter, even if no window contributes.
        attached = 0.0 * sum(p.sum() for p in self.pyramid.parameters() if p.requires_grad)
        losses = {"loss_sharpmask_mask": attached + mask_loss(masks, targets, _all(masks))}
        if not self.pyramid.network.freeze_feedforward:
            losses["loss_sharpmask_score"] = attached + score_loss(scores, labels, _all(scores))
        log_windows(scores, labels, masks, targets, len(outputs))
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}


def _all(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool, device=x.device)


def shared_features(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, ShapeSpec]:
    """Selects the features of a detector's backbone that a generator without a trunk reads.

    Args:
        cfg: a config in which MODEL.SHARPMASK.GENERATOR.SHARED_BACKBONE is True.
        input_shape: name of each feature of the backbone -> its channels and stride.

    Returns:
        The entries of `input_shape` that IN_FEATURE and REFINEMENT.SKIP_FEATURES name.

    Raises:
        UserError: the backbone lacks a feature, or a key does not fit the strides; the message names the key.
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


# `register` uses the name of the class, but a config names the generator SharpMask.
PROPOSAL_GENERATOR_REGISTRY._do_register("SharpMask", SharpMaskGenerator)
