"""Convolutions with mirrored borders or of upsampled maps, and batch norm merged into convolutions.

Shape letters: B batch, C channels, H W height and width.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UserError


def mirror_pad(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Continue a map beyond its borders by mirroring it, the edge included (cba|abc|cba).

    Its gradient is that of the released code, which treats the border as a constant: what flows into the border is dropped.

    Args:
        x: (B, C, H, W), any floating-point type.
        padding: (left, right, top, bottom) in cells of the map, each at most the side that it extends.

    Returns:
        (B, C, top + H + bottom, left + W + right), the type of `x`; `x` itself without padding.
    """
    if not any(padding):
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return _MirrorPad.apply(x, padding)
    return _mirror(x, padding)


def _mirror(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    if max(padding) == 1:
        # On a CPU, autocast would do this in float32.
        with torch.autocast(x.device.type, enabled=False):
            return F.pad(x, padding, mode="replicate")
    left, right, top, bottom = padding
    x = torch.cat([x[..., :left].flip(3), x, x[..., x.shape[3] - right :].flip(3)], dim=3)
    return torch.cat([x[:, :, :top].flip(2), x, x[:, :, x.shape[2] - bottom :].flip(2)], dim=2)


class _MirrorPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
        ctx.padding = padding
        return _mirror(x, padding)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        left, right, top, bottom = ctx.padding
        height, width = gradient.shape[2:]
        return gradient[:, :, top : height - bottom, left : width - right], None


def conv_upsampled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution of a map that is made twice as large by nearest neighbours, computed on the small map.

    Along an axis, the three taps of an output fall on two cells of the small map. The four outputs of a cell are therefore one 3x3
    convolution of the small map with four times the channels, whose weights are sums of those of `conv`: 4/9 of the multiplications are
    needed, and the large map is not made.

    Args:
        x: (B, C, H, W).
        conv: 3x3, stride 1, C to C' channels, with a bias and a border of one cell: of zeros, or mirrored (`MirroredConv2d`).

    Returns:
        (B, C', 2 H, 2 W), what `conv` makes of the upsampled map, to rounding; channels last in memory.
    """
    weight = conv.upsampled_weight if isinstance(conv, ConstantUpsampling) else _upsampled_weight(conv.weight)
    mirrored = isinstance(conv, MirroredConv2d)
    outputs = F.conv2d(
        mirror_pad(x, conv.border) if mirrored else x,
        weight.to(x.dtype).contiguous(memory_format=torch.channels_last),
        conv.bias.repeat(4).to(x.dtype),
        padding=0 if mirrored else 1,
    )
    rows = outputs.permute(0, 2, 3, 1).unflatten(3, (2, -1)).transpose(2, 3)  # B, H, 2, W, 2 x C'
    return rows.reshape(x.shape[0], 2 * x.shape[2], 2 * x.shape[3], conv.out_channels).permute(0, 3, 1, 2)


def _upsampled_weight(weight: Tensor) -> Tensor:
    """Weights (C', C, 3, 3) for the upsampled map as weights (2 x 2 x C', C, 3, 3) for the small map, for the four outputs of a cell."""
    columns = _taps_of_both_outputs(weight.float())  # C', C, 3 rows, 2 outputs, 3 columns
    both = _taps_of_both_outputs(
        columns.movedim(2, -1)
    )  # C', C, 2 outputs along x, 3 columns, 2 outputs along y, 3 rows
    # Outputs before the channels, so that `conv_upsampled` rearranges whole pixels: with pixel_shuffle it takes half as long again.
    return both.permute(4, 2, 0, 1, 5, 3).flatten(0, 2)


def _taps_of_both_outputs(weight: Tensor) -> Tensor:
    """Weights (*, 3) of three neighbours in the upsampled map as weights (*, 2, 3) of three cells of the small map, for both outputs of the
    middle cell."""
    before, centre, after = weight.unbind(-1)
    none = torch.zeros_like(before)
    first = torch.stack([before, centre + after, none], dim=-1)
    second = torch.stack([none, before + centre, after], dim=-1)
    return torch.stack([first, second], dim=-2)


class Successor(nn.Conv2d):
    """Base of convolutions that take the place of another one. Parameters keep their names, so that checkpoints fit."""

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


class ConstantUpsampling(Successor):
    """A convolution for `conv_upsampled` whose weights for the small map are computed once. It is for inference only."""

    def __init__(self, conv: nn.Conv2d):
        """
        Args:
            conv: 3x3, with a border of one cell of zeros.
        """
        super().__init__(conv)
        self.register_buffer("upsampled_weight", _upsampled_weight(conv.weight.detach()))


class MirroredConv2d(Successor):
    """A convolution whose padding mirrors the border, as in the released code. It takes the place of nn.Conv2d, Detectron2's Conv2d or
    timm's Conv2dSame.

    "Same" padding, which depends on the size of the input, becomes the padding for inputs whose sides are multiples of the stride.
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
        """(B, C, H, W) to (B, C', H', W')."""
        x = mirror_pad(x, self.border)
        x = F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class EvenSameConv2d(Successor):
    """A convolution of stride 2 with "same" padding, for maps with even sides. It takes the place of timm's Conv2dSame.

    "Same" padding adds one row and one column of zeros more after such a map than before it, which needs a padded copy of the map. Here the
    kernel gets a first row and column of zeros instead, so that symmetric padding computes the same function.
    """

    @property
    def even_padding(self) -> tuple[int, ...]:
        return tuple(size // 2 for size in self.kernel_size)

    def even_weight(self) -> Tensor:
        """The kernel with zeros before its first row and column: (C', C, K + 1, K + 1)."""
        return F.pad(self.weight, (1, 0, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.even_weight(), self.bias, self.stride, self.even_padding, 1, self.groups)


def use_even_padding(module: nn.Module) -> nn.Module:
    """Replace, in place, every Conv2dSame of stride 2 below `module` by an `EvenSameConv2d`.

    Args:
        module: a network of timm whose images have sides that are multiples of its stride, so that all its maps have even sides.

    Returns:
        `module`.
    """
    for name, child in module.named_children():
        if type(child).__name__ == "Conv2dSame" and child.stride == (2, 2) and child.dilation == (1, 1):
            setattr(module, name, EvenSameConv2d(child))
        else:
            use_even_padding(child)
    return module


def _borders(conv: nn.Conv2d) -> tuple[int, ...]:
    if type(conv).__name__ == "Conv2dSame" or conv.padding == "same":
        sides = []
        for kernel, stride, dilation in zip(conv.kernel_size[::-1], conv.stride[::-1], conv.dilation[::-1]):
            total = max(dilation * (kernel - 1) + 1 - stride, 0)
            sides += [total // 2, total - total // 2]
        return tuple(sides)
    vertical, horizontal = conv.padding
    return (horizontal, horizontal, vertical, vertical)


def use_mirrored_padding(module: nn.Module) -> nn.Module:
    """Replace, in place, every convolution below `module` that has padding by one that mirrors the border.

    Args:
        module: any network.

    Returns:
        `module`.

    Raises:
        UserError: a convolution with padding is not a plain one (see `is_plain`); nothing is replaced then.
    """
    for name, child in module.named_modules():
        if _pads_a_kernel(child) and not is_plain(child):
            raise UserError(
                f"the borders of {name} cannot be mirrored, as {type(child).__name__} is not a plain convolution: "
                "choose 'zeros' for MODEL.SHARPMASK.TRUNK.PADDING, or another network"
            )
    _mirror_borders(module)
    return module


def _mirror_borders(module: nn.Module) -> None:
    for name, child in module.named_children():
        if _pads_a_kernel(child):
            setattr(module, name, MirroredConv2d(child))
        else:
            _mirror_borders(child)


def _pads_a_kernel(module: nn.Module) -> bool:
    """Whether it is a convolution of any class that has padding and does not mirror the border yet."""
    kind = type(module).__name__
    if "Conv2d" not in kind or not hasattr(module, "padding") or isinstance(module, MirroredConv2d):
        return False
    if kind.endswith("Same") or isinstance(module.padding, str):
        return max(module.kernel_size) > 1
    return any(module.padding)


def is_plain(conv) -> bool:
    """Whether a module is a convolution of a known class that uses its own `weight` as it is and pads with zeros.

    Other subclasses of nn.Conv2d may change the weight: timm's weight-standardised ones do.
    """
    ours_or_known = type(conv) in (nn.Conv2d, Conv2d, MirroredConv2d, EvenSameConv2d)
    # timm's own, which need not be imported here.
    ours_or_known |= isinstance(conv, nn.Conv2d) and type(conv).__name__ == "Conv2dSame"
    return ours_or_known and conv.padding_mode == "zeros" and isinstance(conv._parameters.get("weight"), nn.Parameter)


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


def fold_batch_norm(module: nn.Module, *, leave: Collection = ()) -> nn.Module:
    """Merge, in place, every batch norm below `module` into the convolution before it, which leaves the function in evaluation unchanged.

    A batch norm belongs to a plain convolution (see `is_plain`) that holds it as `norm` (Detectron2) or that comes right before it among
    the children of the same module with as many channels (timm, torchvision). An activation that the batch norm carries is kept.

    Args:
        module: any network. Batch norms that a module below it lists as `separate_norms` stay as they are.
        leave: further batch norms that stay as they are; default: none.

    Returns:
        `module`.
    """
    leave = [*leave, *getattr(module, "separate_norms", [])]
    for conv, name, child in _convolutions_and_norms(module):
        if name is None:
            _merge(conv, child)
            conv.norm = None
        elif not any(child is left for left in leave):
            _merge(conv, child)
            setattr(module, name, MergedNorm(getattr(child, "act", None) or nn.Identity()))
    for child in module.children():
        if not isinstance(child, nn.Conv2d):
            fold_batch_norm(child, leave=leave)
    return module


def _convolutions_and_norms(module: nn.Module) -> list[tuple[nn.Conv2d, Optional[str], nn.Module]]:
    """The plain convolutions among the children of `module` that have a batch norm, the name of the child that it is, and the batch norm.

    The name is None where the convolution holds the batch norm.
    """
    found, previous = [], None
    for name, child in module.named_children():
        if _is_batch_norm(child) and _ends_plainly(previous) and previous.out_channels == child.weight.shape[0]:
            found.append((previous, name, child))
        elif is_plain(child) and _is_batch_norm(getattr(child, "norm", None)):
            found.append((child, None, child.norm))
        previous = child
    return found


def _ends_plainly(conv) -> bool:
    return is_plain(conv) and getattr(conv, "activation", None) is None


def _is_batch_norm(module) -> bool:
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = all(isinstance(getattr(module, name, None), Tensor) for name in names)
    return isinstance(module, nn.Module) and tensors and hasattr(module, "eps")


def find_separate_norms(module: nn.Module, image: Tensor) -> tuple[set[str], Any]:
    """Find batch norms that `fold_batch_norm` would merge because of their position but must not: those that do not read the convolution's
    output, or do not read it alone, because another layer reads it or `module` returns it.

    Args:
        module: runs once on `image`, in evaluation mode; it returns a list or a dict of tensors.
        image: any input of `module`.

    Returns:
        set of names of batch norms below `module`; and what `module` returned.
    """
    readers = _Readers()
    handles = []
    for name, child in module.named_modules():
        if is_plain(child):
            handles.append(child.register_forward_hook(readers.gives(name)))
        elif _is_batch_norm(child):
            handles.append(child.register_forward_pre_hook(readers.enters(name)))
            handles.append(child.register_forward_hook(readers.leaves()))
    was_training = module.training
    try:
        with torch.no_grad(), readers:
            outputs = module.eval()(image)
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    readers.read(outputs)
    names = {child: name for name, child in module.named_modules()}
    separate = set()
    for parent in module.modules():
        for conv, name, norm in _convolutions_and_norms(parent):
            if name is not None and not readers.only(names[conv], names[norm]):
                separate.add(names[norm])
    return separate, outputs


class _Readers(TorchDispatchMode):
    """Notes, while a network runs, what reads the outputs of its convolutions: the name of a batch norm, or None for anything else."""

    def __init__(self):
        super().__init__()
        self._inside = None
        # Outputs are kept, so that no other tensor gets their identity.
        self._outputs, self._readers, self._runs = {}, {}, Counter()

    def gives(self, conv: str):
        """A forward hook of a convolution."""

        def hook(module, args, output: Tensor) -> None:
            self._outputs[id(output)] = conv, output
            self._readers.setdefault(conv, set())
            self._runs[conv] += 1

        return hook

    def enters(self, norm: str):
        """A hook of a batch norm, before it runs."""

        def hook(module, args) -> None:
            self._inside = norm
            self._runs[norm] += 1

        return hook

    def leaves(self):
        """A hook of a batch norm, after it ran."""

        def hook(module, args, output) -> None:
            self._inside = None

        return hook

    def read(self, values) -> None:
        """Note that tensors anywhere in `values` are read."""
        for value in tree_leaves(values):
            if id(value) in self._outputs:
                conv, _ = self._outputs[id(value)]
                self._readers[conv].add(self._inside)

    def only(self, conv: str, norm: str) -> bool:
        """Whether a batch norm, and nothing else, reads a convolution; each of them once."""
        return self._readers.get(conv) == {norm} and self._runs[conv] == self._runs[norm] == 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.read((args, kwargs))
        return func(*args, **(kwargs or {}))


def _merge(conv: nn.Conv2d, norm: nn.Module) -> None:
    statistics = norm.running_mean, norm.running_var, norm.eps
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
    conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())


@contextmanager
def without_gradients() -> Iterator[None]:
    """A context, or decorator, without gradients. Afterwards autocast forgets the weights that it has cast inside: older versions of torch
    would use these, which have no gradient, where a gradient is needed."""
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()
