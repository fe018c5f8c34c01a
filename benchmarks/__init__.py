"""Time and memory of a forward pass, a training step and the evaluation of proposals, and their lower limits on the machine."""

from .detector import time_detector
from .drawing import draw_boxes, draw_image, draw_objects, draw_proposals
from .encoding import time_encoding
from .growth import measure_growth, plot_growth
from .limits import best_rates, count_operations
from .memory import forget_peak, peak_megabytes
from .photographs import time_photographs
from .proposals import ProposalRun
from .runtimes import time_runtimes
from .sampler import time_sampler
from .stages import STAGES, StageClock
from .training import TrainingRun
from .turns import in_turn

__all__ = [
    "STAGES",
    "ProposalRun",
    "StageClock",
    "TrainingRun",
    "best_rates",
    "count_operations",
    "draw_boxes",
    "draw_image",
    "draw_objects",
    "draw_proposals",
    "forget_peak",
    "in_turn",
    "measure_growth",
    "peak_megabytes",
    "plot_growth",
    "time_detector",
    "time_encoding",
    "time_photographs",
    "time_runtimes",
    "time_sampler",
]
