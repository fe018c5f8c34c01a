"""Integral loss: classifiers trained at several IoU thresholds, averaged at test time (MultiPath, section 3.3).

Shape letters: R RoIs of all images, n thresholds, K classes without the background, D features.
"""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat, cross_entropy
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor, nn

from ...errors import UserError

_IGNORED = -1


def labels_at_thresholds(gt_classes: Tensor, ious: Tensor, thresholds: list, num_classes: int) -> Tensor:
    """Labels of RoIs for classifiers that call a RoI foreground from an IoU of their own on.

    Args:
        gt_classes: (R,) long: the class of each RoI's ground truth, K for background, -1 for RoIs to ignore.
        ious: (R,) IoU with that ground truth; not read for background.
        thresholds: n IoUs.
        num_classes: K.

    Returns:
        (n, R) long: the class where the IoU reaches the threshold, else K; -1 stays.
    """
    reached = ious >= torch.tensor(thresholds, dtype=ious.dtype, device=ious.device)[:, None]
    return torch.where(reached | (gt_classes == _IGNORED), gt_classes, num_classes)


class IntegralOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor with a classifier per IoU threshold and one box regressor, which may read features of its own."""

    @configurable
    def __init__(self, input_shape: ShapeSpec, box_input_shape: ShapeSpec, *, iou_thresholds: list, **kwargs):
        """
        Args:
            input_shape, box_input_shape: channels of what the classifiers and the regressor read.
            iou_thresholds: IoUs from which a RoI is foreground to each classifier, ascending. RoIs below the IoU of the sampler
                are background to all.
            kwargs: of FastRCNNOutputLayers.

        Raises:
            ValueError: no threshold, or not ascending.
        """
        super().__init__(input_shape, **kwargs)
        if not iou_thresholds or list(iou_thresholds) != sorted(set(iou_thresholds)):
            raise UserError(f"MODEL.MULTIPATH.IOU_THRESHOLDS is {list(iou_thresholds)}: it must ascend")
        self.iou_thresholds = list(iou_thresholds)
        self.cls_score = nn.Linear(self.cls_score.in_features, len(self.iou_thresholds) * (self.num_classes + 1))
        self.bbox_pred = nn.Linear(box_input_shape.channels, self.bbox_pred.out_features)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg, input_shape, box_input_shape):
        thresholds = cfg.MODEL.MULTIPATH.IOU_THRESHOLDS
        sampled = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[-1]
        if thresholds and min(thresholds) < sampled:
            raise UserError(
                f"MODEL.MULTIPATH.IOU_THRESHOLDS is {list(thresholds)}: RoIs below MODEL.ROI_HEADS.IOU_THRESHOLDS, {sampled}, "
                "have no class"
            )
        parts = super().from_config(cfg, input_shape)
        return {**parts, "box_input_shape": box_input_shape, "iou_thresholds": thresholds}

    def forward(self, features: tuple) -> tuple:
        """
        Args:
            features: (R, D) for the classifiers, (R, D) for the regressor.

        Returns:
            (R, n * (K + 1)) logits, the background last of each K + 1; (R, 4 K) deltas, or (R, 4) if class-agnostic.
        """
        class_features, box_features = features
        return self.cls_score(class_features), self.bbox_pred(box_features)

    def losses(self, predictions: tuple, proposals: list) -> dict:
        """The mean of the classifiers' cross-entropies, and Detectron2's loss of boxes at the IoU of the sampler.

        Args:
            predictions: of forward().
            proposals: sampled Instances of each image, with `gt_classes`, and `gt_boxes` where the image has ground truth.

        Returns:
            dict with loss_cls and loss_box_reg.
        """
        scores, deltas = predictions
        gt_classes = cat([p.gt_classes for p in proposals])
        boxes = cat([p.proposal_boxes.tensor for p in proposals])
        # Without ground truth all are background, and what stands in for its boxes is not read.
        gt_boxes = cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals])
        ious = matched_pairwise_iou(Boxes(boxes), Boxes(gt_boxes))
        labels = labels_at_thresholds(gt_classes, ious, self.iou_thresholds, self.num_classes)
        heads = self._per_threshold(scores).unbind(1)
        # As "fast_rcnn", where Detectron2 logs them, the figures of the lowest threshold.
        _log_classification_stats(heads[0], labels[0])
        losses = {
            "loss_cls": torch.stack(
                [cross_entropy(head, label, ignore_index=_IGNORED) for head, label in zip(heads, labels)]
            ).mean(),
            "loss_box_reg": self.box_reg_loss(boxes, gt_boxes, deltas, gt_classes),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def predict_probs(self, predictions: tuple, proposals: list) -> tuple:
        """
        Args:
            predictions: of forward().
            proposals: Instances of each image.

        Returns:
            (RoIs of the image, K + 1) of each image: the mean of the classifiers' probabilities, float32.
        """
        probabilities = self._per_threshold(predictions[0]).float().softmax(dim=-1).mean(dim=1)
        return probabilities.split([len(p) for p in proposals])

    def _per_threshold(self, scores: Tensor) -> Tensor:
        return scores.view(-1, len(self.iou_thresholds), self.num_classes + 1)
