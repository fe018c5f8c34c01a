"""Maps kept in blocks: a cell holds the channels of P x P pixels, row by row, so that maps of few channels fill the processor's vectors.

Shape letters: B batch, C channels, H W height and width in pixels, P pixels along a block, h w in cells of P x P pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import MirroredConv2d, mirror_pad


def to_blocks(x: Tensor, blocks: int) -> Tensor:
    """(B, C, H, W) to (B, P P C, h, w) for P = `blocks`, with zeros where the last block passes the border; channels last in memory."""
    if blocks == 1:
        return x
    x = F.pad(x, (0, -x.shape[3] % blocks, 0, -x.shape[2] % blocks))
    cells = x.permute(0, 2, 3, 1).unflatten(2, (-1, blocks)).unflatten(1, (-1, blocks))  # B, h, P, w, P, C
    return cells.transpose(2, 3).flatten(3).permute(0, 3, 1, 2)


def from_blocks(x: Tensor, blocks: int) -> Tensor:
    """(B, P P C, h, w) to (B, C, P h, P w), channels last in memory."""
    if blocks == 1:
        return x
    pixels = x.permute(0, 2, 3, 1).unflatten(3, (blocks, -1)).transpose(2, 3)  # B, h, P, w, P C
    return pixels.flatten(1, 2).unflatten(3, (blocks, -1)).flatten(2, 3).permute(0, 3, 1, 2)


def conv_blocks(x: Tensor, conv: nn.Conv2d, *, blocks: int, upsampled: bool = False) -> Tensor:
    """`conv` of a map in blocks, or of that map made twice as large by nearest neighbours, without making it: a 3x3 convolution of cells
    whose weights are sums of those of `conv`.

    Args:
        x: (B, P P C, h, w) for P = `blocks`.
        conv: 3x3, stride 1, with a bias and a border of one pixel: of zeros, or mirrored (`MirroredConv2d`).
        blocks: P; 1 is a plain map.
        upsampled: convolve the map of twice the size.

    Returns:
        (B, P P C', h, w), with 2 P in the place of P if upsampled; channels last in memory.
    """
    after = 2 * blocks if upsampled else blocks
    taps = _taps(blocks, after, conv.weight.device).to(conv.weight.dtype)
    # Pixels before the channels, so that what `from_blocks` rearranges are whole pixels.
    weight = torch.einsum("pyqt,rxsu,oitu->proqsiyx", taps, taps, conv.weight)
    mirrored = isinstance(conv, MirroredConv2d)
    return F.conv2d(
        mirror_pad(x, conv.border, blocks=blocks) if mirrored else x,
        weight.flatten(3, 5).flatten(0, 2).to(x.dtype).contiguous(memory_format=torch.channels_last),
        conv.bias.repeat(after**2).to(x.dtype),
        padding=0 if mirrored else 1,
    )


def conv_upsampled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` of (B, C, H, W) made twice as large by nearest neighbours: (B, C', 2 H, 2 W), channels last in memory. See `conv_blocks`."""
    return from_blocks(conv_blocks(x, conv, blocks=1, upsampled=True), 2)


def _taps(before: int, after: int, device: torch.device) -> Tensor:
    """Along an axis, for each output of a block of `after`: for the cells before, at and after it, for each of the `before` pixels of that
    cell, whether each of the three taps falls on it: (after, 3, before, 3) bool. Made on the device, which need not wait for it."""
    cells, pixels = torch.arange(3, device=device), torch.arange(before, device=device)
    # after x 3; the first pixel of the block's own cell is 0.
    places = torch.arange(after, device=device)[:, None] + cells - 1
    cell = torch.div(places, after, rounding_mode="floor") + 1
    pixel = places.remainder(after) * before // after
    return (cell[:, None, None] == cells[:, None, None]) & (pixel[:, None, None] == pixels[:, None])
