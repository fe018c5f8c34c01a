"""From images to proposals and detections: predictors for single images and runs over folders."""

from .predictor import DetectionPredictor, ProposalPredictor

__all__ = ["DetectionPredictor", "ProposalPredictor"]
