"""Describes what the results of a run depend on, so that two runs can be compared."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def digest_file(path: Union[str, os.PathLike]) -> str:
    """A digest of a file's content.

    Args:
        path: of the file.

    Returns:
        32 hexadecimal digits, which differ where the content of files differs.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def config_settings(cfg: "CfgNode") -> dict[str, Any]:
    """All settings of a config in a form that can be compared.

    Args:
        cfg: the config.

    Returns:
        Nested dicts of plain values. The value of a key WEIGHTS is the digest of the file's content, so that a file may move. If
        MODEL.WEIGHTS is empty, weights are random and the value differs in every call.
    """
    # Runs without a config need no yaml.
    import yaml

    settings = yaml.safe_load(cfg.dump())
    _digest_weights(settings)
    if not cfg.MODEL.WEIGHTS:
        settings["MODEL"]["WEIGHTS"] = f"random {uuid.uuid4().hex}"
    return settings


def _digest_weights(settings: dict[str, Any]) -> None:
    from detectron2.utils.file_io import PathManager

    for key, value in settings.items():
        if isinstance(value, dict):
            _digest_weights(value)
        elif key == "WEIGHTS" and isinstance(value, str) and value:
            # Detectron2 reads options after "?".
            path = Path(PathManager.get_local_path(value.split("?")[0]))
            # A missing file is an error where it is loaded.
            settings[key] = f"content {digest_file(path)}" if path.is_file() else value


def changed_settings(old: Any, new: Any, *, at: str = "") -> list[str]:
    """The differences between two settings.

    Args:
        old, new: nested dicts of plain values.
        at: key under which both lie in the whole settings; none by default.

    Returns:
        One text per difference, such as "INPUT.MIN_SIZE_TEST was 480 and is 640".
    """
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in dict.fromkeys([*old, *new]):
            changes += changed_settings(old.get(key), new.get(key), at=f"{at}.{key}" if at else str(key))
        return changes
    return [] if old == new else [f"{at} was {_short(old)} and is {_short(new)}"]


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value) or '""'
    return text if len(text) <= 60 else text[:57] + "..."
