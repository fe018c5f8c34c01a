"""Selects the windows of an image whose masks are decoded. The results equal those of `SharpMaskFPN.select`.

Shape letters: L levels, D kinds of windows, T windows of an image, N windows that are selected, Y X cells of a level.
"""

from typing import NamedTuple

import numpy as np

from .model_file import ExportedModel
from .ranking import nms

# As in `modeling.proposal_generator.sharpmask_fpn` and `modeling.feature_pyramid.grid`.
_CANDIDATES = 4
_FIRST = 2.5


class Windows(NamedTuple):
    """The windows of one image, highest score first."""

    # (N, 4) float32 XYXY squares in the frame of the resized image, in pixels.
    boxes: np.ndarray
    # (N,) float32 logits.
    scores: np.ndarray
    # (N,) bool: windows whose masks are refined.
    refined: np.ndarray


def select(scores: np.ndarray, image_size: tuple[int, int], model: ExportedModel, num_proposals: int) -> Windows:
    """Selects windows of high score that overlap little, over all levels.

    Args:
        scores: (T,) float32, from the encoder: windows of the padded image, level by level, kind by kind, row by row.
        image_size: (height, width) of the resized image in pixels, without padding.
        model: what the file of the exported model says.
        num_proposals: maximum number of windows.

    Returns:
        At most `num_proposals` windows. They are larger than those that were scored, by `model.mask_window`.
    """
    count = min(_CANDIDATES * num_proposals, len(scores))
    candidates = np.argpartition(-scores, count - 1)[:count]
    candidates = candidates[np.argsort(-scores[candidates], kind="stable")]
    chosen = scores[candidates]
    boxes = _windows(candidates, image_size, model)
    order = spread(boxes, model.window_nms_thresh, num_proposals)
    by_score = np.argsort(-chosen[order], kind="stable")
    chosen, boxes = chosen[order[by_score]], boxes[order[by_score]]
    return Windows(_enlarged(boxes, model.mask_window), chosen, by_score < model.num_refined)


def spread(windows: np.ndarray, thresh: float, count: int) -> np.ndarray:
    """Ranks windows that non-maximum suppression removes behind all others: see `modeling.feature_pyramid.grid.spread`.

    Args:
        windows: (N, 4) float32 XYXY, highest score first.
        thresh: IoU above which a window is suppressed; 1 keeps the order by score.
        count: number of windows to return.

    Returns:
        (min(count, N),) int64, indices of windows.
    """
    if thresh >= 1:
        return np.arange(min(count, len(windows)))
    kept = nms(windows[: int(_FIRST * count)], thresh)
    if len(kept) < len(windows) and kept.sum() < count:
        kept = nms(windows, thresh)
    return np.concatenate([np.flatnonzero(kept), np.flatnonzero(~kept)])[:count]


def _windows(numbers: np.ndarray, image_size: tuple[int, int], model: ExportedModel) -> np.ndarray:
    """(N, 4) float32 XYXY of windows that are given by their numbers from 0 to T - 1."""
    strides, kinds = np.array(model.strides), len(model.window_cells)
    divisor = model.size_divisibility
    padded = [-(-side // divisor) * divisor for side in image_size]
    rows, columns = (-(-side // strides) for side in padded)
    ends = np.cumsum(kinds * rows * columns)
    levels = np.searchsorted(ends, numbers, side="right")
    inside = numbers - (ends - kinds * rows * columns)[levels]
    kind, cell = np.divmod(inside, (rows * columns)[levels])
    y, x = np.divmod(cell, columns[levels])
    stride = strides[levels]
    centres = np.stack([x, y], axis=1) + 0.5
    half = (np.array(model.window_cells)[kind] * stride)[:, None] / 2
    centres = centres * stride[:, None]
    return np.concatenate([centres - half, centres + half], axis=1).astype(np.float32)


def _enlarged(windows: np.ndarray, factor: float) -> np.ndarray:
    """Squares with the centres of `windows` and larger sides, float32."""
    centres = (windows[:, :2] + windows[:, 2:]) / 2
    half = (windows[:, 2:] - windows[:, :2]).max(axis=1, keepdims=True) / (2 * (1 / factor))
    return np.concatenate([centres - half, centres + half], axis=1)
