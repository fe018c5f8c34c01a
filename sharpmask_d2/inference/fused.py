"""Convolutions that apply the activation after them, and add a shortcut, before their output leaves the cache; and linear layers by oneDNN.

By the operators that torch.compile emits for oneDNN; for inference on a CPU.

Shape letters: B batch, C channels, H W height and width, F features.
"""

from collections.abc import Sequence
from typing import Optional

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from ..modeling.layers import EvenSameConv2d, MergedNorm, MirroredConv2d, Successor, mirror_pad


def can_fuse(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have these operators in `dtype`."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fuse_layers(module: nn.Module, *, leave: Sequence = ()) -> nn.Module:
    """Let, in place, every convolution below `module` that is known to be followed by a ReLU or ReLU6 apply it, and oneDNN compute linear
    layers: the same function, without gradients.

    Known are those that hold it as `activation` (Detectron2), those in an nn.Sequential, those whose batch norm was merged into them
    (`layers.fold_batch_norm`) and Detectron2's bottlenecks. Call it where `can_fuse`, on the CPU, after batch norms are merged. Returns
    `module`.

    Args:
        module: anything.
        leave: modules whose layers stay as they are.
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
    """A convolution that is what its class says, without a norm."""
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
            x: (B, C, H, W).
            plus: (B, C', H', W'), added before the activation and overwritten by the result.
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
