"""The RoI heads of the MultiPath network (arXiv 1604.02135): foveal regions, skip connections and the integral loss.

Shape letters: R RoIs of an image, K classes without the background, N detections.
"""

import torch
from detectron2.config import configurable
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
    """Put dropout, in place, behind each fully connected layer of Detectron2's FastRCNNConvFCHead. Returns `box_head`.

    Names of parameters stay as they are.

    Raises:
        ValueError: the box head has no such layer.
    """
    activations = [name for name, child in box_head.named_children() if isinstance(child, nn.ReLU)]
    if not activations:
        raise UserError(f"MODEL.MULTIPATH.DROPOUT is {probability}, but {type(box_head).__name__} has nothing to drop")
    for name in activations:
        setattr(box_head, name, nn.Sequential(nn.ReLU(), nn.Dropout(probability)))
    return box_head


def best_boxes(boxes: Tensor, scores: Tensor, image_size: tuple) -> Tensor:
    """Each RoI's box of its best class, clipped to the image.

    Args:
        boxes: (R, 4 K) XYXY in pixels, or (R, 4) if class-agnostic.
        scores: (R, K + 1), the background last.
        image_size: (height, width).

    Returns:
        (R, 4) XYXY in pixels.
    """
    num_regressed = boxes.shape[1] // 4
    # A class-agnostic regressor has one box for all classes.
    best = scores[:, :-1].argmax(dim=1) % num_regressed
    chosen = boxes.view(len(boxes), num_regressed, 4)[torch.arange(len(boxes), device=boxes.device), best]
    # RoI pooling reads memory that is not there where a coordinate is not a number.
    chosen = Boxes(chosen.nan_to_num())
    chosen.clip(image_size)
    return chosen.tensor


@ROI_HEADS_REGISTRY.register()
class MultiPathROIHeads(ProposalMaskROIHeads):
    """MultiPath's classifier and box regressor in Detectron2's StandardROIHeads; each part can be switched off by MODEL.MULTIPATH.

    Masks of detections are chosen by MODEL.SHARPMASK.DETECTION_MASKS; a mask head is Detectron2's and reads
    MODEL.ROI_HEADS.IN_FEATURES. With every part off this is StandardROIHeads on one feature.
    """

    @configurable
    def __init__(self, *, iterations: int, voting_iou: float, keep_proposal_masks: bool, **kwargs):
        """
        Args:
            iterations: times that RoIs are classified and moved at test time.
            voting_iou: IoU from which boxes vote for a kept one; 0: no voting.
            keep_proposal_masks: detections get the masks of the proposals that they came from.
            kwargs: of StandardROIHeads.

        Raises:
            ValueError: no iteration, or an IoU outside 0..1.
        """
        super().__init__(**kwargs)
        if iterations < 1:
            raise UserError(f"MODEL.MULTIPATH.ITERATIONS is {iterations}: it must be 1 at least")
        if not 0 <= voting_iou <= 1:
            raise UserError(f"MODEL.MULTIPATH.BOX_VOTING is {voting_iou}: it must lie between 0 and 1")
        self.iterations = iterations
        self.voting_iou = voting_iou
        self.keep_proposal_masks = keep_proposal_masks

    @property
    def keeps_proposal_masks(self) -> bool:
        return self.keep_proposal_masks

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        multipath, box_head = cfg.MODEL.MULTIPATH, cfg.MODEL.ROI_BOX_HEAD
        factors, levels = list(multipath.FOVEAL_FACTORS), list(multipath.LEVELS)
        if len(factors) != len(levels) or not factors:
            raise UserError(
                f"MODEL.MULTIPATH.LEVELS has {len(levels)} lists for {len(factors)} FOVEAL_FACTORS: it needs one for each"
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

    def _forward_box(self, features: dict, proposals: list):
        """As of StandardROIHeads; at test time with iterations, voting and the masks of proposals."""
        if self.training:
            return super()._forward_box(features, proposals)
        maps = [features[name] for name in self.box_in_features]
        found = [([], []) for _ in proposals]
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
            # Every iteration has the RoIs in the order of the proposals.
            indices.append(index % len(proposed))
        if self.keep_proposal_masks:
            attach_proposal_masks(detections, proposals, indices)
        return detections

    def _detect(self, boxes: Tensor, scores: Tensor, image_size: tuple) -> tuple:
        """
        Args:
            boxes: (R, 4 K) XYXY in pixels, or (R, 4) if class-agnostic.
            scores: (R, K + 1).
            image_size: (height, width).

        Returns:
            Instances of N detections; (N,) long, the RoI of each.
        """
        predictor = self.box_predictor
        # Detectron2 drops these too, but its indices then count the rest.
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


def _candidates(boxes: Tensor, scores: Tensor, image_size: tuple, score_thresh: float) -> tuple:
    """Boxes (A, 4), scores (A,) and classes (A,) that Detectron2 hands to its suppression, for boxes and scores of R RoIs."""
    num_regressed = boxes.shape[1] // 4
    roi, classes = (scores[:, :-1] > score_thresh).nonzero().unbind(1)
    clipped = Boxes(boxes.view(len(boxes), num_regressed, 4)[roi, classes % num_regressed])
    clipped.clip(image_size)
    return clipped.tensor, scores[roi, classes], classes
