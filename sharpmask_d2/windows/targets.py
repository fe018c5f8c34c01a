"""What windows of a full image learn: which of them pay a loss, and the masks they should give.

Shape letters: N windows, G objects, P positive windows, Y X grid of windows of a level, H W image, M mask side.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import BitMasks
from torch import Tensor
from torchvision.ops import roi_align

from .geometry import cell_windows, label_windows, level_padding

# Samples of the bitmap along each side of a target's cell: as many as there are pixels would take most of a training step.
_SAMPLES = 2


def grid_size(level, window_size: int, stride: int, divisor: int) -> tuple:
    """Rows and columns (Y, X) of the grid that the network gives for a level, known without running it.

    Args:
        level: a `windows.Level`.
        window_size: in pixels of the level.
        stride: of the feature that the head reads, in pixels.
        divisor: see `windows.level_padding`.
    """
    left, right, top, bottom = level_padding(level, window_size, divisor)
    sides = level.size[0] + top + bottom, level.size[1] + left + right
    return tuple(-(-side // stride) - window_size // stride + 1 for side in sides)


def grid_windows(levels: list, sizes: list, window_size: int, stride: int, device) -> Tensor:
    """Windows of all cells, level by level and row by row.

    Args:
        levels: list[windows.Level] of an image.
        sizes: (Y, X) of each level.
        window_size: in pixels of the level.
        stride: of the grid, in pixels.
        device: of the result.

    Returns:
        (N, 4) float32 XYXY in the frame of the image, in pixels; they may lie partly outside.
    """
    windows = []
    for level, (rows, columns) in zip(levels, sizes):
        cells = torch.arange(rows * columns, device=device)
        windows.append(cell_windows(level, cells // columns, cells % columns, window_size, stride))
    return torch.cat(windows)


def split_cells(cells: Tensor, sizes: list) -> list:
    """From numbers in the order of `grid_windows` to rows and columns.

    Args:
        cells: (N,) int64, ascending.
        sizes: (Y, X) of each level.

    Returns:
        ys, xs for each level, in the order of `cells`.
    """
    bounds = torch.tensor([rows * columns for rows, columns in sizes]).cumsum(0)
    counts = torch.searchsorted(cells.cpu(), bounds).diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()
    split = zip(sizes, cells.split(counts), [0, *bounds.tolist()])
    return [((chosen - first) // columns, (chosen - first) % columns) for (_, columns), chosen, first in split]


def sample_windows(
    windows: Tensor, boxes: Tensor, window_size: int, *, label_rule: dict, num_windows: int, positive_fraction: float
) -> tuple:
    """Choose, with torch's random numbers, the windows of an image that pay losses.

    Args:
        windows: (N, 4) XYXY in the frame of the image.
        boxes: (G, 4) XYXY of the objects in the same frame; G may be 0.
        window_size: in pixels of the level.
        label_rule: the keywords of `windows.label_windows`.
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
