"""Writes the two graphs as ONNX files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..extras import EXPORT, import_extra
from .graphs import DecoderGraph, EncoderGraph, dynamic_shapes
from .inputs import example_inputs

# The operators of later versions are not needed, and older runtimes lack them.
_OPSET = 20


def write_onnx(
    encoder: EncoderGraph,
    decoder: DecoderGraph,
    folder: Path,
    calibration: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Writes encoder.onnx and decoder.onnx.

    Args:
        encoder, decoder: with the layout "atlas".
        folder: that exists.
        calibration: not read, because there are no int8 graphs in ONNX.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    for name in ("onnx", "onnxscript"):
        import_extra(name, requirement=EXPORT)
    for name, graph, inputs in zip(("encoder", "decoder"), (encoder, decoder), example_inputs(encoder)):
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
