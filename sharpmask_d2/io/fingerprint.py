"""What the results of a run depend on, in a form in which two runs can be compared."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import Union

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager


def digest_file(path: Union[str, os.PathLike]) -> str:
    """32 hexadecimal digits that differ where the content of files does."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def config_settings(cfg: CfgNode) -> dict:
    """All keys of a config as nested dicts of plain values; weights count by what the file holds, wherever it lies.

    Weights that are not given are random: they are those of no other run.
    """
    settings = yaml.safe_load(cfg.dump())
    _digest_weights(settings)
    if not cfg.MODEL.WEIGHTS:
        settings["MODEL"]["WEIGHTS"] = f"random {uuid.uuid4().hex}"
    return settings


def _digest_weights(settings: dict) -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            _digest_weights(value)
        elif key == "WEIGHTS" and isinstance(value, str) and value:
            # Behind "?", Detectron2 takes options.
            path = Path(PathManager.get_local_path(value.split("?")[0]))
            # What is missing is an error of whoever loads it.
            settings[key] = f"content {digest_file(path)}" if path.is_file() else value


def changed_settings(old, new, *, at: str = "") -> list:
    """What differs between nested dicts, such as ["INPUT.MIN_SIZE_TEST was 480 and is 640"]."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in dict.fromkeys([*old, *new]):
            changes += changed_settings(old.get(key), new.get(key), at=f"{at}.{key}" if at else str(key))
        return changes
    return [] if old == new else [f"{at} was {_short(old)} and is {_short(new)}"]


def _short(value) -> str:
    text = "not set" if value is None else str(value) or '""'
    return text if len(text) <= 60 else text[:57] + "..."
