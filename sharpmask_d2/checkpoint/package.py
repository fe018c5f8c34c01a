"""Packing trained checkpoints into one small file."""

import io
import os
import zipfile
from typing import Union

import torch
from torch import Tensor

from ..outputs import open_output


def load_state(path: Union[str, os.PathLike]) -> dict:
    """The parameters in a checkpoint of tools/train_net.py; nothing in the file is executed.

    Args:
        path: .pth file.

    Returns:
        name -> tensor, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, or holds more than tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # Of a file that is something else torch raises whatever its reader runs into, such as IndexError.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{os.fspath(path)} is no checkpoint that can be loaded safely, see SECURITY.md: {reason[0]}"
        ) from error
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{os.fspath(path)} is no checkpoint of tools/train_net.py: it has no parameters by name under 'model'"
        )
    return state


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
                raise ValueError(f"the models do not belong together: {name} differs")
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
        raise ValueError(f"{name} has values that float16 cannot hold")
    return half.contiguous()
