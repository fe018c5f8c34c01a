"""Matrix NMS against loops, and overlaps of masks against pycocotools."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import math

import pytest
import torch
from pycocotools import mask as mask_util
from sharpmask_d2.structures import WindowMasks, build_proposals
from sharpmask_d2.structures.mask_nms import log_to_logit, mask_overlaps, matrix_nms


def drawn_masks(image_size: tuple, count: int = 12) -> WindowMasks:
    """Smooth blobs of many sizes, some of which overlap."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.nn.functional.interpolate(
        torch.randn(count, 1, 4, 4, generator=generator) * 4, size=(14, 14), mode="bilinear"
    )[:, 0]
    height, width = image_size
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.5
    sides = (0.2 + 0.4 * torch.rand(count, 1, generator=generator)) * width
    return WindowMasks(logits, torch.cat([corners, corners + sides], dim=1), image_size)


def test_overlaps_of_a_small_image_equal_those_of_pycocotools():
    masks = drawn_masks((64, 80))
    rles = masks.rle()
    expected = torch.from_numpy(mask_util.iou(rles, rles, [0] * len(rles))).float()
    assert (expected > 0.2).sum() > len(masks)
    torch.testing.assert_close(mask_overlaps(masks), expected)


def test_overlaps_of_a_large_image_are_close_to_those_of_pycocotools():
    masks = drawn_masks((480, 640))
    rles = masks.rle()
    expected = torch.from_numpy(mask_util.iou(rles, rles, [0] * len(rles))).float()
    assert (mask_overlaps(masks) - expected).abs().max() < 0.06


@pytest.mark.parametrize("count", [1, 2, 7, 130])
def test_overlaps_do_not_depend_on_autocast(count):
    masks = drawn_masks((300, 400), count)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mask_overlaps(masks)
    assert found.dtype == torch.float32
    bitmaps = masks.scale(0.2, 0.2, (60, 80)).paste().flatten(1).double()
    shared = bitmaps @ bitmaps.T
    union = bitmaps.sum(1)[:, None] + bitmaps.sum(1) - shared
    torch.testing.assert_close(found.double(), shared / union.clamp(min=1), atol=1e-6, rtol=0)


def test_masks_without_a_pixel_overlap_nothing():
    masks = drawn_masks((80, 100), 3)
    empty = WindowMasks(torch.full_like(masks.logits, -9.0), masks.windows, masks.image_size)
    assert not mask_overlaps(empty).any()
    assert mask_overlaps(masks[torch.zeros(3, dtype=torch.bool)]).shape == (0, 0)


def decayed_slowly(probabilities: list, overlaps, sigma: float) -> list:
    """Equations 4 and 5 of SOLOv2 in loops over pairs."""
    result = []
    for j, probability in enumerate(probabilities):
        factor = 1.0
        for i in range(j):
            lowering = math.exp(-sigma * overlaps[i][j] ** 2)
            own = min([math.exp(-sigma * overlaps[k][i] ** 2) for k in range(i)], default=1.0)
            factor = min(factor, lowering / own)
        result.append(probability * factor)
    return result


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_scores_equal_those_of_loops_over_pairs(sigma):
    generator = torch.Generator().manual_seed(0)
    overlaps = torch.rand(9, 9, generator=generator)
    overlaps = (overlaps + overlaps.T) / 2
    scores = torch.randn(9, generator=generator).sort(descending=True).values
    expected = decayed_slowly(scores.double().sigmoid().tolist(), overlaps.double().tolist(), sigma)
    found = matrix_nms(scores, overlaps, sigma=sigma).sigmoid()
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-5, rtol=1e-4)
    assert len(matrix_nms(scores[:0], overlaps[:0, :0])) == 0


def test_logits_are_recovered_from_log_probabilities():
    logits = torch.linspace(-20, 10, 31)
    torch.testing.assert_close(log_to_logit(torch.nn.functional.logsigmoid(logits)), logits, atol=2e-2, rtol=1e-3)


def test_a_duplicate_is_ranked_behind_other_objects_and_kept():
    logits = torch.full((3, 14, 14), 5.0)
    windows = torch.tensor([[10.0, 10, 50, 50], [11, 10, 51, 50], [60, 10, 95, 50]])
    scores = torch.tensor([3.0, 2.0, 1.0])
    masks = WindowMasks(logits, windows, (80, 100))
    plain = build_proposals(scores, masks, nms_thresh=1.0)
    lowered = build_proposals(scores, masks, nms_thresh=1.0, mask_nms=True)
    assert plain.proposal_boxes.tensor[:, 0].tolist() == [10, 11, 60]
    assert lowered.proposal_boxes.tensor[:, 0].tolist() == [10, 60, 11]
    assert lowered.proposal_masks.windows[:, 0].tolist() == [10, 60, 11]
    assert lowered.objectness_logits[:2].tolist() == pytest.approx([3.0, 1.0], abs=1e-3)
    assert lowered.objectness_logits[2] < 0


def test_empty_masks_and_scores_that_are_not_finite_are_left_out():
    logits = torch.full((3, 14, 14), 5.0)
    logits[1] = -5
    windows = torch.tensor([[10.0, 10, 50, 50], [11, 10, 51, 50], [60, 10, 95, 50]])
    masks = WindowMasks(logits, windows, (80, 100))
    for scores, left in ((torch.tensor([3.0, 2.0, 1.0]), [10, 60]), (torch.tensor([3.0, 2.0, math.nan]), [10])):
        for mask_nms in (False, True):
            proposals = build_proposals(scores, masks, nms_thresh=1.0, mask_nms=mask_nms)
            assert proposals.proposal_boxes.tensor[:, 0].tolist() == left
