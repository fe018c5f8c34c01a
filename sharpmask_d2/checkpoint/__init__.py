from . import paths  # noqa: F401  (registers sharpmask_d2://)
from .package import load_state, pack, save_packed
from .safe import SafeCheckpointer, check_finite
from .strict import StrictCheckpointer

__all__ = ["SafeCheckpointer", "StrictCheckpointer", "check_finite", "load_state", "pack", "save_packed"]
