"""Reading a file that may be no checkpoint."""

from collections.abc import Callable

import numpy as np
import torch

from ..errors import UserError


def _load(path: str) -> dict:
    # Tensors, numbers and text only: a pickle may run anything.
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: str, load: Callable = _load) -> dict:
    """The content of a checkpoint of Detectron2.

    Args:
        path: of the file.
        load: reads it.

    Returns:
        a dict with `model`: parameters by name.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file is something else, or not whole; the message names it.
    """
    try:
        content = load(path)
    except (FileNotFoundError, MemoryError, UserError):
        raise
    # On what is no pickle, or a cut one, unpickling raises nearly anything.
    except Exception as error:
        reason = type(error).__name__
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}): it is another file, is not whole, or holds more than tensors and plain "
            "values, which is not loaded (see SECURITY.md)"
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(
        isinstance(value, (torch.Tensor, np.ndarray)) for value in model.values()
    ):
        raise UserError(f"{path} is not a checkpoint of Detectron2: it holds no parameters by name")
    return content
