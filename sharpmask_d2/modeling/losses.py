"""Losses of scores and masks of windows, and the IoU of masks.

Each process divides its sum by the number of windows of all processes, over the number of processes. The mean of the losses over processes,
whose gradient DistributedDataParallel computes, thus equals the loss of a single process with all windows.

Shape letters: N windows, M mask side in cells.
"""

import torch
from detectron2.utils import comm
from torch import Tensor
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values at which the mask is True, over all processes."""
    # Multiplication instead of indexing, so that a mask without True gives 0 with a gradient.
    return (values * mask).sum() / _share(mask.sum())


def _share(count: Tensor) -> Tensor:
    """The sum of a scalar over all processes, at least 1, divided by the number of processes."""
    world = comm.get_world_size()
    if world > 1:
        torch.distributed.all_reduce(count)
    return count.clamp(min=1) / world


def part_of_mean(count: int, device: torch.device) -> Tensor:
    """The factor that turns a mean over elements of this process into its part of the mean over the elements of all processes.

    Args:
        count: number of elements of this process.
        device: of the model.
    """
    count = torch.tensor(float(count), device=device)
    return count / _share(count.clone())


def mask_loss(logits: Tensor, targets: Tensor, contributes: Tensor) -> Tensor:
    """Binary logistic loss of masks, averaged over pixels and over the contributing windows of all processes (DeepMask, section 3.2).

    For targets y of 1 and -1 and logits f it is log(1 + exp(-y f)), the soft margin loss of the released code.

    Args:
        logits: (N, M, M).
        targets: (N, M, M) in 0..1.
        contributes: (N,) bool, whether each window contributes to the loss.

    Returns:
        A float32 scalar, 0 if no window of this process contributes.
    """
    losses = binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=(1, 2))
    return _mean_over(losses, contributes)


def score_loss(logits: Tensor, labels: Tensor, contributes: Tensor) -> Tensor:
    """Binary logistic loss of scores, averaged over the contributing windows of all processes (DeepMask, section 3.2).

    Args:
        logits: (N,).
        labels: (N,) in {0, 1}.
        contributes: (N,) bool, whether each window contributes to the loss.

    Returns:
        A float32 scalar, 0 if no window of this process contributes.
    """
    return _mean_over(binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none"), contributes)


def quality_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Quality focal loss of scores (Generalized Focal Loss, arXiv 2006.04388, section 3.2).

    The binary logistic loss of each window is weighted by the square of its error. The sum over the windows is divided by the sum of
    the targets of all processes.

    Args:
        logits: (N,).
        targets: (N,) in 0..1; windows with a negative target do not contribute.

    Returns:
        A float32 scalar.
    """
    known = targets >= 0
    logits, targets = logits[known].float(), targets[known]
    losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * (logits.sigmoid() - targets) ** 2).sum() / _share(targets.sum())


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the dice coefficient of probabilities and targets, averaged over the windows of all processes (V-Net, arXiv 1606.04797,
    section 3).

    Args:
        logits: (N, M, M).
        targets: (N, M, M) in 0..1.

    Returns:
        A float32 scalar, 0 if there is no window.
    """
    probabilities, targets = logits.float().sigmoid().flatten(1), targets.float().flatten(1)
    common = (probabilities * targets).sum(dim=1)
    total = (probabilities**2).sum(dim=1) + (targets**2).sum(dim=1)
    # Adding 1 avoids a division by zero for windows without foreground.
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
    """Computes the IoU of the mask of each window with its target.

    Args:
        logits: (N, M, M); a pixel above 0 is foreground.
        targets: (N, M, M) in {0, 1}.

    Returns:
        (N,) in 0..1; 1 if both are empty.
    """
    predicted, targets = logits > 0, targets > 0
    union = (predicted | targets).sum(dim=(1, 2))
    intersection = (predicted & targets).sum(dim=(1, 2))
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
