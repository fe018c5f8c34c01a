"""Windows that may hold the object at given points, and the choice among their masks.

Shape letters: T windows of the grid, B prompts, P points of a prompt, K candidates of a prompt, C masks of a prompt, M mask side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Labels of points, as Segment Anything has them: on the object, on the background, and no point (to fill up the rows of a batch).
FOREGROUND, BACKGROUND, NO_POINT = 1, 0, -1
# Number of candidates from each group of windows of one size.
_PER_SIZE = 3
# Windows whose points lie outside of their central squares rank behind the others by this, which exceeds every difference of scores.
_OUTSIDE = 1e4
# Maximum number of distances between windows and points that are in memory at a time.
_PAIRS = 2**24


def candidate_windows(
    windows: Tensor, scores: Tensor, group_sizes: list[int], points: Tensor, labels: Tensor, *, share: float
) -> Tensor:
    """Chooses the windows of highest score, of each size, whose central squares hold all foreground points of a prompt.

    Where too few windows of a size hold all points, those whose squares are nearest to holding them follow.

    Args:
        windows: (T, 4) XYXY, group by group; the windows of a group have one size.
        scores: (T,) logits; minus infinity for windows that must not be chosen.
        group_sizes: number of windows in each group; their sum is T.
        points: (B, P, 2) XY in the frame of the windows.
        labels: (B, P) of `FOREGROUND`, `BACKGROUND` or `NO_POINT`; each prompt has a foreground point.
        share: side of the central square, which an object fills canonically, as a share of the window's side.

    Returns:
        (B, K) int64, numbers of windows.
    """
    centres, half = (windows[:, :2] + windows[:, 2:]) / 2, (windows[:, 2] - windows[:, 0]) / 2 * share
    chosen = []
    prompts_at_once = max(1, _PAIRS // max(1, len(windows) * points.shape[1]))
    for some, marks in zip(points.split(prompts_at_once), labels.split(prompts_at_once)):
        distance = centres.new_zeros(len(some), len(windows))
        for xy, is_foreground in zip(some.unbind(1), (marks == FOREGROUND).unbind(1)):
            away = (centres - xy[:, None]).abs().amax(2) / half
            distance = torch.where(is_foreground[:, None], torch.maximum(distance, away), distance)
        keys = torch.where(distance < 1, scores, -_OUTSIDE * distance).masked_fill(scores == -torch.inf, -torch.inf)
        numbers, start = [], 0
        for size in group_sizes:
            best = keys[:, start : start + size].topk(min(_PER_SIZE, size), dim=1).indices
            numbers.append(best + start)
            start += size
        chosen.append(torch.cat(numbers, dim=1))
    return torch.cat(chosen)


def logits_at_points(logits: Tensor, windows: Tensor, points: Tensor) -> Tensor:
    """Mask logits interpolated at points.

    Args:
        logits: (B, K, M, M) mask logits, each mask covering its window.
        windows: (B, K, 4) XYXY.
        points: (B, P, 2) XY in the frame of the windows.

    Returns:
        (B, K, P) logits; minus infinity where a point lies outside of a window.
    """
    corner, far = windows[:, :, None, :2], windows[:, :, None, 2:]
    places = (points[:, None] - corner) / (far - corner) * 2 - 1  # (B, K, P, 2) in -1..1 within the window
    values = F.grid_sample(
        logits.flatten(0, 1)[:, None].float(),
        places.flatten(0, 1)[:, None],
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    values = values.view(*places.shape[:3])
    return values.masked_fill((places.abs() > 1).any(-1), -torch.inf)


def agreement(values: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """How well each mask agrees with the points of its prompt: it should hold those on the object and none on the background.

    It is the mean probability of the labels, times the square of the share of the points that lie on the right side of the mask's outline.

    Args:
        values: (B, K, P) logits at the points.
        labels: (B, P), see `candidate_windows`.
        threshold: logit above which a pixel belongs to a mask.

    Returns:
        (B, K) float32 in 0..1.
    """
    counts = (labels != NO_POINT)[:, None].float()
    is_foreground = (labels == FOREGROUND)[:, None]
    probabilities = torch.where(is_foreground, values, -values).sigmoid()
    is_right = ((values > threshold) == is_foreground).float()
    number = counts.sum(2).clamp(min=1)
    return (probabilities * counts).sum(2) / number * ((is_right * counts).sum(2) / number) ** 2


def choose_distinct(quality: Tensor, boxes: Tensor, count: int, thresh: float) -> Tensor:
    """Chooses candidates by quality; those whose boxes overlap a chosen one follow only where too few others are left.

    Args:
        quality: (B, K) in 0..1.
        boxes: (B, K, 4) XYXY.
        count: C; at most K.
        thresh: IoU of boxes above which two candidates count as the same.

    Returns:
        (B, C) int64, numbers of candidates.
    """
    keys = quality.clone()
    chosen = []
    for _ in range(count):
        best = keys.argmax(1, keepdim=True)
        chosen.append(best)
        reference = boxes.gather(1, best[:, :, None].expand(-1, -1, 4))
        # They still come before candidates of quality 0, and a candidate is never chosen twice.
        keys = torch.where(box_iou(boxes, reference) > thresh, 1e-3 * keys, keys)
        keys.scatter_(1, best, -torch.inf)
    return torch.cat(chosen, dim=1)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes that lie at the same place of two tensors.

    Args:
        boxes, others: (..., 4) XYXY, of shapes that broadcast.

    Returns:
        (...) float in 0..1; 0 where both are empty.
    """
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (boxes, others)]
    union = areas[0] + areas[1] - common
    return torch.where(union > 0, common / union.clamp(min=1e-9), 0.0)


def grid_boxes(logits: Tensor, windows: Tensor, threshold: float) -> Tensor:
    """Boxes of masks to the precision of the cells of their grids, which is enough to compare masks.

    Args:
        logits: (N, M, M).
        windows: (N, 4) XYXY.
        threshold: logit above which a cell belongs to a mask.

    Returns:
        (N, 4) XYXY; zeros for a mask without a cell.
    """
    inside = logits > threshold
    side = logits.shape[-1]
    columns, rows = inside.any(1), inside.any(2)
    low = torch.stack([x.byte().argmax(1) for x in (columns, rows)], dim=1)
    high = side - torch.stack([x.flip(1).byte().argmax(1) for x in (columns, rows)], dim=1)
    cell = (windows[:, 2:] - windows[:, :2]) / side
    boxes = torch.cat([windows[:, :2] + low * cell, windows[:, :2] + high * cell], dim=1)
    return boxes * columns.any(1)[:, None]
