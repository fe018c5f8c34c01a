"""Labels of windows by the objects they hold (DeepMask, section 3.2).

Shape letters: N windows, G objects.
"""

import math

import torch
from torch import Tensor

from ..errors import UserError
from .geometry import canonical_size, square_windows


def label_rule(cfg, *, of_cells: bool = False) -> dict:
    """The limits of `label_windows` as MODEL.SHARPMASK.LABELS sets them.

    Args:
        cfg: a config, of which MODEL.SHARPMASK.LABELS is read.
        of_cells: whether the labelled windows are those of a grid's cells. Only by chance is one of them the canonical window of an object,
            where a patch may be cut; default: False.

    Returns:
        keyword arguments of `label_windows`.

    Raises:
        UserError: a limit that no window can meet; the message names the key.
    """
    labels = cfg.MODEL.SHARPMASK.LABELS
    for name in ("POSITIVE_SHIFT", "POSITIVE_OCTAVES"):
        if labels[name] < 0 or (of_cells and labels[name] == 0):
            least = "above 0: no window of a cell would be positive" if of_cells else "0 or above"
            raise UserError(f"MODEL.SHARPMASK.LABELS.{name} is {labels[name]}: it must be {least}")
    return {name.lower(): value for name, value in labels.items()}


def window_offsets(windows: Tensor, boxes: Tensor, *, share: float, side: float = 1.0) -> tuple:
    """How far windows are from the canonical windows of objects.

    Args:
        windows: (N, 4) XYXY squares in the image, in pixels.
        boxes: (G, 4) XYXY of the objects in the same frame.
        share: larger side of an object as a share of the side of its canonical window.
        side: of a window, in the unit that shifts are given in: 1 gives them as shares of the window's side, the side of the patch that
            the window is resized to gives them in pixels of the patch.

    Returns:
        shift (N, G): the larger of the two distances between the centres, in that unit;
        octaves (N, G): log2 of the window's side over the canonical one, absolute.
    """
    canonical = square_windows(boxes, share)
    sides = windows[:, 2] - windows[:, 0]  # N
    canonical_sides = canonical[:, 2] - canonical[:, 0]  # G
    centres = (windows[:, :2] + windows[:, 2:]) / 2
    canonical_centres = (canonical[:, :2] + canonical[:, 2:]) / 2
    distance = (centres[:, None] - canonical_centres[None]).abs().amax(dim=2)  # N x G
    shift = distance * (side / sides[:, None])
    octaves = (sides[:, None] / canonical_sides[None]).log2().abs()
    return shift, octaves


def label_windows(
    windows: Tensor,
    boxes: Tensor,
    window_size: int,
    *,
    positive_shift: float,
    positive_octaves: float,
    negative_shift: float,
    negative_octaves: float,
) -> tuple:
    """Label windows by the objects they hold (DeepMask, section 3.2).

    A window is positive if it is within `positive_shift` and within `positive_octaves` of an object's canonical window, and negative if it
    is at least `negative_shift` or at least `negative_octaves` away from the canonical windows of all objects.

    Args:
        windows: (N, 4) XYXY squares in the image, in pixels.
        boxes: (G, 4) XYXY of the objects in the same frame, in pixels; G may be 0.
        window_size: side in pixels of the patch that a window is resized to.
        positive_shift, negative_shift: distances of the centres in pixels of the patch (see `window_offsets`).
        positive_octaves, negative_octaves: differences in size in octaves.

    Returns:
        labels (N,) int64: 1 positive, 0 negative, -1 neither;
        objects (N,) int64: the object of a positive window, the nearest if there are several; -1 for the others.
    """
    if len(boxes) == 0:
        return windows.new_zeros(len(windows), dtype=torch.long), windows.new_full(
            (len(windows),), -1, dtype=torch.long
        )
    share = canonical_size(window_size) / window_size
    shift, octaves = window_offsets(windows, boxes, share=share, side=window_size)
    inside = (shift <= positive_shift) & (octaves <= positive_octaves)
    # A limit of 0 is met by an offset of 0 only; this keeps the quotient from being 0 / 0.
    least = torch.finfo(shift.dtype).tiny
    shares = shift / max(positive_shift, least), octaves / max(positive_octaves, least)
    distance = torch.maximum(*shares).masked_fill(~inside, math.inf)
    nearest, objects = distance.min(dim=1)
    positive = nearest < math.inf
    negative = ((shift >= negative_shift) | (octaves >= negative_octaves)).all(dim=1)
    labels = torch.where(positive, 1, torch.where(negative, 0, -1))
    return labels, torch.where(positive, objects, -1)
