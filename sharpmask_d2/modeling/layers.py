"""Convolutions with mirrored borders, and batch norm merged into convolutions.

Shape letters: B batch, C channels, H W height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mirror_pad(x: Tensor, padding: tuple, *, blocks: int = 1) -> Tensor:
    """Continue a map beyond its borders by mirroring it, the edge included (cba|abc|cba).

    Its gradient is that of the released code, which takes the border for a constant: what flows into the border is dropped.

    Args:
        x: (B, C, H, W).
        padding: (left, right, top, bottom) in cells, each at most the side it extends.
        blocks: if the map is in blocks (see `blocks.to_blocks`), `padding` is one cell on all sides, of which only the pixels next to the
            map mirror it.

    Returns:
        (B, C, top + H + bottom, left + W + right).
    """
    if not any(padding):
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return _MirrorPad.apply(x, padding, blocks)
    return _mirror(x, padding, blocks)


def _mirror(x: Tensor, padding: tuple, blocks: int) -> Tensor:
    if max(padding) == 1:
        # On a CPU, autocast would do this in float32.
        with torch.autocast(x.device.type, enabled=False):
            x = F.pad(x, padding, mode="replicate")
        return _turn_borders(x, blocks) if blocks > 1 else x
    left, right, top, bottom = padding
    x = torch.cat([x[..., :left].flip(3), x, x[..., x.shape[3] - right :].flip(3)], dim=3)
    return torch.cat([x[:, :, :top].flip(2), x, x[:, :, x.shape[2] - bottom :].flip(2)], dim=2)


def _turn_borders(x: Tensor, blocks: int) -> Tensor:
    """In place: the pixels of the outermost cells that lie next to the map become those of the map that they lie next to."""
    pixels = x.permute(0, 2, 3, 1).unflatten(3, (blocks, blocks, -1))  # B, H, W, row and column in the block, C
    pixels[:, :, 0, :, -1] = pixels[:, :, 1, :, 0]
    pixels[:, :, -1, :, 0] = pixels[:, :, -2, :, -1]
    pixels[:, 0, :, -1] = pixels[:, 1, :, 0]
    pixels[:, -1, :, 0] = pixels[:, -2, :, -1]
    return x


class _MirrorPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, padding: tuple, blocks: int) -> Tensor:
        ctx.padding = padding
        return _mirror(x, padding, blocks)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        left, right, top, bottom = ctx.padding
        height, width = gradient.shape[2:]
        return gradient[:, :, top : height - bottom, left : width - right], None, None


class Successor(nn.Conv2d):
    """Takes the place of a convolution. Parameters keep the names they have there, so checkpoints fit."""

    def __init__(self, conv: nn.Conv2d):
        """
        Args:
            conv: the convolution to take over; its parameters are shared, not copied.
        """
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias


class MirroredConv2d(Successor):
    """A convolution whose padding mirrors the border; it takes the place of nn.Conv2d, Detectron2's Conv2d or timm's Conv2dSame.

    "Same" padding, which depends on the input's size, becomes that of an input whose sides the stride divides.
    """

    def __init__(self, conv: nn.Conv2d):
        """
        Args:
            conv: the convolution to take over; its parameters, norm and activation are shared, not copied.
        """
        super().__init__(conv)
        self.border = _borders(conv)
        self.norm = getattr(conv, "norm", None)
        self.activation = getattr(conv, "activation", None)

    def forward(self, x: Tensor) -> Tensor:
        x = mirror_pad(x, self.border)
        x = F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class EvenSameConv2d(Successor):
    """A convolution of stride 2 with "same" padding, for maps of even sides; it takes the place of timm's Conv2dSame.

    Such a map has one row and one column more of zeros behind it than before it. Here the kernel has them instead, before its first: it is
    the same function, without a padded copy of the map.
    """

    @property
    def even_padding(self) -> tuple:
        return tuple(size // 2 for size in self.kernel_size)

    def even_weight(self) -> Tensor:
        """The kernel with zeros before its first row and column: (C', C, K + 1, K + 1)."""
        return F.pad(self.weight, (1, 0, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.even_weight(), self.bias, self.stride, self.even_padding, 1, self.groups)


def use_even_padding(module: nn.Module) -> nn.Module:
    """Replace, in place, every Conv2dSame of stride 2 below `module`, whose maps have even sides. Returns `module`."""
    for name, child in module.named_children():
        if type(child).__name__ == "Conv2dSame" and child.stride == (2, 2) and child.dilation == (1, 1):
            setattr(module, name, EvenSameConv2d(child))
        else:
            use_even_padding(child)
    return module


def _borders(conv: nn.Conv2d) -> tuple:
    if type(conv).__name__ == "Conv2dSame" or conv.padding == "same":
        sides = []
        for kernel, stride, dilation in zip(conv.kernel_size[::-1], conv.stride[::-1], conv.dilation[::-1]):
            total = max(dilation * (kernel - 1) + 1 - stride, 0)
            sides += [total // 2, total - total // 2]
        return tuple(sides)
    vertical, horizontal = conv.padding
    return (horizontal, horizontal, vertical, vertical)


def use_mirrored_padding(module: nn.Module) -> nn.Module:
    """Replace, in place, every convolution below `module` that pads by one that mirrors its border. Returns `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and any(_borders(child)):
            setattr(module, name, MirroredConv2d(child))
        else:
            use_mirrored_padding(child)
    return module


class MergedNorm(nn.Module):
    """Takes the place of a batch norm that was merged into the convolution before it: the activation that it carried."""

    def __init__(self, activation: nn.Module):
        """
        Args:
            activation: nn.Identity if there was none.
        """
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Merge, in place, every batch norm below `module` into the convolution before it: the same function in evaluation, cheaper.

    A batch norm belongs to a convolution that holds it as `norm` (Detectron2) or that comes right before it among the children of the same
    module with as many channels (timm, torchvision). An activation that the batch norm carries is kept. Returns `module`.
    """
    previous = None
    for name, child in list(module.named_children()):
        if _is_batch_norm(child) and isinstance(previous, nn.Conv2d) and previous.out_channels == child.weight.shape[0]:
            _merge(previous, child)
            setattr(module, name, MergedNorm(getattr(child, "act", None) or nn.Identity()))
        elif isinstance(child, nn.Conv2d):
            if _is_batch_norm(getattr(child, "norm", None)):
                _merge(child, child.norm)
                child.norm = None
        else:
            fold_batch_norm(child)
        previous = child
    return module


def _is_batch_norm(module) -> bool:
    statistics = all(hasattr(module, name) for name in ("weight", "bias", "running_mean", "running_var", "eps"))
    return isinstance(module, nn.Module) and statistics


@torch.no_grad()
def _merge(conv: nn.Conv2d, norm: nn.Module) -> None:
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    bias = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None])
    conv.bias = nn.Parameter(bias.clone())
