from .strict import StrictCheckpointer

__all__ = ["StrictCheckpointer"]
