"""What a forward pass costs, stage by stage, and the least it could cost on the machine."""

from .limits import best_rates, count_operations
from .stages import STAGES, StageClock

__all__ = ["STAGES", "StageClock", "best_rates", "count_operations"]
