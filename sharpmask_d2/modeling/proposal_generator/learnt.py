"""What generators that learn within a detector share."""

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ...errors import UserError
from ..losses import mask_iou


class LearntGenerator(nn.Module):
    """A generator that is trained, or frozen, and then refuses to have a detector trained on its proposals before it has weights.

    It has them once a state with all of its parameters was loaded into it, alone or as a part of a detector.
    """

    frozen: bool
    has_weights = False
    # What a user who wants it frozen has to do.
    way_to_weights = "name a checkpoint of the detector that holds the generator's parameters in MODEL.WEIGHTS"

    def check_weights(self) -> None:
        """Raises ValueError if it is frozen and its weights are the random ones it was built with."""
        if self.frozen and not self.has_weights:
            raise UserError(
                "MODEL.SHARPMASK.GENERATOR.FROZEN is True, but no weights of the proposal generator were loaded: the detector would be "
                f"trained on random proposals. Either {self.way_to_weights}, or train the generator with the detector: FROZEN False"
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if all(prefix + name in state_dict for name, _ in self.named_parameters()):
            self.has_weights = True


def check_masks(gt_instances, num_images: int) -> None:
    """Raises ValueError unless there is ground truth with masks for every image."""
    if gt_instances is None or len(gt_instances) != num_images:
        raise UserError("MODEL.SHARPMASK.GENERATOR.FROZEN is False: training needs the ground truth of every image")
    # Without any object, Detectron2's mapper leaves the field out.
    if any(len(gt) and not gt.has("gt_masks") for gt in gt_instances):
        raise UserError(
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
