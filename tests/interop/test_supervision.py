"""Masks as detections of supervision."""

import sys

import numpy as np
import pytest
import torch
from labelled import SIZE, read_drawn
from sharpmask_d2.errors import UserError
from sharpmask_d2.interop.supervision import proposals_to_detections, to_detections
from sharpmask_d2.structures import WindowMasks, build_proposals


@pytest.fixture(scope="module")
def supervision():
    return pytest.importorskip("supervision", reason="needs supervision")


@pytest.fixture
def content(tmp_path):
    return read_drawn(tmp_path)


@pytest.mark.parametrize("compact", [True, False])
def test_masks_boxes_and_scores(supervision, content, compact):
    detections = to_detections(content.images[0], compact=compact)
    assert isinstance(detections, supervision.Detections)
    bitmaps = np.array([mask.tight().paste(SIZE) for mask in content.images[0].masks])
    assert np.array_equal(np.asarray(detections.mask), bitmaps)
    assert detections.xyxy.tolist() == [list(mask.tight().box) for mask in content.images[0].masks]
    assert detections.confidence.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert set(detections.class_id) == {1}
    assert np.array_equal(np.asarray(detections[detections.confidence < 0.75].mask), bitmaps[2:])
    image = np.zeros((*SIZE, 3), np.uint8)
    drawn = supervision.MaskAnnotator().annotate(image.copy(), detections)
    assert np.array_equal(drawn.any(axis=2), bitmaps.any(axis=0))


def test_an_image_without_masks(supervision, content):
    assert len(to_detections(content.images[2])) == 0


def test_proposals(supervision):
    generator = torch.Generator().manual_seed(0)
    windows = torch.tensor([[0.0, 0, 40, 40], [20, 10, 60, 50], [-10, -10, 30, 30]])
    masks = WindowMasks(torch.randn(3, 8, 8, generator=generator), windows, SIZE)
    proposals = build_proposals(torch.tensor([2.0, 1, 0]), masks, nms_thresh=1)
    detections = proposals_to_detections(proposals)
    assert np.array_equal(np.asarray(detections.mask), masks.to_numpy())
    assert detections.confidence.tolist() == pytest.approx(torch.tensor([2.0, 1, 0]).sigmoid().tolist())
    assert len(proposals_to_detections(proposals[:0])) == 0


def test_without_supervision_an_error_names_the_extra(content, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"supervision is not installed: run pip install 'sharpmask_d2\[interop\]'"):
        to_detections(content.images[0])
