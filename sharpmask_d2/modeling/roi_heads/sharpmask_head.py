"""A mask head for Detectron2's detectors that decodes masks in windows around the boxes, and refines them on finer levels.

Shape letters:
    B: images
    N: boxes of all images
    L: levels of the feature pyramid
    C: channels of the pyramid
    K: classes that have masks of their own; 1 if masks are class-agnostic
    M: side of a mask in cells
"""

import math
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.utils._pytree import tree_map

from ...errors import UserError
from ...structures import WindowMasks
from ...windows.targets import mask_targets
from ..exporting import NotExportable
from ..feature_pyramid.decoder import DecoderTables, SampledDecoder
from ..feature_pyramid.grid import PyramidWindows
from ..feature_pyramid.levels import common_channels, pyramid_levels
from ..losses import mask_iou, refinement_losses
from .proposal_masks import ProposalROIMasks

# Maximum number of masks in a picture for the event storage.
_SHOWN = 8


def resample_masks(logits: Tensor, windows: Tensor, boxes: Tensor) -> Tensor:
    """Resample masks that cover windows to masks that cover boxes, bilinearly; beyond the outermost cells, their values continue.

    Args:
        logits: (N, M, M), cells of a window.
        windows: (N, 4) XYXY in any frame.
        boxes: (N, 4) XYXY in the same frame.

    Returns:
        (N, M, M) logits at the centres of the M x M equal parts of each box.
    """
    size = logits.shape[-1]
    steps = (torch.arange(size, device=boxes.device) + 0.5) / size
    sides = windows[:, 2:] - windows[:, :2]
    low, high = (boxes[:, :2] - windows[:, :2]) / sides, (boxes[:, 2:] - windows[:, :2]) / sides
    x, y = (2 * (low[:, :, None] + (high - low)[:, :, None] * steps) - 1).unbind(1)  # N x M each, -1 .. 1 in the window
    places = torch.stack([x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=3)
    return F.grid_sample(logits[:, None], places, padding_mode="border", align_corners=False)[:, 0]


class BoxROIMasks(ProposalROIMasks):
    """Window masks of boxes, in place of Detectron2's RoI masks.

    Detectron2 pastes them as windows, so that a mask reaches beyond a box that cuts its object: with the boxes of the packaged detector,
    mask AP is half a point higher than if masks end at their boxes. Functions of torch receive the probabilities on the boxes,
    (N, 1, M, M), as Detectron2's mask heads return them; Detectron2's test-time augmentation averages masks in this form.
    """

    def __init__(self, masks: WindowMasks, boxes: Tensor):
        """
        Args:
            masks: N window masks in the frame of the network's input.
            boxes: (N, 4) XYXY in the same frame, in pixels.
        """
        super().__init__(masks)
        self.boxes = boxes

    @property
    def tensor(self) -> Tensor:
        """(N, M, M) probabilities that cover the boxes."""
        return resample_masks(self.masks.logits, self.masks.windows, self.boxes).sigmoid()

    def to(self, device: Union[str, torch.device]) -> "BoxROIMasks":
        """Copy the masks to a device, such as "cpu"."""
        return BoxROIMasks(self.masks.to(device), self.boxes.to(device))

    def __getitem__(self, item: Union[int, slice, Tensor]) -> "BoxROIMasks":
        boxes = self.boxes[item]
        return BoxROIMasks(self.masks[item], boxes[None] if boxes.dim() == 1 else boxes)

    def flip(self, dims: list[int]) -> Tensor:
        """The probabilities on the boxes, (N, 1, M, M), flipped along `dims` as `torch.flip` does."""
        return torch.flip(self, dims)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: x.tensor[:, None] if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)

    def to_bitmasks(self, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> BitMasks:
        """Paste the masks into an image.

        Args:
            boxes: boxes of the detections. They are ignored: each mask lies in its window.
            height: H, in pixels.
            width: W, in pixels.
            threshold: probability above which a pixel belongs to the mask; default: 0.5.

        Returns:
            N bitmaps of H x W pixels.
        """
        masks = self.masks
        masks = WindowMasks(
            masks.logits, masks.windows, masks.image_size, threshold=math.log(threshold / (1 - threshold))
        )
        return ProposalROIMasks(masks).to_bitmasks(boxes, height, width)


@ROI_MASK_HEAD_REGISTRY.register()
class SharpMaskHead(BaseMaskRCNNHead, NotExportable):
    """Mask head whose masks are those of the decoder of `SharpMaskFPN`, in place of Detectron2's convolutions on pooled features.

    Each box gives its canonical window, a square around the box. The decoder samples the levels of the backbone's pyramid in the window,
    so that the RoI heads must not pool features: `MODEL.ROI_MASK_HEAD.POOLER_TYPE` is "" (a LazyConfig sets `mask_pooler=None`). Masks of
    detections are `BoxROIMasks`, with which Detectron2's postprocessing, test-time augmentation and evaluation work unchanged.
    """

    @configurable
    def __init__(
        self,
        *,
        geometry: PyramidWindows,
        decoder: SampledDecoder,
        mask_window: float,
        windows_per_batch: int = 128,
        loss_weight: float = 1.0,
        vis_period: int = 0,
    ):
        """
        Args:
            geometry: of the windows on L levels: the levels of the features, and further ones that are computed from the coarsest.
            decoder: decodes the masks of windows. Its `num_classes` is 1 for class-agnostic masks, otherwise that of the RoI heads.
            mask_window: side of the window whose mask is decoded, in sides of the window that fits the box; 1.2 in the packaged models.
            windows_per_batch: number of windows whose masks are decoded at a time at test time, which bounds the memory; default: 128.
            loss_weight: factor of all losses; default: 1.
            vis_period: number of iterations between pictures of masks in the event storage; default: 0, no pictures.
        """
        super().__init__(loss_weight=loss_weight, vis_period=vis_period)
        self.geometry, self.decoder, self.mask_window = geometry, decoder, mask_window
        self.windows_per_batch = windows_per_batch

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Union[ShapeSpec, dict[str, ShapeSpec]]) -> dict[str, Any]:
        if isinstance(input_shape, ShapeSpec):
            raise UserError(
                f'MODEL.ROI_MASK_HEAD.POOLER_TYPE is {cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE!r}: set it to "", because SharpMaskHead reads '
                "features that are not pooled, and use RoI heads that pass them on, such as StandardROIHeads"
            )
        shapes = list(input_shape.values())
        channels = common_channels(shapes, "MODEL.ROI_HEADS.IN_FEATURES")
        num_classes = 1 if cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES
        return {
            **super().from_config(cfg, input_shape),
            "geometry": PyramidWindows.from_config(cfg, [shape.stride for shape in shapes]),
            "decoder": SampledDecoder.from_config(cfg, channels, num_classes),
            "mask_window": cfg.MODEL.SHARPMASK.FPN.MASK_WINDOW,
            "windows_per_batch": cfg.MODEL.SHARPMASK.TEST.WINDOWS_PER_BATCH,
        }

    def forward(self, x: dict[str, Tensor], instances: list[Instances]) -> Union[dict[str, Tensor], list[Instances]]:
        """
        Args:
            x: features of the backbone, name -> (B, C, h, w), fine to coarse.
            instances: one `Instances` per image. In training, foreground proposals with proposal_boxes, gt_classes and gt_masks; at test
                time, detections with pred_boxes and pred_classes.

        Returns:
            In training, a dict of losses: loss_mask and loss_mask_dice of the masks, and loss_mask_side of the masks before the last
            refinement. At test time `instances`, with the additional field pred_masks (`BoxROIMasks`).

        Raises:
            UserError: training images have no masks.
        """
        self.check_not_traced()
        return self._losses(x, instances) if self.training else self._add_masks(x, instances)

    def canonical_windows(self, boxes: Tensor) -> Tensor:
        """The windows that masks are decoded in.

        Args:
            boxes: (N, 4) XYXY in the frame of the network's input, in pixels.

        Returns:
            (N, 4) XYXY squares in that frame.
        """
        return self.geometry.canonical_windows(boxes, self.mask_window)

    def encode(self, x: dict[str, Tensor], image_sizes: list[tuple[int, int]]) -> DecoderTables:
        """Computes what the decoder reads of all levels, once per batch of images.

        Args:
            x: features of the backbone, see `forward`.
            image_sizes: (height, width) of each image in pixels, without the padding of the batch.
        """
        strides = self.geometry.strides
        levels, extents = pyramid_levels(list(x.values()), image_sizes, strides)
        return self.decoder.tables(levels, extents, strides)

    def decode(
        self, tables: DecoderTables, images: Tensor, windows: Tensor, classes: Optional[Tensor] = None
    ) -> Tensor:
        """Decodes the masks of any windows, at test time.

        Args:
            tables: from `encode`.
            images: (N,) int64, the image of each window.
            windows: (N, 4) XYXY squares in the frame of the network's input, in pixels.
            classes: (N,) int64, the class of each window, which is read unless masks are class-agnostic.

        Returns:
            (N, M, M) float32 logits that cover the windows.
        """
        parts = torch.arange(len(windows), device=windows.device).split(self.windows_per_batch)
        masks = [
            self.decoder.masks(
                tables, images[part], windows[part], classes=None if classes is None else classes[part]
            ).float()
            for part in parts
        ]
        return torch.cat(masks)

    def _add_masks(self, x: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        boxes, images = _boxes_and_images([found.pred_boxes.tensor for found in instances])
        windows = self.canonical_windows(boxes)
        size = self.decoder.mask_size
        logits = boxes.new_zeros(len(boxes), size, size)
        if len(boxes):
            tables = self.encode(x, [found.image_size for found in instances])
            logits = self.decode(tables, images, windows, self._classes([found.pred_classes for found in instances]))
        counts = [len(found) for found in instances]
        for found, *parts in zip(instances, logits.split(counts), windows.split(counts), boxes.split(counts)):
            own_logits, own_windows, own_boxes = parts
            masks = WindowMasks(own_logits, own_windows, found.image_size, threshold=0.0)
            # A copy, because Detectron2 scales the boxes of detections in place.
            found.pred_masks = BoxROIMasks(masks, own_boxes.clone())
        return instances

    def _losses(self, x: dict[str, Tensor], instances: list[Instances]) -> dict[str, Tensor]:
        boxes, images = _boxes_and_images([proposed.proposal_boxes.tensor for proposed in instances])
        windows = self.canonical_windows(boxes)
        tables = self.encode(x, [proposed.image_size for proposed in instances])
        masks = self.decoder(tables, images, windows, self._classes([proposed.gt_classes for proposed in instances]))
        targets = self._targets(instances, windows)
        self._log(masks[-1], targets)
        losses = refinement_losses(masks, targets)
        names = {"mask": "loss_mask", "dice": "loss_mask_dice", "side": "loss_mask_side"}
        return {names[name]: self.loss_weight * loss for name, loss in losses.items()}

    def _classes(self, classes: list[Tensor]) -> Optional[Tensor]:
        """(N,) int64, the classes of the boxes of all images; None if masks are class-agnostic."""
        return None if self.decoder.num_classes == 1 else torch.cat(classes)

    @torch.no_grad()
    def _targets(self, instances: list[Instances], windows: Tensor) -> Tensor:
        """(N, M, M) bool, the masks of the objects of proposals, cut to windows (N, 4)."""
        size = self.decoder.mask_size
        targets = [windows.new_zeros((0, size, size), dtype=torch.bool)]
        for proposed, own in zip(instances, windows.split([len(proposed) for proposed in instances])):
            if not len(proposed):
                continue
            if not proposed.has("gt_masks"):
                raise UserError(
                    "MODEL.MASK_ON is True, but training images come without gt_masks: their annotations need a segmentation"
                )
            targets.append(mask_targets(proposed.gt_masks, torch.arange(len(own), device=own.device), own, size))
        return torch.cat(targets)

    @torch.no_grad()
    def _log(self, masks: Tensor, targets: Tensor) -> None:
        """Put the mean IoU of masks (N, M, M) with their targets into the event storage, and at times a picture of both."""
        storage = get_event_storage()
        if not len(masks):
            return
        storage.put_scalar("mask_head/mask_iou", mask_iou(masks, targets).mean().item())
        if self.vis_period > 0 and storage.iter % self.vis_period == 0:
            pairs = torch.cat([masks.float().sigmoid(), targets.float()], dim=2)[:_SHOWN].flatten(0, 1)
            storage.put_image("Left: predicted masks; right: their targets", pairs.expand(3, -1, -1).cpu())


def _boxes_and_images(boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The boxes of all images, (N, 4) float32, and (N,) int64, the image of each."""
    images = [torch.full((len(own),), number, device=own.device) for number, own in enumerate(boxes)]
    return torch.cat(boxes).float(), torch.cat(images)
