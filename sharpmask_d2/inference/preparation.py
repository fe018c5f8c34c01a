"""Prepares a trained model for inference: batch norms merged, weights cast once, fused kernels where they work."""

from contextlib import nullcontext

import torch
from detectron2.modeling.backbone import Backbone
from torch import nn

from ..errors import UserError
from ..modeling.layers import fold_batch_norm
from .fused import can_fuse, fuse_layers

DTYPES = ("float32", "bfloat16")


def prepare_for_inference(model: nn.Module, dtype: str = "float32", *, compiled: bool = False) -> nn.Module:
    """Change a model in place into one that computes the same in evaluation, faster. It is then called in the context of `autocast`.

    Batch norms are merged into convolutions. For "bfloat16" the weights that autocast would cast for every image are cast once. On a CPU
    whose kernels pass their probe (`fused.can_fuse`), convolutions apply the ReLU after them and oneDNN computes linear layers; the model
    then has to stay on the CPU. The model has no gradients afterwards.

    Args:
        model: any model of this package or of Detectron2, with its weights.
        dtype: "float32" (default) or "bfloat16".
        compiled: compile the trunk, or the backbone, for images of one size: when it first runs, which on a CPU needs a C++ compiler and
            about a minute. Further sizes are compiled, too, up to torch._dynamo.config.recompile_limit. Default: False.

    Returns:
        `model`, in evaluation mode.

    Raises:
        UserError: another dtype.
    """
    _check(dtype)
    model = fold_batch_norm(model.eval()).requires_grad_(False)
    if dtype == "bfloat16":
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(torch.bfloat16)
    backbones = _backbones(model) if compiled else []
    if next(model.parameters()).device.type == "cpu" and can_fuse(getattr(torch, dtype)):
        # In compiled backbones the compiler fuses layers itself.
        fuse_layers(model, leave=backbones)
    for backbone in backbones:
        backbone.forward = torch.compile(backbone.forward, dynamic=False, options={"freezing": True})
    return model


def _backbones(model: nn.Module) -> list:
    """Backbones that are not part of another."""
    names = [name for name, module in model.named_modules() if isinstance(module, Backbone)]
    return [model.get_submodule(name) for name in names if not any(name.startswith(other + ".") for other in names)]


def autocast(device: torch.device, dtype: str):
    """The context in which a model that was prepared for `dtype` is called.

    Args:
        device: on which the model is.
        dtype: "float32" or "bfloat16", as given to `prepare_for_inference`.

    Raises:
        UserError: another dtype.
    """
    _check(dtype)
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def _check(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: choose from {DTYPES}")
