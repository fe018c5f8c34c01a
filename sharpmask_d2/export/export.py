"""Exports a model into a folder: an encoder, a decoder, and the file that a runner reads with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from torch import nn

from ..errors import UserError
from ..inference.configuration import build_config
from ..inference.image_files import list_inputs
from ..inference.predictor import load_model, prepare_image
from ..io.outputs import check_outputs
from ..runtime.model_file import ExportedModel
from .graphs import DecoderGraph, EncoderGraph, prepare_for_export
from .inputs import encoder_inputs

FORMATS = ("onnx", "openvino")


def export_model(
    *,
    output: str,
    to: str = "onnx",
    int8: bool = False,
    calibrate: Optional[Sequence[str]] = None,
    **config: Any,
) -> ExportedModel:
    """Exports a SharpMask on a feature pyramid.

    Args:
        output: folder to write; a missing one is created.
        to: one of `FORMATS`.
        int8: whether the encoder's convolutions compute in int8; with the format "openvino" only.
        calibrate: image files and folders from which the ranges of int8 values are measured; needed with `int8`.
        config: see `build_config`; `model` or `config_file` names the model.

    Returns:
        What was written to the folder's model.json.

    Raises:
        FileNotFoundError: an image does not exist.
        OutputError: the folder cannot be written.
        UserError: the config is not of a SharpMask on a feature pyramid, a library is not installed, or int8 without images or for ONNX.
    """
    if int8 and to != "openvino":
        raise UserError("--int8 needs --to openvino: int8 graphs in ONNX are slower than those in OpenVINO")
    if int8 and not calibrate:
        raise UserError("--int8 needs --calibrate with some 50 photographs: the ranges of values are measured on them")
    images = list_inputs(calibrate) if int8 and calibrate else []
    check_outputs({}, inputs=[config.get("config_file")], folders={"--output": output})
    cfg = build_config(**{**config, "opts": [*config.get("opts", ()), "MODEL.DEVICE", "cpu"]})
    if cfg.MODEL.META_ARCHITECTURE != "SegmentProposalNetwork" or cfg.MODEL.PROPOSAL_GENERATOR.NAME != "SharpMaskFPN":
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: only a SharpMask on a feature pyramid can be exported, a "
            "SegmentProposalNetwork whose MODEL.PROPOSAL_GENERATOR.NAME is SharpMaskFPN"
        )
    model = load_model(cfg)
    described = _describe(cfg, model, name=config.get("config_file") or config["model"], to=to, int8=int8)
    prepare_for_export(model)
    _write(model, cfg, Path(output), to, [image.path for image in images])
    # Last, so that a folder with this file is complete.
    described.write(output)
    return described


def _describe(cfg: CfgNode, model: nn.Module, *, name: str, to: str, int8: bool) -> ExportedModel:
    generator, test = model.proposal_generator, cfg.MODEL.SHARPMASK.TEST
    return ExportedModel(
        name=Path(name).stem,
        format=to,
        precision="int8" if int8 else "float32",
        channels=cfg.INPUT.FORMAT,
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
        size_divisibility=model.backbone.size_divisibility,
        strides=generator.strides,
        window_cells=generator.geometry.window_cells,
        mask_window=generator.mask_window,
        num_proposals=generator.num_proposals,
        num_refined=generator.num_refined,
        window_nms_thresh=generator.window_nms_thresh,
        nms_thresh=generator.nms_thresh,
        mask_threshold=test.MASK_THRESHOLD,
        mask_size=generator.decoder.mask_size,
        stability=generator.stability,
        mask_nms=generator.mask_nms,
    )


@torch.no_grad()
def _write(model: nn.Module, cfg: CfgNode, folder: Path, to: str, paths: Sequence[Path]) -> None:
    # The libraries of a format are loaded only if it is asked for.
    if to == "onnx":
        from .onnx_files import write_onnx as write

        layout = "atlas"
    else:
        from .openvino_files import write_openvino as write

        layout = "rows"
    encoder, decoder = EncoderGraph(model, layout).eval(), DecoderGraph(model, layout).eval()
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    resized = [prepare_image(str(path), resize, cfg)["image"].permute(1, 2, 0) for path in paths]
    calibration = [encoder_inputs(image, model.backbone.size_divisibility) for image in resized]
    write(encoder, decoder, folder, calibration)
