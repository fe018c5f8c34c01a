"""Training targets of the scores of windows on a feature pyramid.

Shape letters: T windows of an image, G objects of an image.
"""

import torch
from torch import Tensor

from ...windows.geometry import square_windows
from ...windows.labels import window_offsets

# Distance up to which the target is 1, as a share of the distance from which it is 0.
_FULL = 0.25
# Larger side of an object as a share of the side of its surroundings, as in DeepMask's windows: 92 of 160 pixels (see `canonical_size`).
_SHARE_OF_SURROUNDINGS = 92 / 160


def score_targets(
    windows: Tensor,
    boxes: Tensor,
    *,
    share: float,
    negative_shift: float,
    negative_octaves: float,
    exhaustive: bool = True,
) -> Tensor:
    """Computes the training targets of the scores of windows.

    The distance of a window from an object is the larger of two ratios: its shift from the canonical window of the object, divided by
    `negative_shift`, and its difference in size from that window, divided by `negative_octaves`. The target depends on the distance from
    the nearest object: it is 1 up to a distance of 0.25, and falls linearly to 0 at a distance of 1. If annotations are not exhaustive, a
    window without an annotated object may hold an object that nobody annotated. Its target is then 0 only if the surroundings of an
    object that fits the window lie inside the surroundings of an annotated object, and unknown otherwise.

    Args:
        windows: (T, 4) float32 XYXY squares in the frame of the image, in pixels.
        boxes: (G, 4) float32 XYXY of the objects in the same frame; G may be 0.
        share: larger side of an object as a share of the side of its canonical window.
        negative_shift: distance between the centres along an axis, as a share of the window's side, from which the target is 0.
        negative_octaves: ratio of the window's side to the canonical one, or its inverse, in octaves, from which the target is 0.
        exhaustive: whether every object of the image is annotated. Default: True.

    Returns:
        (T,) float32 in 0..1, or -1 where the target is unknown.
    """
    targets = windows.new_zeros(len(windows))
    if len(boxes):
        shift, octaves = window_offsets(windows, boxes, share=share)
        distance = torch.maximum(shift / negative_shift, octaves / negative_octaves).amin(dim=1)
        targets = ((1 - distance) / (1 - _FULL)).clamp(0, 1)
    if not exhaustive:
        far = (targets == 0).nonzero()[:, 0]
        around_windows = square_windows(windows[far], _SHARE_OF_SURROUNDINGS / share)
        targets[far[~_within(around_windows, square_windows(boxes, _SHARE_OF_SURROUNDINGS))]] = -1
    return targets


def enlarged(boxes: Tensor, smallest: float) -> Tensor:
    """Scales small boxes about their centres so that their larger side has at least a minimum length.

    Args:
        boxes: (G, 4) XYXY in pixels.
        smallest: minimum length of the larger side in pixels.

    Returns:
        (G, 4) XYXY.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    sides = boxes[:, 2:] - boxes[:, :2]
    half = sides * (smallest / sides.amax(dim=1, keepdim=True).clamp(min=1e-6)).clamp(min=1) / 2
    return torch.cat([centres - half, centres + half], dim=1)


def _within(windows: Tensor, others: Tensor) -> Tensor:
    """(N,) bool: whether each window, of (N, 4) XYXY, lies inside one of the others, (G, 4) XYXY."""
    low = (windows[:, None, :2] >= others[None, :, :2]).all(dim=2)
    high = (windows[:, None, 2:] <= others[None, :, 2:]).all(dim=2)
    return (low & high).any(dim=1)
