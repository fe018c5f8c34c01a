from . import paths  # noqa: F401  (registers sharpmask_d2://)
from .package import pack, save_packed
from .strict import StrictCheckpointer

__all__ = ["StrictCheckpointer", "pack", "save_packed"]
