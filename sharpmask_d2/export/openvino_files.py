"""Writes the two graphs in the format of OpenVINO, in float32 or with int8 layers."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..extras import EXPORT, import_extra
from .calibration import CalibrationImage
from .graphs import DecoderGraph, EncoderGraph, dynamic_shapes

# Positions of the decoder's inputs whose first dimension is a number of windows.
_WINDOWS = (4, 5)


def write_openvino(
    encoder: EncoderGraph,
    decoder: DecoderGraph,
    example: CalibrationImage,
    folder: Path,
    calibration: Sequence[CalibrationImage] = (),
) -> None:
    """Writes encoder.xml, decoder.xml and their .bin files.

    Args:
        encoder, decoder: with the layout "rows".
        example: inputs to trace the graphs with.
        folder: that exists.
        calibration: images to measure the ranges of int8 values on; none writes float32 graphs.

    Raises:
        UserError: openvino, or for int8 nncf, is not installed.
    """
    openvino, passes = (import_extra(name, requirement=EXPORT) for name in ("openvino", "openvino.passes"))
    for name, graph, inputs in (("encoder", encoder, example.encoder), ("decoder", decoder, example.decoder)):
        program = torch.export.export(graph, inputs, dynamic_shapes=dynamic_shapes(graph))
        model = openvino.convert_model(program)
        # Weights that are computed from parameters become constants, which can be quantised.
        manager = passes.Manager()
        manager.register_pass(passes.ConstantFolding())
        manager.run_passes(model)
        if calibration:
            model = _with_int8(model, name, [getattr(image, name) for image in calibration])
        openvino.save_model(model, str(folder / f"{name}.xml"), compress_to_fp16=False)


def _with_int8(model: Any, name: str, inputs: Sequence[tuple[torch.Tensor, ...]]) -> Any:
    """A graph whose convolutions and linear layers compute in int8, with a scale per channel."""
    nncf = import_extra("nncf", requirement=EXPORT)
    nncf.set_log_level(logging.ERROR)
    if name == "decoder":
        # Inputs with numbers of windows of their own do not count: the sampling operator needs fixed numbers.
        shapes = [tuple(inputs[0][i].shape) for i in _WINDOWS]
        inputs = [x for x in inputs if [tuple(x[i].shape) for i in _WINDOWS] == shapes]
        model.reshape(dict(zip(_WINDOWS, map(list, shapes))))
    settings = nncf.AdvancedQuantizationParameters(
        # Weights of seven bits, because products of eight bits overflow on processors without VNNI.
        overflow_fix=nncf.OverflowFix.ENABLE
    )
    model = nncf.quantize(
        model,
        nncf.Dataset([[x.numpy() for x in tensors] for tensors in inputs]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(inputs),
        advanced_parameters=settings,
        ignored_scope=nncf.IgnoredScope(names=_positions(model), validate=False),
    )
    if name == "decoder":
        model.reshape({i: [-1, 4] for i in _WINDOWS})
    return model


def _positions(model: Any) -> list[str]:
    """Names of the operations that compute where features are sampled: their numbers are coordinates and have to stay exact."""
    names: set[str] = set()
    outputs = [
        value.get_source_output()
        for operation in model.get_ops()
        if operation.get_type_name().startswith("EmbeddingBag")
        for value in operation.inputs()[1:]
    ]
    while outputs:
        node = outputs.pop().get_node()
        name = node.get_friendly_name()
        if node.get_type_name() not in ("Constant", "Parameter") and name not in names:
            names.add(name)
            outputs += [value.get_source_output() for value in node.inputs()]
    return sorted(names)
