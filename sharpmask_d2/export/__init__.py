"""Exports models as graphs for other runtimes: ONNX and OpenVINO."""

from .export import FORMATS, export_model

__all__ = ["FORMATS", "export_model"]
