"""Tracing and scripting of models, as in Detectron2's tools/deploy/export_model.py, raise errors; operations can be counted."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.analysis import FlopCountAnalysis
from drawing import to_small_detector

INPUTS = [{"image": torch.zeros(3, 64, 96)}]
KINDS = ["SharpMaskGenerator", "SharpMaskFPN", "SharpMaskProposalNetwork", "SegmentProposalNetwork"]


@pytest.fixture
def model(tiny_cfg, request):
    """A small model that contains or is one of `KINDS`; its detections have no masks."""
    cfg, kind = tiny_cfg, request.param
    cfg.MODEL.SHARPMASK.TEST.SCALES = [0.0]
    if kind == "SharpMaskGenerator":
        to_small_detector(cfg, roi_heads="StandardROIHeads", num_classes=2)
    elif kind != "SharpMaskProposalNetwork":
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMaskFPN"
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH = 18
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 8
        cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        if kind == "SharpMaskFPN":
            to_small_detector(cfg, roi_heads="StandardROIHeads", num_classes=2)
            cfg.MODEL.PROPOSAL_GENERATOR.NAME = kind
            cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        else:
            cfg.MODEL.META_ARCHITECTURE = "SegmentProposalNetwork"
    torch.manual_seed(0)
    return build_model(cfg).eval(), kind


def detect(model, inputs) -> list:
    """Raw detections, as export_model.py computes them."""
    if not hasattr(model, "roi_heads"):
        return [{"boxes": x["proposals"].proposal_boxes} for x in model(inputs)]
    return [{"boxes": x.pred_boxes} for x in model.inference(inputs, do_postprocess=False)]


@pytest.mark.parametrize("model", KINDS, indirect=True)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_raises_an_error(model):
    model, kind = model
    adapter = TracingAdapter(model, INPUTS, detect)
    with (
        torch.no_grad(),
        pytest.raises(NotImplementedError, match=f"{kind} cannot be traced or scripted: .*`sharpmask export-model`"),
    ):
        torch.jit.trace(adapter, adapter.flattened_inputs)
    # The model still runs in Python.
    with torch.no_grad():
        assert len(detect(model, INPUTS)) == 1


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_scripting_raises_an_error(model):
    model, kind = model
    fields = {"proposal_boxes": Boxes, "objectness_logits": torch.Tensor, "pred_boxes": Boxes, "scores": torch.Tensor}
    with pytest.raises(NotImplementedError, match=f"{kind} cannot be traced or scripted: .*`sharpmask export-model`"):
        scripting_with_instances(model, fields)


@pytest.mark.parametrize("model", ["SharpMaskProposalNetwork", "SharpMaskFPN"], indirect=True)
def test_operations_can_be_counted(model):
    model, _ = model
    counted = FlopCountAnalysis(model, INPUTS).unsupported_ops_warnings(False).tracer_warnings("none")
    assert counted.total() > 0
