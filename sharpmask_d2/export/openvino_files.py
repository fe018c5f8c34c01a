"""Writes the two graphs in the format of OpenVINO, in float32 or with an encoder in int8."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import EXPORT, import_extra
from .graphs import DecoderGraph, EncoderGraph, dynamic_shapes
from .inputs import example_inputs


def write_openvino(
    encoder: EncoderGraph,
    decoder: DecoderGraph,
    folder: Path,
    calibration: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Writes encoder.xml, decoder.xml and their .bin files.

    Args:
        encoder, decoder: with the layout "rows".
        folder: that exists.
        calibration: inputs of the encoder for images to measure the ranges of int8 values on; none writes float32 graphs.

    Raises:
        UserError: openvino, or for int8 nncf, is not installed.
    """
    openvino = import_extra("openvino", requirement=EXPORT)
    for name, graph, inputs in zip(("encoder", "decoder"), (encoder, decoder), example_inputs(encoder)):
        program = torch.export.export(graph, inputs, dynamic_shapes=dynamic_shapes(graph))
        model = openvino.convert_model(program)
        if calibration and name == "encoder":
            model = _with_int8(model, calibration)
        openvino.save_model(model, str(folder / f"{name}.xml"), compress_to_fp16=False)


def _with_int8(encoder: Any, images: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """The encoder with int8 convolutions, with a scale per channel of each weight.

    Depthwise convolutions stay in float32: in int8 they cost 0.5 points of AR@1000. So does the decoder, whose int8 convolutions cost 0.1
    to 0.2 points more.
    """
    nncf = import_extra("nncf", requirement=EXPORT)
    nncf.set_log_level(logging.ERROR)
    return nncf.quantize(
        encoder,
        nncf.Dataset([[x.numpy() for x in inputs] for inputs in images]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
        # Weights of seven bits: products of eight bits overflow on processors without VNNI, which costs 3 points of AR.
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        ignored_scope=nncf.IgnoredScope(types=["GroupConvolution"]),
    )
