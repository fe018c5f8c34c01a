"""Reads checkpoint files, with one clear error for a file that is not a checkpoint."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import UserError


def _load(path: str) -> Any:
    # Tensors, numbers and text only, because a pickle may execute any code.
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: str, load: Callable[[str], Any] = _load) -> dict[str, Any]:
    """Read a checkpoint of Detectron2.

    Args:
        path: of the file.
        load: function that reads the file; by default `torch.load` onto the CPU, of tensors and plain values only.

    Returns:
        The content: a dict whose entry `model` holds the parameters by name.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the file is incomplete or not a checkpoint; the message names it.
    """
    try:
        content = load(path)
    except (FileNotFoundError, MemoryError, UserError):
        raise
    # For a truncated file, or one that is not a pickle, unpickling raises nearly any exception.
    except Exception as error:
        reason = type(error).__name__
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}): it is another kind of file, is incomplete, or holds more than tensors and "
            "plain values, which are not loaded (see SECURITY.md)"
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(
        isinstance(value, (torch.Tensor, np.ndarray)) for value in model.values()
    ):
        raise UserError(f"{path} is not a checkpoint of Detectron2: it holds no parameters by name")
    return content
