"""Reads, checks, packs and writes checkpoints."""

from . import paths  # noqa: F401  (registers sharpmask_d2://)
from .package import pack, save_packed
from .read import read_checkpoint
from .safe import SafeCheckpointer, check_finite
from .strict import StrictCheckpointer

__all__ = ["SafeCheckpointer", "StrictCheckpointer", "check_finite", "pack", "read_checkpoint", "save_packed"]
