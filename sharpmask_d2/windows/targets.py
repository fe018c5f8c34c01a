"""Training targets of windows of a full image: which windows contribute to the losses, and the masks that they should predict.

Shape letters: N windows, G objects, P positive windows, M mask side.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import BitMasks
from torch import Tensor
from torchvision.ops import roi_align

from .labels import label_windows

# Samples of the bitmap along each side of a target's cell: as many as there are pixels would take most of a training step.
_SAMPLES = 2


def sample_windows(
    windows: Tensor, boxes: Tensor, window_size: int, *, label_rule: dict, num_windows: int, positive_fraction: float
) -> tuple:
    """Choose, with torch's random numbers, the windows of an image that contribute to the losses.

    Args:
        windows: (N, 4) XYXY in the frame of the image.
        boxes: (G, 4) XYXY of the objects in the same frame; G may be 0.
        window_size: in pixels of the level.
        label_rule: the keywords of `labels.label_windows`.
        num_windows: at most this many are chosen.
        positive_fraction: at most this share of `num_windows` is positive; negatives fill up.

    Returns:
        positives (P,) and negatives: ascending numbers of windows; objects (P,) of the positives.
    """
    labels, objects = label_windows(windows, boxes, window_size, **label_rule)
    positives, negatives = subsample_labels(labels, num_windows, positive_fraction, bg_label=0)
    positives = positives.sort().values
    return positives, negatives.sort().values, objects[positives]


def mask_targets(masks, objects: Tensor, windows: Tensor, mask_size: int) -> Tensor:
    """Masks of objects cut to windows; nothing is outside the image.

    Args:
        masks: BitMasks or PolygonMasks of G objects.
        objects: (P,) int64, the object of each window.
        windows: (P, 4) XYXY in the frame of the image, in pixels; may lie partly outside.
        mask_size: M.

    Returns:
        (P, M, M) bool.
    """
    if not isinstance(masks, BitMasks):
        return masks[objects].crop_and_resize(windows, mask_size).to(windows.device)
    used, owners = objects.unique(return_inverse=True)
    # roi_align repeats the outermost pixels beyond the image, which BitMasks.crop_and_resize inherits: here these are empty.
    bitmaps = F.pad(masks.tensor[used, None].to(windows.dtype), (1, 1, 1, 1))
    regions = torch.cat([owners[:, None].to(windows.dtype), windows + 1], dim=1)
    return roi_align(bitmaps, regions, mask_size, sampling_ratio=_SAMPLES, aligned=True)[:, 0] >= 0.5
