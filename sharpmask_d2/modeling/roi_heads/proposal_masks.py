"""RoI heads whose detections have the mask of the proposal they came from, as in the MultiPath paper.

Shape letters: N detections of an image, H W image.
"""

from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import BitMasks, ROIMasks
from torch import Tensor

from ...errors import UserError
from ...structures import WindowMasks

MASKS = ("proposal", "head", "none")


class ProposalROIMasks(ROIMasks):
    """Window masks in the place of Detectron2's masks of RoIs: what pastes RoI masks pastes these, with no change to it."""

    def __init__(self, masks: WindowMasks):
        """
        Args:
            masks: N masks in the frame of the detector's image.
        """
        self.masks = masks

    def to(self, device) -> "ProposalROIMasks":
        return ProposalROIMasks(self.masks.to(device))

    @property
    def device(self):
        return self.masks.device

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, item) -> "ProposalROIMasks":
        return ProposalROIMasks(self.masks[item])

    def __repr__(self) -> str:
        return f"ProposalROIMasks({self.masks!r})"

    def to_bitmasks(self, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> BitMasks:
        """
        Args:
            boxes: of the detections; not read, a mask lies where its proposal was.
            height, width: of the image to paste into.
            threshold: not read, the masks have their own.

        Returns:
            BitMasks (N, H, W).
        """
        old_height, old_width = self.masks.image_size
        masks = self.masks.scale(width / old_width, height / old_height, (height, width))
        return BitMasks(masks.paste())


def attach_proposal_masks(instances: list, proposals: list, indices: list) -> None:
    """Give detections, in place, the masks of their proposals as `pred_masks`.

    Args:
        instances: Instances of each image.
        proposals: of each image; those without `proposal_masks` are passed over.
        indices: (N,) of each image, the proposal of each detection.
    """
    for detected, proposed, index in zip(instances, proposals, indices):
        if proposed.has("proposal_masks"):
            detected.pred_masks = ProposalROIMasks(proposed.proposal_masks[index])


def without_masks(proposals: list) -> list:
    """The proposals without `proposal_masks`, which Detectron2 cannot join with ground truth."""
    kept = []
    for proposed in proposals:
        fields = {name: value for name, value in proposed.get_fields().items() if name != "proposal_masks"}
        kept.append(type(proposed)(proposed.image_size, **fields))
    return kept


class MaskKeepingOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor, whose detections keep the masks of their proposals. Parameters have the same names."""

    def inference(self, predictions: tuple, proposals: list) -> tuple:
        all_boxes, all_scores = self.predict_boxes(predictions, proposals), self.predict_probs(predictions, proposals)
        instances, indices = fast_rcnn_inference(
            all_boxes,
            all_scores,
            [proposed.image_size for proposed in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )
        # Detectron2 leaves out proposals whose prediction is not finite, and counts in those that are left.
        finite = [
            (boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)).nonzero()[:, 0]
            for boxes, scores in zip(all_boxes, all_scores)
        ]
        indices = [kept[index] for kept, index in zip(finite, indices)]
        attach_proposal_masks(instances, proposals, indices)
        return instances, indices


class KeepsProposalMasks:
    """Mixin of RoI heads whose detections may have the masks of their proposals."""

    @property
    def keeps_proposal_masks(self) -> bool:
        """Whether detections get the masks of their proposals, where these have masks."""
        return isinstance(self.box_predictor, MaskKeepingOutputLayers)

    @property
    def mask_on(self) -> bool:
        """Whether there is a mask head; Detectron2's test-time augmentation switches it off while it looks for boxes.

        Raises:
            RuntimeError: when switched off, if detections keep the masks of proposals, which nothing would then bring back.
        """
        return self._mask_on

    @mask_on.setter
    def mask_on(self, on: bool) -> None:
        if "_mask_on" in vars(self) and not on and self.keeps_proposal_masks:
            raise RuntimeError(
                "Detectron2's GeneralizedRCNNWithTTA loses the masks of proposals, which detections have by "
                "MODEL.SHARPMASK.DETECTION_MASKS 'proposal': use sharpmask_d2.modeling.ProposalMaskTTA in its place, or set the key to "
                "'none' (boxes alone), or to 'head' with MODEL.MASK_ON True (a mask head)"
            )
        self._mask_on = on


def mask_source(cfg) -> str:
    """MODEL.SHARPMASK.DETECTION_MASKS.

    Raises:
        ValueError: not one of `MASKS`, or "head" where MODEL.MASK_ON is off.
    """
    source = cfg.MODEL.SHARPMASK.DETECTION_MASKS
    if source not in MASKS:
        raise UserError(f"MODEL.SHARPMASK.DETECTION_MASKS is {source!r}: choose from {MASKS}")
    if source == "head" and not cfg.MODEL.MASK_ON:
        raise UserError(
            "MODEL.SHARPMASK.DETECTION_MASKS is 'head': that needs MODEL.MASK_ON, for the masks to train on"
        )
    return source


@ROI_HEADS_REGISTRY.register()
class ProposalMaskROIHeads(KeepsProposalMasks, StandardROIHeads):
    """Detectron2's StandardROIHeads with masks from MODEL.SHARPMASK.DETECTION_MASKS; checkpoints of those load unchanged."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        parts = super()._init_box_head(cfg, input_shape)
        if mask_source(cfg) == "proposal":
            parts["box_predictor"] = MaskKeepingOutputLayers(cfg, parts["box_head"].output_shape)
        return parts

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        return super()._init_mask_head(cfg, input_shape) if mask_source(cfg) == "head" else {}

    def label_and_sample_proposals(self, proposals: list, targets: list) -> list:
        return super().label_and_sample_proposals(without_masks(proposals), targets)


@ROI_HEADS_REGISTRY.register()
class ProposalMaskRes5ROIHeads(KeepsProposalMasks, Res5ROIHeads):
    """The same of Detectron2's Res5ROIHeads, the heads of C4 models."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        parts = super().from_config(cfg, input_shape)
        source = mask_source(cfg)
        if source != "head":
            parts.pop("mask_head", None)
        if source == "proposal":
            # The shape of what it reads: res5 averaged.
            parts["box_predictor"] = MaskKeepingOutputLayers(cfg, parts["box_predictor"].cls_score.in_features)
        return parts

    def label_and_sample_proposals(self, proposals: list, targets: list) -> list:
        return super().label_and_sample_proposals(without_masks(proposals), targets)
