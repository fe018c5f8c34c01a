"""Packs trained checkpoints into one small file for distribution."""

import io
import zipfile

import torch
from torch import Tensor

from ..errors import UserError
from ..io.outputs import open_output


def pack(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The union of the parameters of several models in half precision.

    Args:
        states: state dicts of models that share parameters, such as a DeepMask and the SharpMask trained from it.

    Returns:
        name -> float16 tensor; integer tensors are unchanged. Parameters of equal values are one tensor, which `save_packed` writes once.

    Raises:
        UserError: two models have different values of a parameter, or float16 cannot hold a value; the message names the parameter.
    """
    packed: dict[str, Tensor] = {}
    distinct: dict[tuple, Tensor] = {}
    for state in states:
        for name, value in state.items():
            half = _halve(name, value)
            if name in packed and not torch.equal(packed[name], half):
                raise UserError(f"the models do not belong together: {name} differs")
            packed[name] = distinct.setdefault((half.dtype, half.shape, half.cpu().numpy().tobytes()), half)
    return packed


def save_packed(packed: dict[str, Tensor], path: str) -> None:
    """Write packed parameters as a compressed checkpoint, which `torch.load` and Detectron2 read as any other.

    Args:
        packed: name -> tensor, from `pack`.
        path: of the file to write.

    Raises:
        OutputError: the file cannot be written; a file that existed before stays unchanged.
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
        raise UserError(f"{name} has values that float16 cannot hold: pack another checkpoint")
    return half.contiguous()
