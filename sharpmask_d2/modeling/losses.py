"""Losses of windows, and the IoU of their masks.

Means are over the windows of all processes: their mean over processes, which DistributedDataParallel computes, equals the loss that a
single process with all windows would have.

Shape letters: N windows, M mask side.
"""

import torch
from detectron2.utils import comm
from torch import Tensor
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    # Not an index: an empty selection has to give 0 with a gradient.
    return (values * mask).sum() / _share(mask.sum())


def _share(count: Tensor) -> Tensor:
    """The sum of a scalar over all processes, at least 1, divided by the number of processes."""
    world = comm.get_world_size()
    if world > 1:
        torch.distributed.all_reduce(count)
    return count.clamp(min=1) / world


def mask_loss(logits: Tensor, targets: Tensor, contributes: Tensor) -> Tensor:
    """Binary logistic loss of masks, mean over pixels and over the contributing windows of all processes (DeepMask, section 3.2).

    With y = +-1 this is log(1 + exp(-y f)), the released soft margin loss.

    Args:
        logits: (N, M, M).
        targets: (N, M, M) in {0, 1}.
        contributes: (N,) bool, the windows that count.

    Returns:
        a float32 scalar, 0 if no window of this process contributes.
    """
    losses = binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=(1, 2))
    return _mean_over(losses, contributes)


def score_loss(logits: Tensor, labels: Tensor, contributes: Tensor) -> Tensor:
    """Binary logistic loss of scores, mean over the contributing windows of all processes (DeepMask, section 3.2).

    Args:
        logits: (N,).
        labels: (N,) in {0, 1}.
        contributes: (N,) bool, the windows that count.

    Returns:
        a float32 scalar, 0 if no window of this process contributes.
    """
    return _mean_over(binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none"), contributes)


def quality_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Logistic loss of scores weighed by the square of their error, over the sum of the targets of all processes (Generalized Focal Loss,
    arXiv 2006.04388, section 3.2).

    Args:
        logits: (N,).
        targets: (N,) in 0..1; negative targets are left out.

    Returns:
        a scalar.
    """
    known = targets >= 0
    logits, targets = logits[known].float(), targets[known]
    losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * (logits.sigmoid() - targets) ** 2).sum() / _share(targets.sum())


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the dice coefficient of probabilities and targets (V-Net, arXiv 1606.04797, section 3), mean over the windows of all
    processes.

    Args:
        logits: (N, M, M).
        targets: (N, M, M) in 0..1.

    Returns:
        a scalar, 0 if there is no window.
    """
    probabilities, targets = logits.float().sigmoid().flatten(1), targets.float().flatten(1)
    common = (probabilities * targets).sum(dim=1)
    total = (probabilities**2).sum(dim=1) + (targets**2).sum(dim=1)
    # The one keeps a window without foreground from dividing by zero.
    return (1 - (2 * common + 1) / (total + 1)).sum() / _share(total.new_tensor(len(logits)))


def refinement_losses(masks: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Losses of masks before and after each step of refinement; those before the last one are supervised for the sake of training.

    Args:
        masks: logits (N, m, m) of each step, coarse to fine. The last has side M, of which each side m is a divisor.
        targets: (N, M, M) in {0, 1}.

    Returns:
        scalars, 0 if there is no window: "mask" and "dice" of the last step (`mask_loss`, `dice_loss`), and "side", the sum of `mask_loss`
        over the others, whose targets are means over the cells of theirs.
    """
    every = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    reduced = [avg_pool2d(targets.float()[:, None], targets.shape[-1] // mask.shape[-1])[:, 0] for mask in masks]
    return {
        "mask": mask_loss(masks[-1], reduced[-1], every),
        "dice": dice_loss(masks[-1], reduced[-1]),
        "side": sum(mask_loss(mask, part, every) for mask, part in zip(masks[:-1], reduced)),
    }


@torch.no_grad()
def mask_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of each window's mask with its target.

    Args:
        logits: (N, M, M); a pixel above 0 is foreground.
        targets: (N, M, M) in {0, 1}.

    Returns:
        (N,) in 0..1; 1 where both are empty.
    """
    predicted, targets = logits > 0, targets > 0
    union = (predicted | targets).sum(dim=(1, 2))
    intersection = (predicted & targets).sum(dim=(1, 2))
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
