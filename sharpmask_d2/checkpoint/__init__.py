from . import paths  # noqa: F401  (registers sharpmask_d2://)
from .package import pack
from .strict import StrictCheckpointer

__all__ = ["StrictCheckpointer", "pack"]
