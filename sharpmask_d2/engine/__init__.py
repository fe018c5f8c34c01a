"""Training and evaluation in the manner of Detectron2."""

from .trainer import Trainer

__all__ = ["Trainer"]
