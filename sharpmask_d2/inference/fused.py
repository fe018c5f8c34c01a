"""Kernels of oneDNN for inference on a CPU: convolutions that apply the activation after them and add a shortcut before their output leaves
the cache, and linear layers.

They are the private operators that torch.compile emits. This is the only module that calls them, and `can_fuse` tries them first: where one
is missing or computes something else, models run on plain layers. Training and export never come here.

Shape letters: B batch, C channels, H W height and width, F features.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Optional

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from ..modeling.layers import EvenSameConv2d, MergedNorm, MirroredConv2d, Successor, mirror_pad

logger = logging.getLogger(__name__)

# Largest difference to plain layers, as a share of their largest output; both round differently.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@cache
def can_fuse(dtype: torch.dtype) -> bool:
    """Whether the operators of this module run on this machine in `dtype` and compute what plain layers compute.

    Each runs once in a process, on a small input. Where one fails, a line of the log says which and why.

    Args:
        dtype: torch.float32 or torch.bfloat16.
    """
    # Whoever asks may be in a context of autocast already.
    with torch.autocast("cpu", enabled=False):
        reason = _why_not(dtype)
    if reason:
        logger.warning(f"plain layers are used on the CPU in {dtype}, as oneDNN's kernels cannot be: {reason}")
    return not reason


@torch.no_grad()
def _why_not(dtype: torch.dtype) -> str:
    """Why the operators cannot be used; empty if they can."""
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16"
    for name, fused, plain in _probes(dtype):
        try:
            found = fused()
        # What a missing operator or one with other arguments raises, and what a kernel raises that the processor does not have.
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            return f"{name}: {error}".splitlines()[0]
        expected = plain()
        off = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        if not off <= _TOLERANCE[dtype]:
            return f"{name} is off by {float(off):.2g} of its largest output"
    return ""


def _probes(dtype: torch.dtype) -> list:
    """(name, fused, plain): functions without arguments that compute the same by the operators and by plain layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, shortcut = (torch.randn(2, 16, 7, 9).to(dtype) for _ in range(2))
        convs = {
            "a convolution": nn.Conv2d(16, 16, 3, padding=1),
            "a depthwise convolution": nn.Conv2d(16, 16, 3, padding=1, groups=16),
        }
        linears = {bias: nn.Linear(9, 5, bias=bias).to(dtype) for bias in (True, False)}
    probes = []
    for kind, conv in convs.items():
        conv = conv.to(dtype)
        for activation in (nn.ReLU(), nn.ReLU6()):
            fused = FusedConv2d(conv, activation)
            name = f"{kind} with {type(activation).__name__}"
            probes.append((name, lambda f=fused: f(x), lambda c=conv, a=activation: a(c(x))))
    conv, relu = convs["a convolution"], nn.ReLU()
    probes.append(
        (
            "a convolution with a shortcut",
            lambda: FusedConv2d(conv, relu)(x, plus=shortcut.clone()),
            lambda: relu(conv(x) + shortcut),
        )
    )
    for bias, linear in linears.items():
        name = f"a linear layer {'with' if bias else 'without'} bias"
        probes.append((name, lambda m=linear: FusedLinear(m)(x), lambda m=linear: m(x)))
    return probes


def fuse_layers(module: nn.Module, *, leave: Sequence = ()) -> nn.Module:
    """Replace, in place, layers below `module` by fused ones: the same function, without gradients.

    Replaced are linear layers, and convolutions that are known to be followed by a ReLU or ReLU6: those that hold it as `activation`
    (Detectron2), those in an nn.Sequential, those whose batch norm was merged into them (`layers.fold_batch_norm`) and those of
    Detectron2's bottlenecks. Call it where `can_fuse`, on the CPU, after batch norms are merged.

    Args:
        module: in evaluation, on the CPU.
        leave: modules whose layers stay as they are; default: none.

    Returns:
        `module`.
    """
    previous, previous_name = None, ""
    in_order = type(module) is nn.Sequential
    for name, child in list(module.named_children()):
        activation = child.activation if isinstance(child, MergedNorm) else child
        follows = isinstance(child, MergedNorm) or in_order
        if follows and _is_plain(previous) and _post_operation(activation):
            setattr(module, previous_name, FusedConv2d(previous, activation))
            setattr(module, name, nn.Identity())
        elif _is_known(child) and _post_operation(_own_activation(child)):
            setattr(module, name, FusedConv2d(child, child.activation))
        elif type(child) is nn.Linear:
            setattr(module, name, FusedLinear(child))
        elif _is_plain_bottleneck(child) and (
            child.shortcut is not None or (in_order and _is_plain_bottleneck(previous))
        ):
            # Without a projection it overwrites its input, which is then the output of the block before it, and of use to nothing else.
            setattr(module, name, FusedBottleneck(child))
        elif not any(child is left for left in leave):
            fuse_layers(child, leave=leave)
        previous, previous_name = child, name
    return module


def _is_known(conv) -> bool:
    """Whether it is a convolution of a class that is known, with padding in numbers and without a norm."""
    return (
        type(conv) in (nn.Conv2d, Conv2d, MirroredConv2d, EvenSameConv2d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and getattr(conv, "norm", None) is None
    )


def _is_plain(conv) -> bool:
    return _is_known(conv) and _own_activation(conv) is None


def _is_plain_bottleneck(block) -> bool:
    return type(block) is BottleneckBlock and all(map(_is_plain, (block.conv1, block.conv2, block.conv3)))


def _own_activation(conv):
    return getattr(conv, "activation", None)


def _post_operation(activation) -> Optional[tuple]:
    """oneDNN's name and numbers of an activation; None if it is not one that is fused."""
    if type(activation) is nn.ReLU:
        return "relu", []
    if type(activation) is nn.ReLU6:
        return "hardtanh", [activation.min_val, activation.max_val]
    return None


class FusedConv2d(Successor):
    """A convolution and the activation after it, and what is added in between."""

    def __init__(self, conv: nn.Conv2d, activation: nn.Module):
        """
        Args:
            conv: nn.Conv2d, Detectron2's Conv2d, `MirroredConv2d` or `EvenSameConv2d`, without norm and activation; its parameters are
                shared.
            activation: nn.ReLU or nn.ReLU6.
        """
        super().__init__(conv)
        self.border = getattr(conv, "border", (0, 0, 0, 0))
        self.post_operation = _post_operation(activation)
        self.padding = conv.padding
        if isinstance(conv, EvenSameConv2d):
            self.weight, self.padding = nn.Parameter(conv.even_weight(), requires_grad=False), conv.even_padding

    def forward(self, x: Tensor, plus: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            x: (B, C, H, W), any floating-point type; it is cast to that of the weights.
            plus: (B, C', H', W'), added before the activation and overwritten by the result; default: nothing is added.

        Returns:
            (B, C', H', W'), the type of the weights.
        """
        # To the dtype that autocast would give the convolution, and to the layout in which a sum is fused.
        x, plus = (t if t is None else t.to(self.weight.dtype, memory_format=torch.channels_last) for t in (x, plus))
        x = mirror_pad(x, self.border)
        arguments = x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        name, numbers = self.post_operation
        # Of no images, which are RoIs, the operator does not know the sum.
        if plus is None or len(plus) == 0:
            return torch.ops.mkldnn._convolution_pointwise(*arguments, name, numbers, "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(plus, *arguments, "add", 1.0, name, numbers, "")


class FusedBottleneck(nn.Module):
    """Detectron2's bottleneck of fused convolutions. Without a projection it overwrites its input."""

    def __init__(self, block: BottleneckBlock):
        """
        Args:
            block: whose convolutions have no norm left; they are shared.
        """
        super().__init__()
        relu = nn.ReLU()
        self.conv1, self.conv2, self.conv3 = (
            FusedConv2d(conv, relu) for conv in (block.conv1, block.conv2, block.conv3)
        )
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        out = self.conv2(self.conv1(x))
        return self.conv3(out, plus=x if self.shortcut is None else self.shortcut(x))


class FusedLinear(nn.Linear):
    """A linear layer by oneDNN, which is twice as fast in float32 as the library that torch asks otherwise on some processors."""

    def __init__(self, linear: nn.Linear):
        """
        Args:
            linear: whose parameters are shared.
        """
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(*, F) to (*, F')."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, "none", [], "")
