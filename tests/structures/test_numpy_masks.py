"""Window masks as arrays, polygons and cut-outs; crops to boxes and pasted logits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_utils
from sharpmask_d2.structures import WindowMasks
from sharpmask_d2.structures.expected_iou import expected_iou

SIZE = (50, 70)


@pytest.fixture
def masks():
    """Five smooth random masks, of which the last is empty."""
    generator = torch.Generator().manual_seed(0)
    logits = F.interpolate(torch.randn(5, 1, 4, 4, generator=generator), (14, 14), mode="bicubic")[:, 0] * 4
    logits[4] = -5
    windows = torch.tensor(
        [[5.0, 4, 45, 44], [-10, -8, 30, 32], [40, 20, 90, 70], [20.5, 10.25, 31, 20.75], [0, 0, 20, 20]]
    )
    return WindowMasks(logits, windows, SIZE)


def test_arrays_are_the_bitmaps(masks):
    assert masks.to_numpy().dtype == bool
    assert np.array_equal(masks.to_numpy(), masks.paste().numpy())
    assert masks[:0].to_numpy().shape == (0, *SIZE)


@pytest.mark.parametrize(("tolerance", "least"), [(0.0, 1.0), (0.5, 0.95), (1.0, 0.85)])
def test_polygons_fill_the_masks(masks, tolerance, least):
    outlines = masks.polygons(tolerance=tolerance)
    assert outlines[4] == []
    for polygons, bitmap in zip(outlines[:4], masks.to_numpy()):
        rle = mask_utils.merge(mask_utils.frPyObjects(polygons, *SIZE))
        filled = mask_utils.decode(rle).astype(bool)
        assert (filled & bitmap).sum() / (filled | fill_holes(bitmap)).sum() >= least - holes(bitmap) / bitmap.sum()
    with pytest.raises(ValueError, match="tolerance"):
        masks.polygons(tolerance=-1)


def fill_holes(bitmap):
    """The mask and what it encloses, by a flood from outside through edges."""
    outside = np.zeros(np.add(bitmap.shape, 2), bool)
    outside[0] = True
    blocked = np.pad(bitmap, 1)
    while True:
        grown = outside.copy()
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            grown |= np.roll(outside, shift, axis)
        grown &= ~blocked
        if np.array_equal(grown, outside):
            return ~outside[1:-1, 1:-1]
        outside = grown


def holes(bitmap) -> int:
    return int((fill_holes(bitmap) & ~bitmap).sum())


def test_polygons_of_parts_thin_and_small():
    logits = torch.full((1, 8, 8), -9.0)
    logits[0, 1, 1] = logits[0, 4:7, 3] = 9
    masks = WindowMasks(logits, torch.tensor([[0.0, 0, 8, 8]]), (8, 8), threshold=0)
    (polygons,) = masks.polygons()
    assert len(polygons) == 2
    filled = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, 8, 8)))
    assert np.array_equal(filled, masks.to_numpy()[0])


def test_cut_outs_are_transparent_outside_of_the_mask(masks):
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    crops = masks.crops(image)
    for crop, bitmap in zip(crops[:4], masks.to_numpy()):
        ys, xs = np.nonzero(bitmap)
        part = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        assert np.array_equal(crop[:, :, :3], image[part])
        assert np.array_equal(crop[:, :, 3], 255 * bitmap[part])
    assert crops[4].shape == (0, 0, 4)
    with pytest.raises(ValueError, match=r"shape \(50, 70, 3\)"):
        masks.crops(image[1:])


def test_crops_to_boxes_end_at_the_boxes(masks):
    boxes = torch.tensor([[10.0, 10, 30, 40], [-50, -50, 90, 90], [0, 0, 10, 10], [22, 12, 28, 18], [0, 0, 9, 9]])
    cropped, whole = masks.crop(boxes).to_numpy(), masks.to_numpy()
    for mask, full, (x0, y0, x1, y1) in zip(cropped, whole, boxes.clamp(min=0).int().tolist()):
        inside = np.zeros(SIZE, bool)
        inside[y0:y1, x0:x1] = True
        assert not mask[~inside].any()
        assert (mask == full)[inside].mean() > 0.97
    assert not cropped[2].any()


def test_logits_of_pixels_decide_which_belong_to_the_mask(masks):
    logits = masks.paste_logits()
    assert logits.shape == (5, *SIZE)
    assert ((logits > masks.threshold) == masks.paste()).float().mean() > 0.9999
    assert torch.isneginf(logits[0, :4]).all()
    assert logits[0, 4:44, 5:45].isfinite().all()


def test_expected_iou_of_known_probabilities():
    logits = torch.tensor(
        [[[50.0, 50.0], [-50.0, -50.0]], [[math.log(3), -50.0], [-math.log(3), -50.0]], [[-9.0, -9]] * 2]
    )
    masks = WindowMasks(logits, torch.tensor([[0.0, 0, 4, 4]]).repeat(3, 1), SIZE, threshold=0)
    # The second: 3/4 of one cell, over that cell and 1/4 of another.
    assert expected_iou(masks).tolist() == pytest.approx([1, 0.75 / 1.25, 0], abs=1e-3)
