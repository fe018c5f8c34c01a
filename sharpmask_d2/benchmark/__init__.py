"""What a forward pass costs, stage by stage, and the least it could cost on the machine."""

from .drawing import draw_boxes, draw_image, draw_objects, draw_proposals
from .limits import best_rates, count_operations
from .memory import forget_peak, peak_megabytes
from .proposals import ProposalRun
from .stages import STAGES, StageClock

__all__ = [
    "STAGES",
    "ProposalRun",
    "StageClock",
    "best_rates",
    "count_operations",
    "draw_boxes",
    "draw_image",
    "draw_objects",
    "draw_proposals",
    "forget_peak",
    "peak_megabytes",
]
