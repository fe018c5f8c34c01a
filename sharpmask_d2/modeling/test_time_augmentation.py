"""Detectron2's test-time augmentation with the masks of proposals.

Shape letters: N detections of all augmented images together, K classes.
"""

import torch
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from torch import Tensor

from ..data.proposal_mapper import transform_masks
from ..structures import WindowMasks
from .roi_heads import ProposalROIMasks


class ProposalMaskTTA(GeneralizedRCNNWithTTA):
    """Detectron2's GeneralizedRCNNWithTTA, in which each detection has the mask of its proposal, of whichever augmented image.

    A detector with a mask head, or without masks, is augmented as Detectron2 does it. Augmentations are resizing and horizontal flips.
    """

    def _inference_one_image(self, input: dict) -> dict:
        if not getattr(self.model.roi_heads, "keeps_proposal_masks", False):
            return super()._inference_one_image(input)
        original_size = input["height"], input["width"]
        augmented, transforms = self._get_augmented_inputs(input)
        found = self._batch_inference(augmented)
        inverses = [transform.inverse() for transform in transforms]
        boxes = torch.cat([_transform_boxes(x.pred_boxes.tensor, inverse) for x, inverse in zip(found, inverses)])
        scores, classes = torch.cat([x.scores for x in found]), torch.cat([x.pred_classes for x in found])
        detections, index = self._choose(boxes, scores, classes, original_size)
        if all(x.has("pred_masks") for x in found):
            masks = [transform_masks(x.pred_masks.masks, inverse) for x, inverse in zip(found, inverses)]
            detections.pred_masks = ProposalROIMasks(WindowMasks.cat(masks)[index])
        return {"instances": detector_postprocess(detections, *original_size)}

    def _choose(self, boxes: Tensor, scores: Tensor, classes: Tensor, image_size: tuple) -> tuple:
        """What remains of all detections, as Instances, and which of the N they are, as a tensor of int64.

        Args:
            boxes: (N, 4) XYXY in pixels of the original image.
            scores, classes: (N,).
            image_size: (height, width).
        """
        roi_heads = self.cfg.MODEL.ROI_HEADS
        # Detectron2 expects a score of every class, and of the background.
        by_class = scores.new_zeros(len(scores), roi_heads.NUM_CLASSES + 1)
        by_class[torch.arange(len(scores), device=scores.device), classes] = scores
        # Detections have passed the threshold of scores before; the others of their row are zero.
        return fast_rcnn_inference_single_image(
            boxes, by_class, image_size, 1e-8, roi_heads.NMS_THRESH_TEST, self.cfg.TEST.DETECTIONS_PER_IMAGE
        )


def _transform_boxes(boxes: Tensor, transform) -> Tensor:
    """(N, 4) to (N, 4), XYXY."""
    return torch.as_tensor(transform.apply_box(boxes.cpu().numpy()), dtype=boxes.dtype, device=boxes.device)
