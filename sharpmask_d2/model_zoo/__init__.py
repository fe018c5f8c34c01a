"""Models that come with the package."""

from pathlib import Path

from detectron2.config import CfgNode

from ..config import read_config
from ..errors import UserError

_WEIGHTS = {
    # One file holds both: the detector classifies the proposals on the backbone that makes them.
    "sharpmask_bifpn_lite0": "bifpn_lite0.pth",
    "multipath_bifpn_lite0": "bifpn_lite0.pth",
    # One file holds both: SharpMask is the same network with another mask branch.
    "deepmask_lite0": "lite0.pth",
    "sharpmask_lite0": "lite0.pth",
}

DEFAULT = "sharpmask_bifpn_lite0"
DEFAULT_DETECTOR = "multipath_bifpn_lite0"

# Models of version 0.1 that are no longer packaged, and those that take their place.
_REPLACED = {
    "sharpmask_fpn_lite0": DEFAULT,
    "multipath_fpn_lite0": DEFAULT_DETECTOR,
    "multipath_lite0": DEFAULT_DETECTOR,
}


def names() -> list:
    """Names of the packaged models."""
    return sorted(_WEIGHTS)


def get(name: str = DEFAULT) -> CfgNode:
    """Config and weights of a packaged model.

    Args:
        name: one of `names()`.

    Returns:
        a config whose MODEL.WEIGHTS is the packaged file; MODEL.DEVICE is "cuda" where there is one, else "cpu".

    Raises:
        UserError: no such model; the message lists those there are, or names the one that takes its place.
    """
    if name in _REPLACED:
        raise UserError(f"{name!r} was packaged in version 0.1 only: {_REPLACED[name]!r} takes its place")
    if name not in _WEIGHTS:
        raise UserError(f"there is no packaged model {name!r}: choose from {names()}")
    folder = Path(__file__).parent
    cfg = read_config(str(folder / f"{name}.yaml"))
    cfg.MODEL.WEIGHTS = str(folder / _WEIGHTS[name])
    cfg.MODEL.DEVICE = device()
    return cfg


def device() -> str:
    """ "cuda" where there is one, else "cpu": where packaged models run."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
