"""Checkpoints from which a training can be resumed: their files are complete and their numbers finite."""

import io
import os
import pickle
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..errors import UserError
from ..io.outputs import open_output
from .read import read_checkpoint

# Maximum number of parameters that an error names.
_SHOWN = 4
# What torch raises for a file that is empty, truncated, missing or of another kind.
_UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError)


def list_names(names: list[str]) -> str:
    """A text with the first names and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def find_not_finite(state: dict[str, Any]) -> list[str]:
    """The names of the parameters that hold a NaN or an infinite number.

    Args:
        state: name -> tensor or array; other values are ignored.
    """
    return [name for name, value in state.items() if not _is_finite(value)]


def check_finite(state: dict[str, Any], path: str) -> None:
    """Check that all numbers of a file's parameters are finite.

    Args:
        state: name -> tensor or array.
        path: of the file, for the message.

    Raises:
        UserError: a number is NaN or infinite; the message names the file and the parameters.
    """
    if names := find_not_finite(state):
        raise UserError(
            f"{path}: {list_names(names)}: not finite (NaN or infinite numbers); the training that wrote this file has diverged, "
            "take an earlier checkpoint"
        )


def _is_finite(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "fc" or bool(np.isfinite(value).all())
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return bool(value.isfinite().all())
    return True


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which refuses numbers that are not finite and never leaves an incomplete file.

    Where `last_checkpoint` is empty or names a file that is truncated or missing, training resumes from the latest complete checkpoint in
    the folder, and a warning says so.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str = "", **options: Any):
        """
        Args:
            model: whose parameters are saved and loaded.
            save_dir: folder of the checkpoints; none by default, and then nothing is saved.
            options: further arguments of Detectron2's checkpointer.
        """
        super().__init__(model, save_dir, **options)
        self.path_manager = _WholeFiles(self.path_manager)
        self._last_warning = None

    def save(self, name: str, **extra: Any) -> None:
        """Save the model in the folder.

        Args:
            name: of the file, without its suffix.
            extra: further values to save, such as the iteration.

        Raises:
            FloatingPointError: a parameter is not finite, and nothing is written; the message names the parameter and the iteration.
            OutputError: the file cannot be written.
        """
        if self.save_dir and self.save_to_disk and (names := find_not_finite(self.model.state_dict())):
            at = f" at iteration {extra['iteration']}" if "iteration" in extra else ""
            raise FloatingPointError(
                f"training has diverged{at}: {list_names(names)}: not finite (NaN or infinite numbers); {name}.pth is not written, the "
                f"last checkpoint is {self.get_checkpoint_file() or 'none'}"
            )
        super().save(name, **extra)

    def has_checkpoint(self) -> bool:
        """Whether the folder has a complete checkpoint from which training can resume."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The file that `last_checkpoint` names or, if it is incomplete, the complete checkpoint of the latest iteration; "" if none."""
        if not super().has_checkpoint():
            return ""
        tagged = super().get_checkpoint_file()
        if "://" in tagged:
            # Remote files are not checked: remote storage writes files as a whole.
            return tagged
        try:
            _read(tagged)
            return tagged
        except _UNREADABLE as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        iterations = {}
        for path in self.get_all_checkpoint_files():
            try:
                iterations[path] = _read(path)["iteration"]
            except (*_UNREADABLE, KeyError, TypeError):
                # An incomplete file, or one that no training wrote.
                continue
        latest = max(iterations, key=iterations.get, default="")
        self._warn_once(
            f"{os.path.join(self.save_dir, 'last_checkpoint')} names {os.path.basename(tagged) or 'nothing'}, which cannot be read "
            f"({reason}): "
            + (f"resuming from {latest}, the latest whole checkpoint" if latest else "there is no whole checkpoint")
        )
        return latest

    def _warn_once(self, message: str) -> None:
        # Resuming asks for the checkpoint several times.
        if message != self._last_warning:
            self.logger.warning(message)
            self._last_warning = message

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = read_checkpoint(filename, super()._load_file)
        check_finite(loaded["model"], filename)
        return loaded


def _read(path: str) -> dict[str, Any]:
    """The content of a checkpoint, whose tensors are read from the disk only when they are used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


class _WholeFiles:
    """A path manager whose local files appear only when they are complete."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **options: Any):
        if "w" not in mode or "://" in path:
            return self._path_manager.open(path, mode, **options)
        return _write_whole(path, mode, options)


@contextmanager
def _write_whole(path: str, mode: str, options: dict[str, Any]):
    with open_output(path) as file:
        if "b" in mode:
            yield file
        else:
            text = io.TextIOWrapper(file, **options)
            yield text
            text.flush()
            # `open_output` closes the file.
            text.detach()
