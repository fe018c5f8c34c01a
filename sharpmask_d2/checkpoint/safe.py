"""Checkpoints that a training can be resumed from: whole or not there, and finite."""

import io
import os
import pickle
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..errors import UserError
from ..io.outputs import open_output
from .read import read_checkpoint

# Names of parameters that an error lists.
_SHOWN = 4
# What torch raises for a file that is empty, cut, gone or something else.
_UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError)


def list_names(names: list) -> str:
    """The first of some names, and how many more there are, as a text."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def find_not_finite(state: dict) -> list:
    """Names of the parameters that have a NaN or an infinite number.

    Args:
        state: name -> tensor or array; what else it holds is passed over.
    """
    return [name for name, value in state.items() if not _is_finite(value)]


def check_finite(state: dict, path: str) -> None:
    """Refuse the parameters of a file unless all their numbers are finite.

    Args:
        state: name -> tensor or array.
        path: of the file, for the message.

    Raises:
        ValueError: a NaN or an infinite number; the message names the file and the parameters.
    """
    if names := find_not_finite(state):
        raise UserError(
            f"{path}: {list_names(names)}: not finite (NaN or infinite numbers); the training that wrote this file has diverged, "
            "take an earlier checkpoint"
        )


def _is_finite(value) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "fc" or bool(np.isfinite(value).all())
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return bool(value.isfinite().all())
    return True


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which neither writes nor reads numbers that are not finite, and never leaves half a file.

    Where `last_checkpoint` is empty or names a file that is cut or gone, it resumes from the latest whole checkpoint in the folder, and
    says so.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str = "", **options):
        """
        Args:
            model, save_dir, options: as Detectron2's checkpointer has them.
        """
        super().__init__(model, save_dir, **options)
        self.path_manager = _WholeFiles(self.path_manager)
        self._said = None

    def save(self, name: str, **extra) -> None:
        """
        Args:
            name: of the file, without its ending.
            extra: more to be saved, such as the iteration.

        Raises:
            FloatingPointError: a parameter is not finite; nothing is written. The message names it, and the iteration.
        """
        if self.save_dir and self.save_to_disk and (names := find_not_finite(self.model.state_dict())):
            at = f" at iteration {extra['iteration']}" if "iteration" in extra else ""
            raise FloatingPointError(
                f"training has diverged{at}: {list_names(names)}: not finite (NaN or infinite numbers); {name}.pth is not written, the "
                f"last checkpoint is {self.get_checkpoint_file() or 'none'}"
            )
        super().save(name, **extra)

    def has_checkpoint(self) -> bool:
        """Whether there is a whole checkpoint to resume from."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The file that `last_checkpoint` names, or if that is not whole the one of the latest iteration that is; "" if there is none."""
        if not super().has_checkpoint():
            return ""
        tagged = super().get_checkpoint_file()
        if "://" in tagged:
            # Storage elsewhere is not looked into: its files are written as a whole.
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
                # Not whole, or not of a training.
                continue
        latest = max(iterations, key=iterations.get, default="")
        self._say(
            f"{os.path.join(self.save_dir, 'last_checkpoint')} names {os.path.basename(tagged) or 'nothing'}, which cannot be read "
            f"({reason}): "
            + (f"resuming from {latest}, the latest whole checkpoint" if latest else "there is no whole checkpoint")
        )
        return latest

    def _say(self, message: str) -> None:
        # It is asked several times when a training is resumed.
        if message != self._said:
            self.logger.warning(message)
            self._said = message

    def _load_file(self, filename: str):
        loaded = read_checkpoint(filename, super()._load_file)
        check_finite(loaded["model"], filename)
        return loaded


def _read(path: str) -> dict:
    """What a checkpoint holds, its tensors not read before they are asked for."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


class _WholeFiles:
    """A path manager, whose local files appear when they are complete."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **options):
        if "w" not in mode or "://" in path:
            return self._path_manager.open(path, mode, **options)
        return _write_whole(path, mode, options)


@contextmanager
def _write_whole(path: str, mode: str, options: dict):
    with open_output(path) as file:
        if "b" in mode:
            yield file
        else:
            text = io.TextIOWrapper(file, **options)
            yield text
            text.flush()
            # The file is closed where it was opened.
            text.detach()
