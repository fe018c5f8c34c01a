"""Training and evaluation on top of Detectron2's trainer."""

from .processes import join_processes
from .trainer import Trainer

__all__ = ["Trainer", "join_processes"]
