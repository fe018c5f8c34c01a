"""Kernels of oneDNN for inference on a CPU: convolutions fused with a following activation and the addition of a shortcut, and linear
layers.

They are private operators of torch, which torch.compile uses, too. Only this module calls them. `can_fuse` tests them first: if one is
missing or computes a different result, models keep their plain layers. Training and export do not use this module.

Shape letters: B images or windows, C channels, H W height and width, F features.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Optional

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from ..modeling.layers import EvenSameConv2d, MergedNorm, MirroredConv2d, Successor, mirror_pad

logger = logging.getLogger(__name__)

# Maximum difference from plain layers, as a share of their largest output. The two round differently.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@cache
def can_fuse(dtype: torch.dtype) -> bool:
    """Whether the operators of this module run on this machine in `dtype` and agree with plain layers.

    They are tested once per process, on a small input. If one fails, a warning in the log names it and the reason.

    Args:
        dtype: torch.float32 or torch.bfloat16.
    """
    # The caller may be in a context of autocast.
    with torch.autocast("cpu", enabled=False):
        reason = _why_not(dtype)
    if reason:
        logger.warning(f"plain layers are used on the CPU in {dtype}, as oneDNN's kernels cannot be: {reason}")
    return not reason


@torch.no_grad()
def _why_not(dtype: torch.dtype) -> str:
    """The reason why the operators cannot be used; empty if they can be used."""
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16"
    for name, fused, plain in _probes(dtype):
        try:
            found = fused()
        # These errors are raised by a missing operator, by one with other arguments, and by one that the processor does not support.
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            return f"{name}: {error}".splitlines()[0]
        expected = plain()
        off = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        if not off <= _TOLERANCE[dtype]:
            return f"{name} is off by {float(off):.2g} of its largest output"
    return ""


def _probes(dtype: torch.dtype) -> list[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """Names of operators with two functions each, which compute one output by the operator and by plain layers."""
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


def fuse_layers(module: nn.Module, *, leave: Sequence[nn.Module] = ()) -> nn.Module:
    """Replaces layers inside a module by fused ones, in place. The outputs do not change except for rounding; there are no gradients.

    It replaces linear layers, and convolutions that are known to be followed by a ReLU or ReLU6: those with the attribute `activation`
    (Detectron2), those in an nn.Sequential, those whose batch norm was merged into them (`layers.fold_batch_norm`) and those of
    Detectron2's bottlenecks. `can_fuse` has to be true, and batch norms have to be merged before.

    Args:
        module: a module in evaluation mode on the CPU.
        leave: modules inside it whose layers are not replaced; default: none.

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
            # A block without projection overwrites its input, so the input must be the output of a block that nothing else reads.
            setattr(module, name, FusedBottleneck(child))
        elif not any(child is left for left in leave):
            fuse_layers(child, leave=leave)
        previous, previous_name = child, name
    return module


def _is_known(conv: Any) -> bool:
    """Whether a module is a convolution of a known class, with numeric padding and without a norm."""
    return (
        type(conv) in (nn.Conv2d, Conv2d, MirroredConv2d, EvenSameConv2d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and getattr(conv, "norm", None) is None
    )


def _is_plain(conv: Any) -> bool:
    """Whether a module is a known convolution without an activation."""
    return _is_known(conv) and _own_activation(conv) is None


def _is_plain_bottleneck(block: Any) -> bool:
    """Whether a module is a bottleneck of Detectron2 whose norms have been merged."""
    return type(block) is BottleneckBlock and all(map(_is_plain, (block.conv1, block.conv2, block.conv3)))


def _own_activation(conv: Any) -> Optional[nn.Module]:
    return getattr(conv, "activation", None)


def _post_operation(activation: Optional[nn.Module]) -> Optional[tuple[str, list[float]]]:
    """The name and the parameters of an activation in oneDNN; None if it cannot be fused."""
    if type(activation) is nn.ReLU:
        return "relu", []
    if type(activation) is nn.ReLU6:
        return "hardtanh", [activation.min_val, activation.max_val]
    return None


class FusedConv2d(Successor):
    """A convolution fused with its activation and with an optional addition between the two."""

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
            x: (B, C, H, W) of any floating-point type; it is cast to the type of the weights.
            plus: (B, C', H', W'), added before the activation and overwritten by the result. Default: None, nothing is added.

        Returns:
            (B, C', H', W') of the type of the weights.
        """
        # The type is that of the convolution under autocast; sums are fused only in this layout.
        x, plus = (t if t is None else t.to(self.weight.dtype, memory_format=torch.channels_last) for t in (x, plus))
        x = mirror_pad(x, self.border)
        arguments = x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        name, numbers = self.post_operation
        # The fused sum does not support an empty batch, such as one of no RoIs.
        if plus is None or len(plus) == 0:
            return torch.ops.mkldnn._convolution_pointwise(*arguments, name, numbers, "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(plus, *arguments, "add", 1.0, name, numbers, "")


class FusedBottleneck(nn.Module):
    """Detectron2's bottleneck with fused convolutions. Without a projection, it overwrites its input."""

    def __init__(self, block: BottleneckBlock):
        """
        Args:
            block: a bottleneck whose norms have been merged; its parameters are shared.
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
    """A linear layer computed by oneDNN, which on some processors is twice as fast in float32 as the default library of torch."""

    def __init__(self, linear: nn.Linear):
        """
        Args:
            linear: a linear layer; its parameters are shared.
        """
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(*, F) to (*, F')."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, "none", [], "")
