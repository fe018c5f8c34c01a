"""Integral loss: one classifier per IoU threshold, whose probabilities are averaged at test time (MultiPath, section 3.3).

Shape letters:
    R: RoIs of all images
    n: IoU thresholds
    K: classes without background
    D: length of a feature vector
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat, cross_entropy
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor, nn

from ...errors import UserError
from ..losses import part_of_mean

_IGNORED = -1


def labels_at_thresholds(gt_classes: Tensor, ious: Tensor, thresholds: Sequence[float], num_classes: int) -> Tensor:
    """Label RoIs for n classifiers, each of which has its own IoU threshold for foreground.

    Args:
        gt_classes: (R,) int64, class of the matched ground truth, K for background, -1 for ignored RoIs.
        ious: (R,) IoU with the matched ground truth; arbitrary for background.
        thresholds: n IoU thresholds, from 0 to 1.
        num_classes: K.

    Returns:
        (n, R) int64: the class if the IoU reaches the threshold, K otherwise, and -1 for ignored RoIs.
    """
    reached = ious >= torch.tensor(thresholds, dtype=ious.dtype, device=ious.device)[:, None]
    return torch.where(reached | (gt_classes == _IGNORED), gt_classes, num_classes)


class IntegralOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor with one classifier per IoU threshold, and one box regressor that may have its own features."""

    @configurable
    def __init__(self, input_shape: ShapeSpec, box_input_shape: ShapeSpec, *, iou_thresholds: list[float], **kwargs):
        """
        Args:
            input_shape: shape of the features of the classifiers; `channels` is read.
            box_input_shape: shape of the features of the regressor; `channels` is read.
            iou_thresholds: IoU from which a RoI is foreground, one per classifier, ascending. A RoI that the sampler labels as background
                is background for all classifiers.
            kwargs: arguments of `FastRCNNOutputLayers`.

        Raises:
            UserError: there is no threshold, or the thresholds do not ascend.
        """
        super().__init__(input_shape, **kwargs)
        if not iou_thresholds or list(iou_thresholds) != sorted(set(iou_thresholds)):
            raise UserError(
                f"MODEL.MULTIPATH.IOU_THRESHOLDS is {list(iou_thresholds)}: give at least one IoU, in ascending order"
            )
        self.iou_thresholds = list(iou_thresholds)
        self.cls_score = nn.Linear(self.cls_score.in_features, len(self.iou_thresholds) * (self.num_classes + 1))
        self.bbox_pred = nn.Linear(box_input_shape.channels, self.bbox_pred.out_features)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec, box_input_shape: ShapeSpec) -> dict[str, Any]:
        thresholds = cfg.MODEL.MULTIPATH.IOU_THRESHOLDS
        sampled = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[-1]
        if thresholds and min(thresholds) < sampled:
            raise UserError(
                f"MODEL.MULTIPATH.IOU_THRESHOLDS is {list(thresholds)}: no threshold may be below MODEL.ROI_HEADS.IOU_THRESHOLDS, "
                f"{sampled}, because RoIs with a lower IoU are labelled as background"
            )
        parts = super().from_config(cfg, input_shape)
        return {**parts, "box_input_shape": box_input_shape, "iou_thresholds": thresholds}

    def forward(self, features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Predict classes and boxes of RoIs.

        Args:
            features: features of the classifiers and of the regressor, (R, D) each.

        Returns:
            Logits (R, n * (K + 1)), where background is the last of each K + 1 entries; and box deltas (R, 4 K), or (R, 4) for a
            class-agnostic regressor.
        """
        class_features, box_features = features
        return self.cls_score(class_features), self.bbox_pred(box_features)

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """Compute the mean cross-entropy of the classifiers, and Detectron2's box loss with the labels of the sampler.

        Both are means over the RoIs of all processes, as in `losses`.

        Args:
            predictions: result of `forward`.
            proposals: sampled RoIs, one `Instances` per image, with `gt_classes` and, if the image has ground truth, `gt_boxes`.

        Returns:
            The scalar losses "loss_cls" and "loss_box_reg", multiplied by their weights.
        """
        scores, deltas = predictions
        gt_classes = cat([p.gt_classes for p in proposals])
        boxes = cat([p.proposal_boxes.tensor for p in proposals])
        # In images without ground truth all RoIs are background, whose boxes do not matter.
        gt_boxes = cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals])
        ious = matched_pairwise_iou(Boxes(boxes), Boxes(gt_boxes))
        labels = labels_at_thresholds(gt_classes, ious, self.iou_thresholds, self.num_classes)
        heads = self._per_threshold(scores).unbind(1)
        # Detectron2's statistics "fast_rcnn/..." are those of the lowest threshold.
        _log_classification_stats(heads[0], labels[0])
        losses = {
            "loss_cls": torch.stack(
                [cross_entropy(head, label, ignore_index=_IGNORED) for head, label in zip(heads, labels)]
            ).mean(),
            "loss_box_reg": self.box_reg_loss(boxes, gt_boxes, deltas, gt_classes),
        }
        part = part_of_mean(len(boxes), boxes.device)
        return {name: loss * part * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def predict_probs(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> tuple[Tensor, ...]:
        """Average the probabilities of the classifiers.

        Args:
            predictions: result of `forward`.
            proposals: RoIs, one `Instances` per image.

        Returns:
            One tensor (number of RoIs of the image, K + 1) per image, float32.
        """
        probabilities = self._per_threshold(predictions[0]).float().softmax(dim=-1).mean(dim=1)
        return probabilities.split([len(p) for p in proposals])

    def _per_threshold(self, scores: Tensor) -> Tensor:
        return scores.view(-1, len(self.iou_thresholds), self.num_classes + 1)
