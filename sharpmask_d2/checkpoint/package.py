"""Packing trained checkpoints into one small file."""

import io
import zipfile

import torch
from torch import Tensor

from ..errors import UserError
from ..io.outputs import open_output


def pack(states: list) -> dict:
    """The union of models' parameters in half precision.

    Args:
        states: state dicts of models that share parameters, such as a DeepMask and the SharpMask trained from it.

    Returns:
        name -> float16 tensor (integers stay as they are).

    Raises:
        ValueError: a parameter that two models have with different values, or that half precision cannot hold; it is named.
    """
    packed: dict = {}
    for state in states:
        for name, value in state.items():
            half = _halve(name, value)
            if name in packed and not torch.equal(packed[name], half):
                raise UserError(f"the models do not belong together: {name} differs")
            packed[name] = half
    return packed


def save_packed(packed: dict, path: str) -> None:
    """Write what `pack` returns so that `torch.load` and Detectron2 read it as any checkpoint: the same archive, compressed.

    Args:
        packed: name -> tensor.
        path: file to write.

    Raises:
        OutputError: the file cannot be written; one that was there before stays.
    """
    plain = io.BytesIO()
    torch.save({"model": packed}, plain)
    with (
        open_output(path) as file,
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))


def _halve(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    half = value.half()
    if not half.isfinite().all():
        raise UserError(f"{name} has values that float16 cannot hold")
    return half.contiguous()
