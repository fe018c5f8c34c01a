"""From images to proposals, masks and detections: predictors for single images and runs over folders."""

from .automatic_mask_generator import SharpMaskAutomaticMaskGenerator
from .predictor import DetectionPredictor, ProposalPredictor
from .prompt_predictor import SharpMaskPredictor

__all__ = ["DetectionPredictor", "ProposalPredictor", "SharpMaskAutomaticMaskGenerator", "SharpMaskPredictor"]
