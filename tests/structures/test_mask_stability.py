"""Stability of masks against bitmaps at both thresholds, and its effect on the order of proposals."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util
from sharpmask_d2.inference.predictor import ProposalPredictor
from sharpmask_d2.structures import WindowMasks, build_proposals
from sharpmask_d2.structures.mask_stability import mask_stability


def cones(peaks: list, threshold: float = 0.0, side: int = 56) -> WindowMasks:
    """Round masks side by side, whose logits fall by 2 per 8 pixels from the centre; a cell is one pixel."""
    at = torch.arange(side) + 0.5 - side / 2
    distance = (at[:, None] ** 2 + at**2).sqrt()
    logits = torch.stack([peak - distance / 4 for peak in peaks])
    left = torch.arange(len(peaks)) * float(side)
    windows = torch.stack([left, torch.zeros_like(left), left + side, torch.full_like(left, side)], dim=1)
    return WindowMasks(logits, windows, (side, side * len(peaks)), threshold=threshold)


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stability_is_the_iou_of_the_bitmaps_at_both_thresholds(margin, dtype):
    masks = cones([2.0, 3.0, 4.5], threshold=-0.6)
    masks = WindowMasks(masks.logits.to(dtype), masks.windows, masks.image_size, threshold=masks.threshold)
    both = [
        WindowMasks(masks.logits, masks.windows, masks.image_size, threshold=masks.threshold + shift).rle()
        for shift in (margin, -margin)
    ]
    expected = mask_util.iou(*both, [0] * len(masks)).diagonal()
    assert expected.min() < 0.9
    # Pixel centres are cell centres here, so that bitmaps and grids have equal areas.
    torch.testing.assert_close(mask_stability(masks, margin=margin), torch.tensor(expected).float())


def test_stability_of_a_cone_is_the_quotient_of_two_circles():
    # The radii at which the logit is 1 and -1 are proportional to peak - 1 and peak + 1.
    found = mask_stability(cones([2.0, 4.0, 5.5]))
    assert found.tolist() == pytest.approx([1 / 9, 9 / 25, 81 / 169], abs=0.02)


def test_masks_without_a_certain_cell_come_last():
    masks = cones([5.0, 0.5, -5.0])
    found = mask_stability(masks)
    assert found.tolist() == pytest.approx([4 / 9, 1e-3, 1e-3], abs=0.02)
    assert mask_stability(masks[:0]).shape == (0,)
    proposals = build_proposals(torch.tensor([-3.0, 2.0, 3.0]), masks, nms_thresh=1.0, stability=True)
    # The second mask has pixels but no certain one; the third has none.
    assert proposals.proposal_masks.windows[:, 0].tolist() == [0, 56]
    assert proposals.objectness_logits.isfinite().all()


@pytest.mark.parametrize("mask_nms", [False, True])
def test_an_uncertain_mask_is_ranked_behind_a_certain_one(mask_nms):
    masks, scores = cones([2.0, 5.0, 4.0]), torch.tensor([1.0, 0.9, -4.0])
    plain = build_proposals(scores, masks, nms_thresh=1.0, mask_nms=mask_nms)
    reordered = build_proposals(scores, masks, nms_thresh=1.0, stability=True, mask_nms=mask_nms)
    assert plain.proposal_masks.windows[:, 0].tolist() == [0, 56, 112]
    assert reordered.proposal_masks.windows[:, 0].tolist() == [56, 0, 112]
    assert torch.equal(reordered.proposal_boxes.tensor, reordered.proposal_masks.boxes().tensor)
    expected = scores.sigmoid() * mask_stability(masks)
    torch.testing.assert_close(reordered.objectness_logits.sigmoid(), expected[[1, 0, 2]], atol=1e-5, rtol=1e-4)


def test_scores_that_are_not_finite_are_left_out():
    masks = cones([4.0] * 3)
    scores = torch.tensor([2.0, math.nan, -math.inf])
    proposals = build_proposals(scores, masks, nms_thresh=1.0, stability=True)
    assert proposals.proposal_masks.windows[:, 0].tolist() == [0]


def test_the_key_lowers_scores_on_image_pyramids(tiny_cfg):
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    found = []

    def drawn(grid, images, ys, xs, *, windows_per_batch):
        for batch in (ys + xs).split(windows_per_batch):
            yield cones([2.0 + number % 4 for number in batch.tolist()]).logits

    for tiny_cfg.MODEL.SHARPMASK.TEST.MASK_STABILITY in (False, True):
        torch.manual_seed(0)
        predictor = ProposalPredictor(tiny_cfg)
        predictor.model.pyramid.network.mask_batches = drawn
        proposals = predictor(image)
        windows = [tuple(window) for window in proposals.proposal_masks.windows.tolist()]
        probabilities = proposals.objectness_logits.double().sigmoid()
        if not tiny_cfg.MODEL.SHARPMASK.TEST.MASK_STABILITY:
            stability = mask_stability(proposals.proposal_masks)
            assert stability.max() - stability.min() > 0.1
            probabilities = probabilities * stability
        found.append(dict(zip(windows, probabilities.tolist())))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_the_same_cells():
    masks = cones([2.0, 3.0, 4.5])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = mask_stability(masks.to("cuda"))
    torch.testing.assert_close(found.cpu(), mask_stability(masks))
