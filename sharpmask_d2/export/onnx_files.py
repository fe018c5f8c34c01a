"""Writes the two graphs as ONNX files."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..extras import EXPORT, import_extra
from .calibration import CalibrationImage
from .graphs import DecoderGraph, EncoderGraph, dynamic_shapes

# The operators of later versions are not needed, and older runtimes lack them.
_OPSET = 20


def write_onnx(
    encoder: EncoderGraph,
    decoder: DecoderGraph,
    example: CalibrationImage,
    folder: Path,
    calibration: Sequence[CalibrationImage] = (),
) -> None:
    """Writes encoder.onnx and decoder.onnx.

    Args:
        encoder, decoder: with the layout "atlas".
        example: inputs to trace the graphs with.
        folder: that exists.
        calibration: not read, because there are no int8 graphs in ONNX.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    for name in ("onnx", "onnxscript"):
        import_extra(name, requirement=EXPORT)
    for name, graph, inputs in (("encoder", encoder, example.encoder), ("decoder", decoder, example.decoder)):
        torch.onnx.export(
            graph,
            inputs,
            str(folder / f"{name}.onnx"),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(graph),
            input_names=graph.names[0],
            output_names=graph.names[1],
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
        )
