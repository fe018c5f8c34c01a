"""Turns runs of foreground pixels into boxes, bitmaps and the compressed RLE of pycocotools, vectorised over all masks.

Shape letters:
    N: masks                R: runs of all masks together
    H, W: image height and width
    C: counts of all masks together (alternating lengths of background and foreground)
Positions are column-major, as in COCO: pixel (row y, column x) has position x * H + y.
"""

from typing import NamedTuple, Union

import torch

__all__ = ["Runs", "boxes_and_areas", "encode_runs", "fill_positions", "fill_runs"]


class Runs(NamedTuple):
    """The foreground of N masks as runs of positions, each run within one image column."""

    starts: torch.Tensor  # (R,) long, position of a run's first pixel, ordered by mask and by position
    ends: torch.Tensor  # (R,) long, position after a run's last pixel; runs of a mask may touch but do not overlap
    per_mask: torch.Tensor  # (N,) long, number of runs of each mask; the sum is R

    def select(self, item: Union[slice, torch.Tensor, list[int]]) -> "Runs":
        """The runs of some masks.

        Args:
            item: which masks, in which order: a slice, a bool or long tensor, or a list of indices.
        """
        begins, per_mask = (self.per_mask.cumsum(0) - self.per_mask)[item], self.per_mask[item]
        shifts = torch.repeat_interleave(begins - per_mask.cumsum(0) + per_mask, per_mask)
        index = torch.arange(len(shifts), device=shifts.device) + shifts
        return Runs(self.starts[index], self.ends[index], per_mask)

    def owners(self) -> torch.Tensor:
        """(R,) long, the index of the mask of each run."""
        masks = torch.arange(len(self.per_mask), device=self.starts.device)
        return torch.repeat_interleave(masks, self.per_mask, output_size=len(self.starts))


def boxes_and_areas(runs: Runs, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tight boxes and areas of masks.

    Args:
        runs: of N masks.
        height: H in pixels.

    Returns:
        boxes: (N, 4) float32 XYXY in pixels of the image (first pixel, last pixel + 1), zeros for an empty mask.
        areas: (N,) long, number of foreground pixels.
    """
    owners = runs.owners()
    column = torch.div(runs.starts, height, rounding_mode="floor")
    sides = torch.stack([column, runs.starts - column * height, -1 - column, column * height - runs.ends])  # (4, R)
    least = sides.new_zeros(4, len(runs.per_mask))
    least = least.scatter_reduce(1, owners.expand(4, -1), sides, "amin", include_self=False)
    boxes = torch.stack([least[0], least[1], -least[2], -least[3]], dim=1).float()
    areas = torch.zeros_like(runs.per_mask).index_add_(0, owners, runs.ends - runs.starts)
    return boxes, areas


def fill_runs(runs: Runs, image_size: tuple[int, int]) -> torch.Tensor:
    """Bitmaps of masks.

    Args:
        runs: of N masks.
        image_size: (H, W) in pixels.

    Returns:
        (N, H, W) bool.
    """
    height, width = image_size
    inside = fill_positions(runs, height * width)
    return inside.reshape(len(inside), width, height).transpose(1, 2).bool().contiguous()


def fill_positions(runs: Runs, length: int) -> torch.Tensor:
    """Bitmaps as rows of positions.

    Args:
        runs: of N masks.
        length: number of positions, H * W.

    Returns:
        (N, length) int8 of 0 and 1.
    """
    num_masks = len(runs.per_mask)
    steps = torch.zeros(num_masks * (length + 1), dtype=torch.int8, device=runs.starts.device)
    base = runs.owners() * (length + 1)
    one = torch.ones_like(base, dtype=torch.int8)
    steps.index_add_(0, base + runs.starts, one).index_add_(0, base + runs.ends, -one)  # touching runs cancel
    return steps.view(num_masks, length + 1).cumsum(1, dtype=torch.int8)[:, :length]


def encode_runs(runs: Runs, image_size: tuple[int, int]) -> list[dict]:
    """The compressed RLE of masks, equal in every character to pycocotools' encode() of the bitmaps.

    Args:
        runs: of N masks.
        image_size: (H, W) in pixels.

    Returns:
        N dicts {"size": [H, W], "counts": str}. Counts are text, as in COCO's result files, so that they can be written as JSON.
    """
    height, width = image_size
    counts, per_mask = _counts(_join(runs), height * width)
    text, stops = _compress(counts, per_mask)
    stops = [0] + stops.tolist()
    return [{"size": [height, width], "counts": text[a:b]} for a, b in zip(stops[:-1], stops[1:])]


def _join(runs: Runs) -> Runs:
    """Join the runs of a mask that touch, such as at the bottom of a column and the top of the next."""
    owners = runs.owners()
    broken = torch.ones(
        len(owners) + 1, dtype=torch.bool, device=owners.device
    )  # whether there is a break before each run
    broken[1:-1] = (runs.ends[:-1] != runs.starts[1:]) | (owners[:-1] != owners[1:])
    breaks = broken.nonzero()[:, 0]
    first, last = breaks[:-1], breaks[1:] - 1
    per_mask = torch.bincount(owners.index_select(0, first), minlength=len(runs.per_mask))
    return Runs(runs.starts.index_select(0, first), runs.ends.index_select(0, last), per_mask)


def _counts(runs: Runs, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The counts of joined runs.

    Returns:
        counts: (C,) int32 or long.
        per_mask: (N,) long, number of counts of each mask.
    """
    stops = runs.per_mask.cumsum(0)
    # A mask that reaches the last pixel ends with a count of foreground, not with a zero count of background.
    full = torch.zeros_like(runs.per_mask, dtype=torch.bool)
    some = runs.per_mask > 0
    full[some] = runs.ends[stops[some] - 1] == length
    per_mask = 2 * runs.per_mask + (~full).long()
    last = per_mask.cumsum(0) - 1  # (N,) index of each mask's last count
    # Before a run lie two edges of each earlier run, and one last edge of each earlier mask that is not full.
    tails = torch.repeat_interleave((~full).cumsum(0) - (~full).long(), runs.per_mask, output_size=len(runs.starts))
    index = torch.arange(0, 2 * len(tails), 2, device=tails.device) + tails
    dtype = torch.int32 if length < 2**31 else torch.int64
    num_edges = int(last[-1]) + 1 if len(last) else 0
    edges = torch.empty(num_edges, dtype=dtype, device=tails.device)  # positions at which the mask changes
    edges[last] = length  # the last edge of a full mask is the end of its last run
    edges.scatter_(0, index, runs.starts.to(dtype)).scatter_(0, index + 1, runs.ends.to(dtype))
    counts = edges.clone()
    counts[1:] -= edges[:-1]
    begin = last + 1 - per_mask
    counts[begin] = edges[begin]  # the first count of a mask starts from position 0
    return counts, per_mask


def _compress(counts: torch.Tensor, per_mask: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Counts as COCO's strings: differences from the count two places before, in groups of five bits, lowest first.

    Returns:
        text: the strings of all masks, joined.
        stops: (N,) long on the CPU, position in the text at which each mask's string ends.
    """
    stops = per_mask.cumsum(0)
    begins = stops - per_mask
    delta = counts.clone()
    delta[2:] -= counts[:-2]
    for i in range(3):  # the first three counts of a mask are written as they are
        begin = begins[per_mask > i] + i
        delta[begin] = counts[begin]
    # n groups hold the numbers from -2^(5n-1) to 2^(5n-1) - 1: the top bit of the last group is the sign.
    size = delta ^ (delta >> (8 * delta.element_size() - 1))
    greatest = int(size.max()) if len(size) else 0
    more = torch.zeros_like(delta)  # groups after the first
    bits = 4
    while greatest >> bits:
        more += (size >> bits).clamp_(max=1)
        bits += 5
    text_stops = (more + 1).cumsum(0)
    text = torch.empty(int(text_stops[-1]) if len(delta) else 0, dtype=torch.uint8, device=counts.device)
    place = text_stops - 1 - more
    while len(delta):
        text.scatter_(0, place, ((delta & 31) + 48 + 32 * more.clamp(max=1)).to(torch.uint8))
        rest = more.nonzero()[:, 0]
        delta, place, more = (x.index_select(0, rest) for x in (delta >> 5, place + 1, more - 1))
    return text.cpu().numpy().tobytes().decode("ascii"), text_stops[stops - 1].cpu()
