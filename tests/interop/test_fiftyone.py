"""Masks as detections of FiftyOne, whose own functions turn them into bitmaps of the image."""

import sys

import numpy as np
import pytest
import torch
from labelled import SIZE, read_drawn
from sharpmask_d2.errors import UserError
from sharpmask_d2.interop.fiftyone import proposals_to_detections, to_detections
from sharpmask_d2.structures import WindowMasks, build_proposals


@pytest.fixture(scope="module")
def fiftyone():
    return pytest.importorskip("fiftyone", reason="needs FiftyOne")


def bitmap(detection) -> np.ndarray:
    """The mask in the image, by FiftyOne."""
    segmentation = detection.to_segmentation(frame_size=SIZE[::-1], target=255)
    return np.asarray(segmentation.mask) == 255


def test_masks_boxes_and_scores(fiftyone, tmp_path):
    content = read_drawn(tmp_path)
    found = to_detections(content.images[0], content.labels).detections
    for detection, mask in zip(found, content.images[0].masks):
        assert detection.label == "object"
        assert detection.confidence == mask.score
        assert np.array_equal(bitmap(detection), mask.tight().paste(SIZE))
    assert to_detections(content.images[2], content.labels).detections == []


def test_proposals(fiftyone):
    generator = torch.Generator().manual_seed(0)
    windows = torch.tensor([[0.0, 0, 40, 40], [20, 10, 60, 50], [-10, -10, 30, 30]])
    masks = WindowMasks(torch.randn(3, 8, 8, generator=generator), windows, SIZE)
    proposals = build_proposals(torch.tensor([2.0, 1, 0]), masks, nms_thresh=1)
    found = proposals_to_detections(proposals, label="thing").detections
    assert np.array_equal([bitmap(detection) for detection in found], masks.to_numpy())
    assert {detection.label for detection in found} == {"thing"}


def test_without_fiftyone_an_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    content = read_drawn(tmp_path)
    with pytest.raises(UserError, match="fiftyone is not installed: run pip install 'fiftyone'"):
        to_detections(content.images[0], content.labels)
