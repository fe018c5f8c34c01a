"""RoI heads whose detections have the masks of their proposals, as in the MultiPath paper.

Shape letters:
    N: detections of an image
    H, W: image height and width in pixels
"""

from collections.abc import Sequence
from typing import Any, Union

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import BitMasks, Instances, ROIMasks
from torch import Tensor

from ...errors import UserError
from ...structures import WindowMasks
from .output_layers import SharedOutputLayers

# Values of MODEL.SHARPMASK.DETECTION_MASKS.
MASKS = ("proposal", "head", "none")


class ProposalROIMasks(ROIMasks):
    """Window masks with the interface of Detectron2's RoI masks, so that Detectron2's postprocessing pastes them."""

    def __init__(self, masks: WindowMasks):
        """
        Args:
            masks: N window masks in the frame of the network's input.
        """
        self.masks = masks

    def to(self, device: Union[str, torch.device]) -> "ProposalROIMasks":
        """Copy the masks to a device.

        Args:
            device: the device, such as "cpu".

        Returns:
            The copy.
        """
        return ProposalROIMasks(self.masks.to(device))

    @property
    def device(self) -> torch.device:
        """Device of the masks."""
        return self.masks.device

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, item: Union[int, slice, Tensor]) -> "ProposalROIMasks":
        return ProposalROIMasks(self.masks[item])

    def __repr__(self) -> str:
        return f"ProposalROIMasks({self.masks!r})"

    def to_bitmasks(self, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> BitMasks:
        """Paste the masks into an image.

        Args:
            boxes: boxes of the detections. They are ignored: each mask lies in the window of its proposal.
            height: H, in pixels.
            width: W, in pixels.
            threshold: ignored, because window masks have their own threshold. Default: 0.5.

        Returns:
            N bitmaps of H x W pixels.
        """
        old_height, old_width = self.masks.image_size
        masks = self.masks.scale(width / old_width, height / old_height, (height, width))
        return BitMasks(masks.paste())


def attach_proposal_masks(instances: list[Instances], proposals: list[Instances], indices: Sequence[Tensor]) -> None:
    """Assign the masks of proposals to their detections as the field `pred_masks`, in place.

    Args:
        instances: detections, one `Instances` per image.
        proposals: proposals, one `Instances` per image. Images whose proposals have no field `proposal_masks` are skipped.
        indices: one tensor (N,) int64 per image, the index of each detection's proposal.
    """
    for detected, proposed, index in zip(instances, proposals, indices):
        if proposed.has("proposal_masks"):
            detected.pred_masks = ProposalROIMasks(proposed.proposal_masks[index])


def without_masks(proposals: list[Instances]) -> list[Instances]:
    """Remove the field `proposal_masks`, because Detectron2 cannot concatenate proposals that have it with ground truth.

    Args:
        proposals: proposals, one `Instances` per image; they are not changed.

    Returns:
        Copies without the field, one per image.
    """
    kept = []
    for proposed in proposals:
        fields = {name: value for name, value in proposed.get_fields().items() if name != "proposal_masks"}
        kept.append(type(proposed)(proposed.image_size, **fields))
    return kept


class MaskKeepingOutputLayers(SharedOutputLayers):
    """Detectron2's `FastRCNNOutputLayers`, with equal parameter names, whose detections keep the masks of their proposals."""

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Detect objects, and assign to each detection the mask of its proposal.

        Args:
            predictions: result of `forward`.
            proposals: proposals, one `Instances` per image.

        Returns:
            Detections, one `Instances` per image; and one tensor (N,) int64 per image, the index of each detection's proposal.
        """
        all_boxes, all_scores = self.predict_boxes(predictions, proposals), self.predict_probs(predictions, proposals)
        instances, indices = fast_rcnn_inference(
            all_boxes,
            all_scores,
            [proposed.image_size for proposed in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )
        # Detectron2 drops predictions that are not finite, and returns indices into the remaining ones.
        finite = [
            (boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)).nonzero()[:, 0]
            for boxes, scores in zip(all_boxes, all_scores)
        ]
        indices = [kept[index] for kept, index in zip(finite, indices)]
        attach_proposal_masks(instances, proposals, indices)
        return instances, indices


class KeepsProposalMasks:
    """Mixin for RoI heads whose detections may have the masks of their proposals."""

    @property
    def keeps_proposal_masks(self) -> bool:
        """Whether detections have the masks of their proposals, if the proposals have masks."""
        return isinstance(self.box_predictor, MaskKeepingOutputLayers)

    @property
    def mask_on(self) -> bool:
        """Whether the mask head is enabled. Detectron2's test-time augmentation disables it while it detects boxes.

        Raises:
            RuntimeError: it is disabled although detections have the masks of their proposals, which would be lost.
        """
        return self._mask_on

    @mask_on.setter
    def mask_on(self, on: bool) -> None:
        if "_mask_on" in vars(self) and not on and self.keeps_proposal_masks:
            raise RuntimeError(
                "Detectron2's GeneralizedRCNNWithTTA loses the masks of proposals, but MODEL.SHARPMASK.DETECTION_MASKS is 'proposal': use "
                "sharpmask_d2.modeling.ProposalMaskTTA instead, or set the key to 'none' (boxes only), or to 'head' with "
                "MODEL.MASK_ON True (a mask head)"
            )
        self._mask_on = on


def mask_source(cfg: CfgNode) -> str:
    """Read and check `MODEL.SHARPMASK.DETECTION_MASKS`.

    Args:
        cfg: config of a detector.

    Returns:
        One of `MASKS`.

    Raises:
        UserError: the value is not one of `MASKS`, or it is "head" although `MODEL.MASK_ON` is False.
    """
    source = cfg.MODEL.SHARPMASK.DETECTION_MASKS
    if source not in MASKS:
        raise UserError(f"MODEL.SHARPMASK.DETECTION_MASKS is {source!r}: choose from {MASKS}")
    if source == "head" and not cfg.MODEL.MASK_ON:
        raise UserError(
            "MODEL.SHARPMASK.DETECTION_MASKS is 'head': set MODEL.MASK_ON to True, because a mask head is trained on masks"
        )
    return source


def _output_layers(cfg: CfgNode) -> type[SharedOutputLayers]:
    return MaskKeepingOutputLayers if mask_source(cfg) == "proposal" else SharedOutputLayers


@ROI_HEADS_REGISTRY.register()
class ProposalMaskROIHeads(KeepsProposalMasks, StandardROIHeads):
    """`StandardROIHeads` of Detectron2 whose detections have the masks that `MODEL.SHARPMASK.DETECTION_MASKS` selects.

    Checkpoints of `StandardROIHeads` can be loaded unchanged.
    """

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts = super()._init_box_head(cfg, input_shape)
        parts["box_predictor"] = _output_layers(cfg)(cfg, parts["box_head"].output_shape)
        return parts

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return super()._init_mask_head(cfg, input_shape) if mask_source(cfg) == "head" else {}

    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Label and sample RoIs for training, as Detectron2 does; the masks of proposals are dropped.

        Args:
            proposals: proposals, one `Instances` per image.
            targets: ground truth, one `Instances` per image.

        Returns:
            Sampled RoIs with labels, one `Instances` per image.
        """
        return super().label_and_sample_proposals(without_masks(proposals), targets)


@ROI_HEADS_REGISTRY.register()
class ProposalMaskRes5ROIHeads(KeepsProposalMasks, Res5ROIHeads):
    """`Res5ROIHeads` of Detectron2, the heads of C4 models, with the masks that `MODEL.SHARPMASK.DETECTION_MASKS` selects.

    Checkpoints of `Res5ROIHeads` can be loaded unchanged.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts = super().from_config(cfg, input_shape)
        if mask_source(cfg) != "head":
            parts.pop("mask_head", None)
        # Its input is the average of res5.
        parts["box_predictor"] = _output_layers(cfg)(cfg, parts["box_predictor"].cls_score.in_features)
        return parts

    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Label and sample RoIs for training, as Detectron2 does; the masks of proposals are dropped.

        Args:
            proposals: proposals, one `Instances` per image.
            targets: ground truth, one `Instances` per image.

        Returns:
            Sampled RoIs with labels, one `Instances` per image.
        """
        return super().label_and_sample_proposals(without_masks(proposals), targets)
