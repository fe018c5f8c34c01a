"""Masks, ranking and selection in numpy against those of torch, of pycocotools and of loops."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util
from sharpmask_d2.modeling.feature_pyramid import grid
from sharpmask_d2.modeling.proposal_generator.sharpmask_fpn import PyramidFeatures, SharpMaskFPN
from sharpmask_d2.runtime import selection
from sharpmask_d2.runtime.edges import boxes_and_areas, encode, fill
from sharpmask_d2.runtime.outlines import Outlines, pack
from sharpmask_d2.runtime.proposals import Masks, build_proposals
from sharpmask_d2.runtime.ranking import nms
from sharpmask_d2.structures import WindowMasks
from sharpmask_d2.structures import build_proposals as build_with_torch
from sharpmask_d2.windows.geometry import pyramid_sizes
from torchvision.ops import nms as nms_of_torchvision

THRESHOLD = math.log(0.35 / 0.65)
SIZES = [(97, 61), (64, 64), (40, 200), (1, 3), (128, 70), (480, 640)]


def draw_masks(size: tuple, *, side: int = 56, count: int = 60, seed: int = 0) -> WindowMasks:
    """Smooth blobs, with holes and several parts, in windows of all sizes that may reach out of the image; some masks are empty or full."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 1, 5, 5, generator=generator) * 3 + torch.randn(count, 1, 1, 1, generator=generator) * 2
    logits = torch.nn.functional.interpolate(logits, size=(side, side), mode="bilinear")[:, 0]
    logits[0], logits[1] = -5.0, 5.0
    height, width = size
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    sides = 2 + 1.2 * max(size) * torch.rand(count, 1, generator=generator) ** 2
    windows = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    windows[1] = torch.tensor([-5.0, -5.0, width + 5.0, height + 5.0])
    return WindowMasks(logits, windows, size, threshold=THRESHOLD)


def edges_of(masks: WindowMasks):
    logits = masks.logits.numpy()
    (bits,) = pack(logits, [masks.threshold])
    outlines = Outlines(logits, masks.threshold, bits)
    return outlines.edges(masks.windows.numpy(), masks.image_size, masks.image_size[0])


@pytest.mark.parametrize("side", [56, 28, 12])
@pytest.mark.parametrize("size", SIZES)
def test_masks_equal_those_of_torch(size, side):
    masks = draw_masks(size, side=side)
    edges = edges_of(masks)
    bitmaps, expected = fill(edges), masks.to_numpy()
    # A crossing may lie on the centre of a pixel but for rounding.
    assert (bitmaps != expected).sum() <= 2
    boxes, areas = boxes_and_areas(edges)
    assert (areas == bitmaps.sum((1, 2))).all()
    same = (bitmaps == expected).all((1, 2))
    assert (boxes[same] == masks.boxes().tensor.numpy()[same]).all()
    assert areas[0] == 0
    assert areas[1] == size[0] * size[1]


@pytest.mark.parametrize("size", SIZES)
def test_run_lengths_equal_those_of_pycocotools(size):
    edges = edges_of(draw_masks(size))
    bitmaps = np.asfortranarray(fill(edges).transpose(1, 2, 0).astype(np.uint8))
    expected = [{**rle, "counts": rle["counts"].decode()} for rle in mask_util.encode(bitmaps)]
    assert encode(edges) == expected
    assert len({rle["counts"] for rle in expected}) > 1


def test_chosen_masks_are_those_of_their_numbers():
    masks = Masks(edges_of(draw_masks((97, 61))))
    bitmaps, rles = masks.paste(), masks.rle()
    chosen = [7, 3, 0, 59, 3]
    assert (masks.paste(np.array(chosen)) == bitmaps[chosen]).all()
    assert masks[np.array(chosen)].rle() == [rles[i] for i in chosen]
    assert masks[-1].rle() == rles[-1:]
    assert len(masks[:0].rle()) == 0
    assert masks[bitmaps.any((1, 2))].areas().tolist() == bitmaps.sum((1, 2))[bitmaps.any((1, 2))].tolist()


def test_positions_beyond_32_bits_are_exact():
    # 60 masks of 6,000 x 8,000 pixels have more positions than an int32 can tell apart.
    masks = draw_masks((6000, 8000))
    edges = edges_of(masks)
    assert edges.positions.dtype == np.int64
    some = torch.tensor([5, 59])
    assert [x["counts"] for x in Masks(edges)[some.numpy()].rle()] == [x["counts"] for x in masks[some].rle()]


@pytest.mark.parametrize("thresh", [0.3, 0.6, 0.9])
def test_suppressed_boxes_are_those_of_torchvision(thresh):
    generator = torch.Generator().manual_seed(1)
    centres = torch.randint(0, 30, (800, 2), generator=generator).float() * 4
    sides = 10 * torch.randint(1, 6, (800, 2), generator=generator).float()
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    kept = torch.zeros(len(boxes), dtype=torch.bool)
    kept[nms_of_torchvision(boxes, -torch.arange(len(boxes)).float(), thresh)] = True
    assert 10 < kept.sum() < 790
    assert (nms(boxes.numpy(), thresh) == kept.numpy()).all()
    assert len(nms(boxes.numpy()[:0], thresh)) == 0


def draw_scores(size: tuple, strides: list, kinds: int, seed: int = 2) -> tuple[torch.Tensor, list]:
    """Scores of the windows of a padded image, smooth over the image as those of a network are; and (Y, X) of each level."""
    generator = torch.Generator().manual_seed(seed)
    sizes = pyramid_sizes(tuple(-(-side // 128) * 128 for side in size), strides)
    scores = []
    for (rows, columns), stride in zip(sizes, strides):
        grid = torch.randn(1, kinds, 12, 12, generator=generator)
        grid = torch.nn.functional.interpolate(grid, size=(rows, columns), mode="bicubic")[0]
        grid[:, -(-size[0] // stride) :], grid[:, :, -(-size[1] // stride) :] = -math.inf, -math.inf
        scores.append(grid.flatten())
    return torch.cat(scores), sizes


@pytest.mark.parametrize("thresh", [0.4, 0.6, 1.0])
@pytest.mark.parametrize("size", [(100, 380), (256, 128), (480, 640)])
def test_selected_windows_are_those_of_torch(size, thresh):
    strides, kinds = [4, 8, 16, 32, 64, 128], [5, 7]
    scores, sizes = draw_scores(size, strides, len(kinds))
    settings = {"window_nms_thresh": thresh, "mask_window": 1.2, "num_refined": 30}
    geometry = grid.PyramidWindows(strides=strides, window_cells=kinds, object_share=0.8)
    generator = SimpleNamespace(geometry=geometry, num_proposals=100, **settings)
    features = PyramidFeatures([size], [], scores[None], sizes, None)
    (expected,) = SharpMaskFPN.select(generator, features)
    model = SimpleNamespace(strides=strides, window_cells=kinds, size_divisibility=128, **settings)
    found = selection.select(scores.numpy(), size, model, 100)
    assert (found.boxes == expected.boxes.numpy()).all()
    assert (found.scores == expected.scores.numpy()).all()
    assert (found.refined == expected.refined.numpy()).all()
    assert found.refined.sum() == 30


@pytest.mark.parametrize("change", [{}, {"stability": False}, {"mask_nms": False}, {"nms_thresh": 0.5}])
@pytest.mark.parametrize("size", [(97, 61), (70, 40), (300, 400), (400, 300)])
def test_proposals_equal_those_of_torch(size, change):
    settings = {"nms_thresh": 1.0, "stability": True, "mask_nms": True, **change}
    masks = draw_masks((240, 320), count=150)
    scores = torch.randn(len(masks), generator=torch.Generator().manual_seed(4)).sort(descending=True).values
    scores[5] = -math.inf
    scaled = masks.scale(size[1] / 320, size[0] / 240, size)
    expected = build_with_torch(scores, scaled, **settings)
    found = build_proposals(
        scores.numpy(),
        masks.logits.numpy(),
        masks.windows.numpy(),
        masks.image_size,
        size,
        SimpleNamespace(mask_threshold=0.35, **settings),
    )
    assert len(found.scores) == len(expected) > 20
    np.testing.assert_allclose(found.objectness_logits, expected.objectness_logits.numpy(), atol=1e-4)
    assert (found.boxes == expected.proposal_boxes.tensor.numpy()).mean() > 0.99
    assert (found.masks.paste() == expected.proposal_masks.to_numpy()).mean() > 0.9999


def test_no_windows_give_no_proposals():
    model = SimpleNamespace(mask_threshold=0.35, nms_thresh=0.5, stability=True, mask_nms=True)
    empty = np.zeros((0, 56, 56), np.float32)
    found = build_proposals(np.zeros(0, np.float32), empty, np.zeros((0, 4), np.float32), (40, 50), None, model)
    assert found.boxes.shape == (0, 4)
    assert found.to_results(1) == []
    assert found.masks.paste().shape == (0, 40, 50)
