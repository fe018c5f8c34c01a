"""Detectron2's ways to export a model, as its tools/deploy/export_model.py goes them: refused, and counting operations is not."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.analysis import FlopCountAnalysis
from drawing import to_small_detector
from test_feature_pyramid import detector_cfg, with_fpn

INPUTS = [{"image": torch.zeros(3, 64, 96)}]
KINDS = ["SharpMaskGenerator", "SharpMaskFPN", "SharpMaskProposalNetwork", "SegmentProposalNetwork"]


@pytest.fixture
def model(tiny_cfg, request):
    """A small model that has or is one of `KINDS`; its detections have no masks, as those of boxes alone."""
    cfg, kind = tiny_cfg, request.param
    cfg.MODEL.SHARPMASK.TEST.SCALES = [0.0]
    if kind == "SharpMaskGenerator":
        to_small_detector(cfg, roi_heads="StandardROIHeads", num_classes=2)
    elif kind != "SharpMaskProposalNetwork":
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMaskFPN"
        with_fpn(cfg)
        if kind == "SharpMaskFPN":
            detector_cfg(cfg, "StandardROIHeads")
            cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        else:
            cfg.MODEL.META_ARCHITECTURE = "SegmentProposalNetwork"
    torch.manual_seed(0)
    return build_model(cfg).eval(), kind


def detect(model, inputs) -> list:
    """What export_model.py calls of a detector: raw detections."""
    if not hasattr(model, "roi_heads"):
        return [{"boxes": x["proposals"].proposal_boxes} for x in model(inputs)]
    return [{"boxes": x.pred_boxes} for x in model.inference(inputs, do_postprocess=False)]


@pytest.mark.parametrize("model", KINDS, indirect=True)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_is_refused(model):
    model, kind = model
    adapter = TracingAdapter(model, INPUTS, detect)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=f"{kind} cannot be exported: traced or scripted"):
        torch.jit.trace(adapter, adapter.flattened_inputs)
    # It runs as before.
    with torch.no_grad():
        assert len(detect(model, INPUTS)) == 1


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_scripting_is_refused(model):
    model, kind = model
    fields = {"proposal_boxes": Boxes, "objectness_logits": torch.Tensor, "pred_boxes": Boxes, "scores": torch.Tensor}
    with pytest.raises(NotImplementedError, match=f"{kind} cannot be exported: traced or scripted"):
        scripting_with_instances(model, fields)


@pytest.mark.parametrize("model", ["SharpMaskProposalNetwork", "SharpMaskFPN"], indirect=True)
def test_operations_can_be_counted(model):
    model, _ = model
    counted = FlopCountAnalysis(model, INPUTS).unsupported_ops_warnings(False).tracer_warnings("none")
    assert counted.total() > 0
