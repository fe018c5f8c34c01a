from .package import pack
from .strict import StrictCheckpointer

__all__ = ["StrictCheckpointer", "pack"]
