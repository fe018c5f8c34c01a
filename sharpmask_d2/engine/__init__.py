"""Training and evaluation on top of Detectron2's trainer."""

from .trainer import Trainer

__all__ = ["Trainer"]
