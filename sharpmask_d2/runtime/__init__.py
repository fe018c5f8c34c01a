"""Runs exported models with numpy and onnxruntime or OpenVINO, without torch and without Detectron2."""

from .predictor import Predictor
from .proposals import Masks, Proposals

__all__ = ["Masks", "Predictor", "Proposals"]
