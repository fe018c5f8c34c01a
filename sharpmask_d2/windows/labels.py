"""Labels of windows by the objects they hold (DeepMask, section 3.2).

Shape letters: N windows, G objects.
"""

import math

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..errors import UserError
from .geometry import canonical_size, square_windows


def label_rule(cfg: CfgNode, *, of_cells: bool = False) -> dict[str, float]:
    """Reads the limits of `label_windows` from a config.

    Args:
        cfg: a config, of which MODEL.SHARPMASK.LABELS is read.
        of_cells: whether the labelled windows are those of the cells of a grid, which are canonical windows of objects only by chance, so
            that positive limits of 0 leave no positive window. Default: False, for patches.

    Returns:
        Keyword arguments of `label_windows`.

    Raises:
        UserError: no window can meet a limit; the message names the key.
    """
    labels = cfg.MODEL.SHARPMASK.LABELS
    for name in ("POSITIVE_SHIFT", "POSITIVE_OCTAVES"):
        if labels[name] < 0 or (of_cells and labels[name] == 0):
            least = "above 0, because otherwise no window of a cell is positive" if of_cells else "0 or above"
            raise UserError(f"MODEL.SHARPMASK.LABELS.{name} is {labels[name]}: it must be {least}")
    return {name.lower(): value for name, value in labels.items()}


def window_offsets(windows: Tensor, boxes: Tensor, *, share: float, side: float = 1.0) -> tuple[Tensor, Tensor]:
    """Computes the offsets of windows from the canonical windows of objects.

    Args:
        windows: (N, 4) XYXY squares in the image, in pixels.
        boxes: (G, 4) XYXY of the objects in the same frame.
        share: larger side of an object as a share of the side of its canonical window.
        side: side of every window in the unit of the shifts. 1 gives shifts as shares of the window's side; the side of the patch that a
            window is resized to gives shifts in pixels of the patch. Default: 1.

    Returns:
        shift: (N, G), the larger one of the distances between the centres along x and along y, in this unit.
        octaves: (N, G), absolute value of log2 of the window's side over that of the canonical window.
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
) -> tuple[Tensor, Tensor]:
    """Labels windows by the objects they hold (DeepMask, section 3.2).

    A window is positive if it is within `positive_shift` and within `positive_octaves` of an object's canonical window, and negative if it
    is at least `negative_shift` or at least `negative_octaves` away from the canonical windows of all objects.

    Args:
        windows: (N, 4) XYXY squares in the image, in pixels.
        boxes: (G, 4) XYXY of the objects in the same frame, in pixels; G may be 0.
        window_size: side in pixels of the patch that a window is resized to.
        positive_shift, negative_shift: distances of the centres in pixels of the patch (see `window_offsets`).
        positive_octaves, negative_octaves: differences in size in octaves.

    Returns:
        labels: (N,) int64, 1 for positive, 0 for negative and -1 for other windows.
        objects: (N,) int64, index of the object of a positive window, the nearest if there are several; -1 for other windows.
    """
    if len(boxes) == 0:
        return windows.new_zeros(len(windows), dtype=torch.long), windows.new_full(
            (len(windows),), -1, dtype=torch.long
        )
    share = canonical_size(window_size) / window_size
    shift, octaves = window_offsets(windows, boxes, share=share, side=window_size)
    inside = (shift <= positive_shift) & (octaves <= positive_octaves)
    # Only an offset of 0 meets a limit of 0. The least positive number as divisor avoids 0 / 0.
    least = torch.finfo(shift.dtype).tiny
    shares = shift / max(positive_shift, least), octaves / max(positive_octaves, least)
    distance = torch.maximum(*shares).masked_fill(~inside, math.inf)
    nearest, objects = distance.min(dim=1)
    positive = nearest < math.inf
    negative = ((shift >= negative_shift) | (octaves >= negative_octaves)).all(dim=1)
    labels = torch.where(positive, 1, torch.where(negative, 0, -1))
    return labels, torch.where(positive, objects, -1)
