"""RoI heads of the MultiPath network (arXiv 1604.02135): foveal regions, skip connections and the integral loss.

Shape letters:
    R: RoIs of an image
    K: classes without background
    N: detections of an image
    A: boxes of an image before suppression
"""

from typing import Any, Union

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, build_box_head
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ...errors import UserError
from .box_voting import vote_boxes
from .foveal import FovealPooler, FovealTowers
from .integral_loss import IntegralOutputLayers
from .proposal_masks import ProposalMaskROIHeads, attach_proposal_masks, mask_source
from .skip_pooling import SkipPooler


def add_dropout(box_head: nn.Module, probability: float) -> nn.Module:
    """Insert dropout after each fully connected layer of Detectron2's `FastRCNNConvFCHead`, in place.

    The names of the parameters do not change.

    Args:
        box_head: the box head.
        probability: probability of dropping a value, above 0 and below 1.

    Returns:
        `box_head`.

    Raises:
        UserError: the box head has no fully connected layer.
    """
    activations = [name for name, child in box_head.named_children() if isinstance(child, nn.ReLU)]
    if not activations:
        raise UserError(
            f"MODEL.MULTIPATH.DROPOUT is {probability}, but {type(box_head).__name__} has no fully connected layer: set it to 0"
        )
    for name in activations:
        setattr(box_head, name, nn.Sequential(nn.ReLU(), nn.Dropout(probability)))
    return box_head


def best_boxes(boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Select the box of each RoI's most probable class, and clip it to the image.

    Args:
        boxes: (R, 4 K) XYXY in pixels of the network's input, or (R, 4) for a class-agnostic regressor.
        scores: (R, K + 1) probabilities; background is the last column and is not selected.
        image_size: (height, width) of the network's input in pixels.

    Returns:
        (R, 4) XYXY in pixels of the network's input.
    """
    num_regressed = boxes.shape[1] // 4
    # A class-agnostic regressor has one box for all classes.
    best = scores[:, :-1].argmax(dim=1) % num_regressed
    chosen = boxes.view(len(boxes), num_regressed, 4)[torch.arange(len(boxes), device=boxes.device), best]
    # RoI pooling reads outside its memory if a coordinate is nan.
    chosen = Boxes(chosen.nan_to_num())
    chosen.clip(image_size)
    return chosen.tensor


@ROI_HEADS_REGISTRY.register()
class MultiPathROIHeads(ProposalMaskROIHeads):
    """`StandardROIHeads` of Detectron2 with the classifier and box regressor of MultiPath, whose parts are configured by `MODEL.MULTIPATH`.

    `MODEL.SHARPMASK.DETECTION_MASKS` selects the masks of detections. A mask head is that of `MODEL.ROI_MASK_HEAD` and
    uses `MODEL.ROI_HEADS.IN_FEATURES`. If all parts are disabled, the results equal those of `StandardROIHeads` on one feature.
    """

    @configurable
    def __init__(self, *, iterations: int, voting_iou: float, keep_proposal_masks: bool, **kwargs: Any):
        """
        Args:
            iterations: number of iterations of iterative localisation at test time. In each further iteration the boxes predicted in the
                iteration before are the RoIs.
            voting_iou: minimum IoU of boxes in box voting, from 0 to 1; 0 disables box voting.
            keep_proposal_masks: assign to each detection the mask of its proposal.
            kwargs: arguments of `StandardROIHeads`.

        Raises:
            UserError: `iterations` is less than 1, or `voting_iou` is not from 0 to 1.
        """
        super().__init__(**kwargs)
        if iterations < 1:
            raise UserError(f"MODEL.MULTIPATH.ITERATIONS is {iterations}: it must be at least 1")
        if not 0 <= voting_iou <= 1:
            raise UserError(f"MODEL.MULTIPATH.BOX_VOTING is {voting_iou}: it must lie between 0 and 1")
        self.iterations = iterations
        self.voting_iou = voting_iou
        self.keep_proposal_masks = keep_proposal_masks

    @property
    def keeps_proposal_masks(self) -> bool:
        """Whether detections have the masks of their proposals, if the proposals have masks."""
        return self.keep_proposal_masks

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        multipath, box_head = cfg.MODEL.MULTIPATH, cfg.MODEL.ROI_BOX_HEAD
        factors, levels = list(multipath.FOVEAL_FACTORS), list(multipath.LEVELS)
        if len(factors) != len(levels) or not factors:
            raise UserError(
                f"MODEL.MULTIPATH.LEVELS has {len(levels)} lists for {len(factors)} FOVEAL_FACTORS: give one list per factor"
            )
        if multipath.OWN_REGRESSOR_TOWER:
            factors.append(multipath.REGRESSOR_FACTOR)
            levels.append(multipath.REGRESSOR_LEVELS)
        poolers = [
            SkipPooler(
                input_shape,
                levels=names,
                resolution=box_head.POOLER_RESOLUTION,
                sampling_ratio=box_head.POOLER_SAMPLING_RATIO,
                pooler_type=box_head.POOLER_TYPE,
                mix_channels=multipath.MIX_CHANNELS if multipath.SKIP else None,
                scale=multipath.SKIP_SCALE,
            )
            for names in levels
        ]
        towers = [build_box_head(cfg, pooler.output_shape) for pooler in poolers]
        if multipath.DROPOUT > 0:
            towers = [add_dropout(tower, multipath.DROPOUT) for tower in towers]
        regressor_tower = towers.pop() if multipath.OWN_REGRESSOR_TOWER else None
        towers = FovealTowers(towers=towers, regressor_tower=regressor_tower)
        in_features = [name for name in input_shape if any(name in pooler.levels for pooler in poolers)]
        return {
            "box_in_features": in_features,
            "box_pooler": FovealPooler(in_features=in_features, factors=factors, poolers=poolers),
            "box_head": towers,
            "box_predictor": IntegralOutputLayers(cfg, *towers.output_shapes),
            "iterations": multipath.ITERATIONS,
            "voting_iou": multipath.BOX_VOTING,
            "keep_proposal_masks": mask_source(cfg) == "proposal",
        }

    def _forward_box(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> Union[dict[str, Tensor], list[Instances]]:
        """Compute the losses in training. At test time detect with iterative localisation, box voting and the masks of proposals."""
        if self.training:
            return super()._forward_box(features, proposals)
        maps = [features[name] for name in self.box_in_features]
        found = [([], []) for _ in proposals]  # per image: boxes and scores of all iterations
        rois = proposals
        for iteration in range(self.iterations):
            if iteration:
                rois = [
                    Instances(p.image_size, proposal_boxes=Boxes(best_boxes(boxes[-1], scores[-1], p.image_size)))
                    for p, (boxes, scores) in zip(proposals, found)
                ]
            predictions = self.box_predictor(self.box_head(self.box_pooler(maps, [p.proposal_boxes for p in rois])))
            predicted_boxes = self.box_predictor.predict_boxes(predictions, rois)
            predicted_scores = self.box_predictor.predict_probs(predictions, rois)
            for (boxes, scores), new_boxes, new_scores in zip(found, predicted_boxes, predicted_scores):
                boxes.append(new_boxes)
                scores.append(new_scores)
        detections, indices = [], []
        for proposed, (boxes, scores) in zip(proposals, found):
            detected, index = self._detect(torch.cat(boxes), torch.cat(scores), proposed.image_size)
            detections.append(detected)
            # In every iteration the RoIs have the order of the proposals.
            indices.append(index % len(proposed))
        if self.keep_proposal_masks:
            attach_proposal_masks(detections, proposals, indices)
        return detections

    def _detect(self, boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> tuple[Instances, Tensor]:
        """Suppress the boxes of all RoIs of an image, and apply box voting.

        Args:
            boxes: (R, 4 K) XYXY in pixels of the network's input, or (R, 4) for a class-agnostic regressor.
            scores: (R, K + 1) probabilities.
            image_size: (height, width) of the network's input in pixels.

        Returns:
            N detections, and (N,) int64, the index of each detection's RoI.
        """
        predictor = self.box_predictor
        # Detectron2 also drops predictions that are not finite, but then returns indices into the remaining ones.
        finite = (boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)).nonzero()[:, 0]
        boxes, scores = boxes[finite], scores[finite]
        detected, index = fast_rcnn_inference_single_image(
            boxes,
            scores,
            image_size,
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        if self.voting_iou > 0:
            voters = _candidates(boxes, scores, image_size, predictor.test_score_thresh)
            voted = vote_boxes(detected.pred_boxes.tensor, detected.pred_classes, *voters, self.voting_iou)
            detected.pred_boxes = Boxes(voted)
        return detected, finite[index]


def _candidates(
    boxes: Tensor, scores: Tensor, image_size: tuple[int, int], score_thresh: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (A, 4), scores (A,) and classes (A,) to which Detectron2 applies suppression, from the predictions for R RoIs."""
    num_regressed = boxes.shape[1] // 4
    roi, classes = (scores[:, :-1] > score_thresh).nonzero().unbind(1)
    clipped = Boxes(boxes.view(len(boxes), num_regressed, 4)[roi, classes % num_regressed])
    clipped.clip(image_size)
    return clipped.tensor, scores[roi, classes], classes
