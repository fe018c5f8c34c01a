"""Prepares a trained model for inference: merges batch norms, casts weights once, and uses fused kernels on CPUs that support them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from detectron2.modeling.backbone import Backbone
from torch import nn

from ..errors import UserError
from ..modeling.layers import fold_batch_norm
from . import DTYPES
from .fused import can_fuse, fuse_layers


def prepare_for_inference(model: nn.Module, dtype: str = "float32", *, compiled: bool = False) -> nn.Module:
    """Accelerates a model in place, for evaluation only. The model has to be called in the context of `autocast`.

    Batch norms are merged into convolutions. With "bfloat16", weights are cast once instead of for every image. On a CPU whose kernels pass
    a test (`fused.can_fuse`), convolutions also compute the ReLU that follows them, and oneDNN computes linear layers; the model then has
    to stay on the CPU. The outputs do not change except for rounding. The model has no gradients afterwards.

    Args:
        model: any model of this package or of Detectron2, with its weights.
        dtype: "float32" (default) or "bfloat16".
        compiled: whether the trunk, or the backbone, is compiled for each size of images when it first runs on that size, up to
            torch._dynamo.config.recompile_limit sizes. On a CPU, this needs a C++ compiler and takes about a minute. Default: False.

    Returns:
        `model`, in evaluation mode.

    Raises:
        UserError: `dtype` has another value.
    """
    _check(dtype)
    model = fold_batch_norm(model.eval()).requires_grad_(False)
    if dtype == "bfloat16":
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(torch.bfloat16)
    backbones = _backbones(model) if compiled else []
    if next(model.parameters()).device.type == "cpu" and can_fuse(getattr(torch, dtype)):
        # The compiler fuses the layers of compiled backbones.
        fuse_layers(model, leave=backbones)
    for backbone in backbones:
        backbone.forward = torch.compile(backbone.forward, dynamic=False, options={"freezing": True})
    return model


def _backbones(model: nn.Module) -> list[nn.Module]:
    """The backbones that are not part of another backbone."""
    names = [name for name, module in model.named_modules() if isinstance(module, Backbone)]
    return [model.get_submodule(name) for name in names if not any(name.startswith(other + ".") for other in names)]


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Returns the context in which a model has to be called that was prepared for `dtype`.

    Args:
        device: device of the model.
        dtype: "float32" or "bfloat16", as given to `prepare_for_inference`.

    Raises:
        UserError: `dtype` has another value.
    """
    _check(dtype)
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def _check(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: choose from {DTYPES}")
