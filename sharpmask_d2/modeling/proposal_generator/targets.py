"""What generators that learn within a detector share."""

from contextlib import contextmanager

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..losses import mask_iou


def check_masks(gt_instances, num_images: int) -> None:
    """Raises ValueError unless there is ground truth with masks for every image."""
    if gt_instances is None or len(gt_instances) != num_images:
        raise ValueError("MODEL.SHARPMASK.GENERATOR.FROZEN is False: training needs the ground truth of every image")
    # Without any object, Detectron2's mapper leaves the field out.
    if any(len(gt) and not gt.has("gt_masks") for gt in gt_instances):
        raise ValueError(
            "MODEL.SHARPMASK.GENERATOR.FROZEN is False, but training images come without gt_masks: set MODEL.MASK_ON True, so that "
            "Detectron2's mapper loads them in INPUT.MASK_FORMAT ('polygon' or 'bitmask')"
        )


@torch.no_grad()
def log_windows(scores: Tensor, labels: Tensor, masks: Tensor, targets: Tensor, num_images: int) -> None:
    """Puts into the event storage how good the sampled windows are: scores and labels (N,), masks and targets (P, M, M)."""
    storage = get_event_storage()
    storage.put_scalar("sharpmask/num_positives", len(masks) / num_images)
    if len(masks):
        storage.put_scalar("sharpmask/mask_iou", mask_iou(masks, targets).mean().item())
    if len(scores):
        storage.put_scalar("sharpmask/score_accuracy", ((scores > 0) == (labels > 0)).float().mean().item())


@contextmanager
def aside():
    """No gradients; afterwards autocast forgets the weights it cast without, which older versions of torch use again where they are due."""
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()
