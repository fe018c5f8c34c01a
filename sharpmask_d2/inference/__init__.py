"""From images to proposals, masks and detections: predictors for single images and runs over folders."""

from typing import TYPE_CHECKING

from ..lazy import load_when_asked

if TYPE_CHECKING:
    from .automatic_mask_generator import SharpMaskAutomaticMaskGenerator
    from .predictor import DetectionPredictor, ProposalPredictor
    from .prompt_predictor import SharpMaskPredictor

# Number formats that networks run in.
DTYPES = ("float32", "bfloat16")

__all__ = [
    "DTYPES",
    "DetectionPredictor",
    "ProposalPredictor",
    "SharpMaskAutomaticMaskGenerator",
    "SharpMaskPredictor",
]

# The classes of `__all__`. Modules that need neither torch nor Detectron2 are imported without the others.
__getattr__ = load_when_asked(
    __name__,
    {
        "automatic_mask_generator": ["SharpMaskAutomaticMaskGenerator"],
        "predictor": ["DetectionPredictor", "ProposalPredictor"],
        "prompt_predictor": ["SharpMaskPredictor"],
    },
)
