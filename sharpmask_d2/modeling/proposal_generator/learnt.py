"""Base class and checks of proposal generators that are trained together with a detector.

Shape letters: N windows that contribute to the loss of scores, P windows that contribute to the losses of masks, M mask side in cells.
"""

from typing import Any, Optional

import torch
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ...errors import UserError
from ..losses import mask_iou


class LearntGenerator(nn.Module):
    """A generator that is trained, or frozen and then needs weights before a detector is trained on its proposals.

    It has weights as soon as a state with all of its parameters has been loaded, into the generator or into a detector that contains it.
    """

    # Whether the generator is not trained.
    frozen: bool
    # Whether weights have been loaded.
    has_weights: bool = False
    # The part of the error message that says how to load weights.
    way_to_weights = "name a checkpoint of the detector that holds the generator's parameters in MODEL.WEIGHTS"

    def check_weights(self) -> None:
        """Checks that a frozen generator has weights.

        Raises:
            UserError: the generator is frozen, and its weights are random.
        """
        if self.frozen and not self.has_weights:
            raise UserError(
                "MODEL.SHARPMASK.GENERATOR.FROZEN is True, but no weights of the proposal generator were loaded: the detector would be "
                f"trained on random proposals. Either {self.way_to_weights}, or train the generator with the detector: FROZEN False"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if all(prefix + name in state_dict for name, _ in self.named_parameters()):
            self.has_weights = True


def check_masks(gt_instances: Optional[list[Instances]], num_images: int) -> None:
    """Checks that training has ground truth with masks.

    Args:
        gt_instances: ground truth of each image, with `gt_masks`.
        num_images: number of images in the batch.

    Raises:
        UserError: there is no ground truth, or not for every image, or it has no masks.
    """
    if gt_instances is None or len(gt_instances) != num_images:
        raise UserError("MODEL.SHARPMASK.GENERATOR.FROZEN is False: training needs the ground truth of every image")
    # Detectron2's mapper omits the field if an image has no object.
    if any(len(gt) and not gt.has("gt_masks") for gt in gt_instances):
        raise UserError(
            "MODEL.SHARPMASK.GENERATOR.FROZEN is False, but training images come without gt_masks: set MODEL.MASK_ON True, so that "
            "Detectron2's mapper loads them in INPUT.MASK_FORMAT ('polygon' or 'bitmask')"
        )


@torch.no_grad()
def log_windows(scores: Tensor, labels: Tensor, masks: Tensor, targets: Tensor, num_images: int) -> None:
    """Writes the quality of scores and masks in training to the event storage of Detectron2.

    The entries are sharpmask/num_positives, the number of masks per image, sharpmask/mask_iou and sharpmask/score_accuracy.

    Args:
        scores: (N,) logits.
        labels: (N,) in {0, 1}.
        masks: (P, M, M) logits.
        targets: (P, M, M) in {0, 1}.
        num_images: number of images in the batch.
    """
    storage = get_event_storage()
    storage.put_scalar("sharpmask/num_positives", len(masks) / num_images)
    if len(masks):
        storage.put_scalar("sharpmask/mask_iou", mask_iou(masks, targets).mean().item())
    if len(scores):
        storage.put_scalar("sharpmask/score_accuracy", ((scores > 0) == (labels > 0)).float().mean().item())
