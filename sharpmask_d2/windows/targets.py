"""Training targets of windows of a full image: the windows that contribute to the losses, and their target masks.

Shape letters: N windows, G objects, P positive windows, M mask side in cells.
"""

from typing import Optional, Union

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, PolygonMasks
from torch import Tensor
from torchvision.ops import roi_align

from .labels import label_windows

# Number of samples of the bitmap along each side of a cell of a target. One sample per pixel would take most of a training step.
_SAMPLES = 2


def sample_windows(
    windows: Tensor,
    boxes: Tensor,
    window_size: int,
    *,
    label_rule: dict[str, float],
    num_windows: int,
    positive_fraction: float,
    generator: Optional[torch.Generator] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples the windows of an image that contribute to the losses.

    Args:
        windows: (N, 4) XYXY in the frame of the image, in pixels.
        boxes: (G, 4) XYXY of the objects in the same frame; G may be 0.
        window_size: side of a window in pixels of its level.
        label_rule: keyword arguments of `labels.label_windows`.
        num_windows: maximum number of sampled windows.
        positive_fraction: maximum share of positive windows, in 0..1, of `num_windows`; the remaining windows are negative.
        generator: source of all random numbers, on the device of the windows. Default: None, that of torch.

    Returns:
        positives: (P,) int64, ascending indices of positive windows.
        negatives: int64, ascending indices of negative windows.
        objects: (P,) int64, index of the object of each positive window.
    """
    labels, objects = label_windows(windows, boxes, window_size, **label_rule)
    positives = _draw(labels == 1, int(num_windows * positive_fraction), generator)
    negatives = _draw(labels == 0, num_windows - len(positives), generator)
    return positives, negatives, objects[positives]


def _draw(candidates: Tensor, count: int, generator: Optional[torch.Generator]) -> Tensor:
    """Ascending indices of `count` of the windows at which `candidates` (N,) is True, or of all if there are fewer."""
    indices = candidates.nonzero()[:, 0]
    order = torch.randperm(len(indices), device=indices.device, generator=generator)
    return indices[order[:count]].sort().values


def mask_targets(masks: Union[BitMasks, PolygonMasks], objects: Tensor, windows: Tensor, mask_size: int) -> Tensor:
    """Crops the masks of objects to windows. Pixels outside the image are background.

    Args:
        masks: masks of G objects.
        objects: (P,) int64, index of the object of each window.
        windows: (P, 4) XYXY in the frame of the image, in pixels; they may lie partly outside.
        mask_size: M.

    Returns:
        (P, M, M) bool.
    """
    if not isinstance(masks, BitMasks):
        return masks[objects].crop_and_resize(windows, mask_size).to(windows.device)
    used, owners = objects.unique(return_inverse=True)
    # Beyond the image, roi_align (and thus BitMasks.crop_and_resize) repeats the outermost pixels; padding makes them background.
    bitmaps = F.pad(masks.tensor[used, None].to(windows.dtype), (1, 1, 1, 1))
    regions = torch.cat([owners[:, None].to(windows.dtype), windows + 1], dim=1)
    return roi_align(bitmaps, regions, mask_size, sampling_ratio=_SAMPLES, aligned=True)[:, 0] >= 0.5
