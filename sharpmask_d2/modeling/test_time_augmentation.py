"""Detectron2's test-time augmentation for detectors whose masks are those of their proposals.

Shape letters:
    N: detections of all augmented images together
    K: classes
"""

from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from detectron2.structures import Instances
from fvcore.transforms.transform import Transform
from torch import Tensor

from ..data.proposal_mapper import transform_masks
from ..structures import WindowMasks
from .roi_heads import ProposalROIMasks


class ProposalMaskTTA(GeneralizedRCNNWithTTA):
    """`GeneralizedRCNNWithTTA` of Detectron2 whose detections keep the masks of their proposals.

    The mask of a detection is that of its proposal in the augmented image in which it was detected. Augmentations are resizing and
    horizontal flips, from `TEST.AUG`. Detectors with a mask head or without masks are augmented as in Detectron2.
    """

    def _inference_one_image(self, input: dict[str, Any]) -> dict[str, Instances]:
        if not getattr(self.model.roi_heads, "keeps_proposal_masks", False):
            return super()._inference_one_image(input)
        original_size = input["height"], input["width"]
        augmented, transforms = self._get_augmented_inputs(input)
        found = self._batch_inference(augmented)
        inverses = [transform.inverse() for transform in transforms]
        boxes = torch.cat([_transform_boxes(x.pred_boxes.tensor, inverse) for x, inverse in zip(found, inverses)])
        scores, classes = torch.cat([x.scores for x in found]), torch.cat([x.pred_classes for x in found])
        detections, index = self._suppress(boxes, scores, classes, original_size)
        if all(x.has("pred_masks") for x in found):
            masks = [transform_masks(x.pred_masks.masks, inverse) for x, inverse in zip(found, inverses)]
            detections.pred_masks = ProposalROIMasks(WindowMasks.cat(masks)[index])
        return {"instances": detector_postprocess(detections, *original_size)}

    def _suppress(
        self, boxes: Tensor, scores: Tensor, classes: Tensor, image_size: tuple[int, int]
    ) -> tuple[Instances, Tensor]:
        """Suppress the detections of all augmented images together.

        Args:
            boxes: (N, 4) XYXY in pixels of the original image.
            scores: (N,) probabilities.
            classes: (N,) int64, from 0 to K - 1.
            image_size: (height, width) of the original image in pixels.

        Returns:
            The remaining detections, and their indices among the N detections, int64.
        """
        roi_heads = self.cfg.MODEL.ROI_HEADS
        # Detectron2 expects one score per class and one for the background.
        by_class = scores.new_zeros(len(scores), roi_heads.NUM_CLASSES + 1)
        by_class[torch.arange(len(scores), device=scores.device), classes] = scores
        # The detections have already passed the score threshold; the scores of all other classes are zero.
        return fast_rcnn_inference_single_image(
            boxes, by_class, image_size, 1e-8, roi_heads.NMS_THRESH_TEST, self.cfg.TEST.DETECTIONS_PER_IMAGE
        )


def _transform_boxes(boxes: Tensor, transform: Transform) -> Tensor:
    """Apply a transform to boxes, (N, 4) XYXY."""
    return torch.as_tensor(transform.apply_box(boxes.cpu().numpy()), dtype=boxes.dtype, device=boxes.device)
