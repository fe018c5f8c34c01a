"""Window masks against torch's grid_sample on one window at a time, and against pycocotools."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import json
import math

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from sharpmask_d2.structures import WindowMasks, window_masks
from sharpmask_d2.structures.rle import Runs, encode_runs, fill_runs

HEIGHT, WIDTH = 41, 57
THRESHOLD = math.log(0.25)


def draw_windows(generator, kind, count):
    """XYXY windows, whose centres lie up to a third of the image outside it."""
    size = torch.tensor([WIDTH, HEIGHT])
    centre = (torch.rand(count, 2, generator=generator) * 5 / 3 - 1 / 3) * size
    half = {
        "square": (3 + 40 * torch.rand(count, 1, generator=generator)).expand(-1, 2),
        "oblong": 1 + 40 * torch.rand(count, 2, generator=generator),
        "tiny": 0.7 * torch.rand(count, 2, generator=generator),
        "around": size * (1 + torch.rand(count, 2, generator=generator)),
        "outside": 0.2 + 5 * torch.rand(count, 2, generator=generator),
    }[kind]
    if kind == "outside":
        centre = torch.where(centre < size / 2, -half - 0.1 - centre.abs(), size + half + 0.1 + centre.abs())
    return torch.cat([centre - half, centre + half], 1)


def draw_logits(generator, count, side, smooth):
    """Logits of white noise or, if smooth, of a few blobs: noise on a grid of 4 x 4 that is enlarged."""
    if not smooth:
        return 3 * torch.randn(count, side, side, generator=generator)
    noise = 4 * torch.randn(count, 1, 4, 4, generator=generator)
    return F.interpolate(noise, size=(side, side), mode="bicubic")[:, 0] - 1


def draw_masks(seed=0, side=19, count=12, kinds=("square", "oblong", "tiny", "around")):
    generator = torch.Generator().manual_seed(seed)
    windows = torch.cat([draw_windows(generator, kind, count) for kind in kinds])
    logits = torch.cat([draw_logits(generator, len(windows), side, smooth) for smooth in (True, False)])
    return WindowMasks(logits, torch.cat([windows, windows]), (HEIGHT, WIDTH))


def interpolate(masks, n):
    """Logits of mask n at every pixel, (H, W) double, -inf outside the window."""
    height, width = masks.image_size
    x0, y0, x1, y1 = masks.windows[n].double()
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = torch.arange(height, dtype=torch.float64) + 0.5
    grid_y, grid_x = torch.meshgrid(2 * (y - y0) / (y1 - y0) - 1, 2 * (x - x0) / (x1 - x0) - 1, indexing="ij")
    values = F.grid_sample(
        masks.logits[n].double()[None, None],
        torch.stack([grid_x, grid_y], -1)[None],
        padding_mode="border",
        align_corners=False,
    )[0, 0]
    inside = ((x >= x0) & (x < x1))[None] & ((y >= y0) & (y < y1))[:, None]
    return values.masked_fill(~inside, -math.inf)


def assert_pasted_like_reference(masks):
    for n, bitmap in enumerate(masks.paste()):
        values = interpolate(masks, n)
        sure = (values - masks.threshold).abs() > 1e-4
        assert torch.equal(bitmap[sure], (values > masks.threshold)[sure]), f"mask {n}, window {masks.windows[n]}"


def as_text(rle):
    """pycocotools' RLE with its counts as text."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def assert_encoded_like_coco(masks):
    """Assert that boxes, areas and RLEs equal those of the pasted bitmaps."""
    boxes, areas, rle = masks.encode()
    bitmaps = masks.paste().numpy()
    expected = [as_text(coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))) for bitmap in bitmaps]
    assert rle == expected
    assert areas.dtype == torch.long
    assert areas.tolist() == bitmaps.sum((1, 2)).tolist() == coco_mask.area(expected).tolist()
    for bitmap, box in zip(bitmaps, boxes.tensor.tolist()):
        y, x = bitmap.nonzero()
        assert box == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0])
    xywh = coco_mask.toBbox(expected)
    assert torch.equal(boxes.tensor[:, :2], torch.from_numpy(xywh[:, :2]).float())
    assert torch.equal(boxes.tensor[:, 2:], torch.from_numpy(xywh[:, :2] + xywh[:, 2:]).float())


def masks_of_bitmaps(bitmaps):
    """Window masks of square bitmaps. The window is the image, so that every pixel centre is a cell centre."""
    count, side, _ = bitmaps.shape
    windows = torch.tensor([0.0, 0.0, side, side]).expand(count, 4)
    return WindowMasks(bitmaps.float() * 4 - 3, windows, (side, side))


@pytest.mark.parametrize("side", [1, 2, 19, 40])
def test_paste_interpolates_in_the_window(side):
    masks = draw_masks(seed=side, side=side)
    assert masks.nonempty().sum() > 20
    assert_pasted_like_reference(masks)


def test_paste_with_another_threshold():
    masks = draw_masks(1)
    masks = WindowMasks(masks.logits, masks.windows, masks.image_size, threshold=0.7)
    assert_pasted_like_reference(masks)
    assert_encoded_like_coco(masks)


def test_threshold_is_excluded():
    at_threshold = torch.tensor([0.5, 0.5, 1.0]).view(3, 1, 1).repeat(1, 8, 8)
    at_threshold[1, 3, 4] = 1.0
    windows = torch.tensor([0.0, 0.0, 8.0, 8.0]).expand(3, 4)
    assert WindowMasks(at_threshold, windows, (8, 8), threshold=0.5).areas().tolist() == [0, 1, 64]


def test_window_edges_include_left_and_top_only():
    windows = torch.tensor([[2.5, 3.5, 5.5, 7.5], [2.4, 3.4, 5.4, 7.4], [2.6, 3.6, 5.6, 7.6], [2.5, 3.5, 2.5, 9.0]])
    masks = WindowMasks(torch.ones(4, 5, 5), windows, (HEIGHT, WIDTH))
    assert masks.boxes().tensor.tolist() == [[2, 3, 5, 7], [2, 3, 5, 7], [3, 4, 6, 8], [0, 0, 0, 0]]


@pytest.mark.parametrize("side", [1, 2, 19, 40])
def test_boxes_areas_and_rles_equal_pycocotools_of_the_pasted_masks(side):
    assert_encoded_like_coco(draw_masks(seed=100 + side, side=side))


def test_any_bitmap_is_encoded_like_pycocotools():
    generator = torch.Generator().manual_seed(3)
    share = torch.rand(200, 1, 1, generator=generator)
    bitmaps = torch.rand(200, 13, 13, generator=generator) < share
    bitmaps[0], bitmaps[1] = False, True
    bitmaps[2:20, -1, :-1] = True  # runs that continue at the top of the next column
    bitmaps[2:20, 0, 1:] = True
    bitmaps[20] = False
    bitmaps[20, :, 4:9] = True  # whole columns
    bitmaps[21] = False
    bitmaps[21, -1, -1] = True
    bitmaps[22] = True
    bitmaps[22, 0, 0] = False
    bitmaps[23] = True
    bitmaps[23, -1, -1] = False
    bitmaps[24] = torch.arange(13) < 6  # ends where the next mask begins
    bitmaps[25] = torch.arange(13) >= 6
    masks = masks_of_bitmaps(bitmaps)
    assert torch.equal(masks.paste(), bitmaps)
    assert_encoded_like_coco(masks)


def test_full_and_empty_masks():
    windows = torch.tensor([[0.0, 0.0, WIDTH, HEIGHT], [-30.0, -9.0, 90.0, 77.0], [0.0, 0.0, WIDTH, HEIGHT]])
    logits = torch.stack([torch.ones(9, 9), torch.ones(9, 9), -3 * torch.ones(9, 9)])
    masks = WindowMasks(logits, windows, (HEIGHT, WIDTH))
    assert masks.areas().tolist() == [HEIGHT * WIDTH, HEIGHT * WIDTH, 0]
    assert masks.nonempty().tolist() == [True, True, False]
    assert_encoded_like_coco(masks)


@pytest.mark.parametrize("kind", ["outside", "tiny"])
def test_windows_outside_the_image_or_smaller_than_a_pixel(kind):
    masks = draw_masks(seed=7, count=40, kinds=(kind,))
    assert_pasted_like_reference(masks)
    assert_encoded_like_coco(masks)
    assert masks.nonempty().any() == (kind == "tiny")


def test_windows_without_area_are_empty():
    windows = torch.tensor(
        [[5.5, 5, 5.5, 20], [20, 5, 5, 20], [5, 20, 20, 5], [math.nan, 0, 9, 9], [0, 0, math.inf, 9]]
    )
    assert WindowMasks(torch.ones(5, 4, 4), windows, (HEIGHT, WIDTH)).areas().tolist() == [0] * 5


@pytest.mark.parametrize("budget", [1, 5000])
def test_results_do_not_depend_on_the_size_of_chunks(monkeypatch, budget):
    expected = draw_masks(4).encode()
    monkeypatch.setattr(window_masks, "CHUNK_CPU", budget)
    boxes, areas, rle = draw_masks(4).encode()
    assert torch.equal(boxes.tensor, expected[0].tensor)
    assert torch.equal(areas, expected[1])
    assert rle == expected[2]


def test_methods_agree_with_encode():
    boxes, areas, rle = draw_masks(5).encode()
    # Fresh masks: the first method that is called computes the runs for all others.
    masks = draw_masks(5)
    assert isinstance(masks.boxes(), Boxes)
    assert torch.equal(masks.boxes().tensor, boxes.tensor)
    assert torch.equal(masks.areas(), areas)
    assert torch.equal(masks.nonempty(), areas > 0)
    assert 0 < masks.nonempty().sum() < len(masks)
    assert masks.rle() == rle


def test_rles_can_be_written_as_json():
    rles = draw_masks(5).rle()
    assert json.loads(json.dumps(rles)) == rles
    assert coco_mask.area(rles).sum() > 0


def test_no_masks():
    masks = WindowMasks(torch.zeros(0, 8, 8), torch.zeros(0, 4), (HEIGHT, WIDTH))
    boxes, areas, rle = masks.encode()
    assert boxes.tensor.shape == (0, 4)
    assert len(areas) == len(masks.nonempty()) == len(masks.hflip()) == len(masks) == 0
    assert rle == []
    assert masks.paste().shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_interpolated_in_single(dtype):
    masks = draw_masks(6)
    half = WindowMasks(masks.logits.to(dtype), masks.windows, masks.image_size)
    single = WindowMasks(half.logits.float(), masks.windows, masks.image_size)
    assert half.rle() == single.rle()
    assert torch.equal(half.paste(), single.paste())


def test_logits_that_require_gradients_are_encoded():
    masks = draw_masks(6, count=2)
    expected = masks.rle()
    masks.logits.requires_grad_()
    assert masks.rle() == expected


def test_long_counts_in_a_large_image():
    height, width = 3000, 2500
    pixels = torch.tensor([0, 3, 2000, 2047, 2400_000, 2400_033, height * width - 1])
    runs = Runs(pixels, pixels + 1, torch.tensor([0, 6, 1]))
    expected = [as_text(coco_mask.encode(np.asfortranarray(b.numpy()))) for b in fill_runs(runs, (height, width))]
    assert encode_runs(runs, (height, width)) == expected


@pytest.mark.parametrize("side", [40_000, 60_000])
def test_counts_of_more_pixels_than_fit_in_memory(side):
    # Counts that shrink and grow by more than 2**24, 2**30 and, in the greater image, 2**31 pixels.
    counts = [5, 2**24, 7, 2, 2**24 + 9, 2**30 + 1, 3, 1]
    counts.append(side**2 - sum(counts))
    edges = torch.tensor(counts).cumsum(0)
    runs = Runs(edges[0:-1:2], edges[1::2], torch.tensor([4]))
    expected = coco_mask.frPyObjects({"size": [side, side], "counts": counts}, side, side)
    assert encode_runs(runs, (side, side)) == [as_text(expected)]


def test_pasting_some_of_the_masks():
    masks = draw_masks(8, count=4)
    everything = masks.paste()
    chosen = torch.tensor([5, 0, 5, 9])
    assert torch.equal(masks.paste(chosen), everything[chosen])
    assert torch.equal(masks.paste(3), everything[3:4])
    assert torch.equal(masks.paste(slice(2, 6)), everything[2:6])


def test_indexing():
    masks = draw_masks(9, count=2)
    for item, rows in (
        (3, [3]),
        (-1, [len(masks) - 1]),
        (np.int64(2), [2]),
        (slice(1, 4), [1, 2, 3]),
        (torch.tensor([4, 1]), [4, 1]),
        (torch.arange(len(masks)) == 6, [6]),
    ):
        part = masks[item]
        assert len(part) == len(rows)
        assert torch.equal(part.logits, masks.logits[rows])
        assert torch.equal(part.windows, masks.windows[rows])
        assert (part.image_size, part.threshold) == (masks.image_size, masks.threshold)
    with pytest.raises(IndexError, match="out of range"):
        masks[len(masks)]


def test_selected_masks_keep_their_runs():
    masks = draw_masks(9, count=6)
    expected, boxes = masks.rle(), masks.boxes().tensor
    for item in (3, -2, slice(1, 5, 2), [5, 0, 0, 3], torch.tensor([4, 1]), torch.arange(len(masks)) % 2 == 1, []):
        rows = torch.arange(len(masks))[item if not isinstance(item, int) else [item]].tolist()
        for part in (masks[item], masks[item].to("cpu"), masks[:][item]):
            assert part.rle() == [expected[row] for row in rows]
            assert torch.equal(part.boxes().tensor, boxes[rows])
            assert torch.equal(part.paste(), masks.paste()[rows])
    assert masks.hflip().rle() != expected
    assert masks.scale(0.5, 0.5, (20, 20)).rle()[0]["size"] == [20, 20]


def test_field_of_instances():
    masks = draw_masks(10, count=2)
    count = len(masks)
    instances = Instances(masks.image_size, proposal_masks=masks, scores=torch.arange(count))
    assert len(instances) == count
    picked = instances[instances.scores >= count - 3]
    assert torch.equal(picked.proposal_masks.windows, masks.windows[-3:])
    assert len(instances[1].proposal_masks) == 1
    joined = Instances.cat([picked, instances]).to("cpu")
    assert joined.proposal_masks.rle() == masks.rle()[-3:] + masks.rle()
    assert joined.proposal_masks.device == torch.device("cpu")
    assert instances.to("meta").proposal_masks.windows.device.type == "meta"
    assert "WindowMasks(num_masks=" in str(instances)


def test_cat_keeps_the_threshold():
    masks = WindowMasks(torch.ones(1, 4, 4), torch.tensor([[0.0, 0, 8, 8]]), (HEIGHT, WIDTH), threshold=2.0)
    assert WindowMasks.cat([masks, masks]).areas().tolist() == [0, 0]


@pytest.mark.parametrize(("scale_x", "scale_y"), [(2.0, 3.0), (0.4, 0.7)])
def test_scaled_masks_are_those_of_the_resized_image(scale_x, scale_y):
    masks = draw_masks(11)
    size = (round(HEIGHT * scale_y), round(WIDTH * scale_x))
    scaled = masks.scale(scale_x, scale_y, size)
    assert scaled.image_size == size
    assert_pasted_like_reference(scaled)
    factors = torch.tensor([scale_x, scale_y, scale_x, scale_y])
    assert torch.allclose(scaled.windows, masks.windows * factors)


def test_odd_scales_keep_the_old_pixel_centres():
    masks = draw_masks(11)
    scaled = masks.scale(3, 5, (5 * HEIGHT, 3 * WIDTH)).paste()[:, 2::5, 1::3]
    for n, bitmap in enumerate(masks.paste()):
        sure = (interpolate(masks, n) - masks.threshold).abs() > 1e-4
        assert torch.equal(scaled[n][sure], bitmap[sure])


def test_mirrored_masks_are_the_mirrored_bitmaps():
    masks = draw_masks(12)
    mirrored = masks.hflip().paste().flip(2)
    for n, bitmap in enumerate(masks.paste()):
        sure = (interpolate(masks, n) - masks.threshold).abs() > 1e-4
        assert torch.equal(mirrored[n][sure], bitmap[sure])
    assert torch.allclose(masks.hflip().hflip().windows, masks.windows, atol=1e-4)


def test_default_threshold_is_a_fifth():
    masks = draw_masks(0, count=1)
    assert math.isclose(masks.threshold, THRESHOLD)
    assert math.isclose(torch.tensor(masks.threshold).sigmoid().item(), 0.2, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("logits", "windows", "image_size", "message"),
    [
        (torch.zeros(2, 4, 4), torch.zeros(3, 4), (5, 5), "same length, got 2 and 3"),
        (torch.zeros(2, 4, 5), torch.zeros(2, 4), (5, 5), r"logits must be \(N, M, M\).*\(2, 4, 5\)"),
        (torch.zeros(4, 4), torch.zeros(4, 4), (5, 5), r"logits must be \(N, M, M\)"),
        (torch.zeros(2, 0, 0), torch.zeros(2, 4), (5, 5), "M > 0"),
        (torch.zeros(2, 4, 4).long(), torch.zeros(2, 4), (5, 5), "floating point, got torch.int64"),
        (torch.zeros(2, 4, 4), torch.zeros(2, 5), (5, 5), r"windows must be \(N, 4\)"),
        (torch.zeros(2, 4, 4), torch.zeros(2, 4, device="meta"), (5, 5), "on one device"),
        (torch.zeros(2, 4, 4), torch.zeros(2, 4), (0, 5), "positive"),
    ],
)
def test_errors_name_the_argument(logits, windows, image_size, message):
    with pytest.raises(ValueError, match=message):
        WindowMasks(logits, windows, image_size)


@pytest.mark.parametrize("threshold", [-math.inf, math.inf, math.nan])
def test_a_threshold_is_finite(threshold):
    with pytest.raises(ValueError, match=f"threshold must be finite, got {threshold}"):
        WindowMasks(torch.zeros(2, 4, 4), torch.zeros(2, 4), (5, 5), threshold=threshold)


@pytest.mark.parametrize(("threshold", "share"), [(-1e6, 1), (1e6, 0)])
def test_extreme_thresholds_fill_or_empty_the_window(threshold, share):
    windows = torch.tensor([[3.0, 2.0, 23.0, 32.0], [1.0, 1.0, 4.0, 5.0]])
    masks = WindowMasks(torch.randn(2, 8, 8), windows, (HEIGHT, WIDTH), threshold=threshold)
    assert masks.areas().tolist() == [600 * share, 12 * share]


def test_cat_refuses_what_differs():
    def masks(side=4, size=(5, 5), threshold=0.0):
        return WindowMasks(torch.zeros(1, side, side), torch.zeros(1, 4), size, threshold=threshold)

    with pytest.raises(ValueError, match="at least one"):
        WindowMasks.cat([])
    for other, name in (
        (masks(side=3), "mask side"),
        (masks(size=(5, 6)), "image_size"),
        (masks(threshold=1), "thresh"),
    ):
        with pytest.raises(ValueError, match=name):
            WindowMasks.cat([masks(), other])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_masks():
    masks = draw_masks(13)
    moved = masks.to("cuda")
    boxes, areas, rle = moved.encode()
    assert boxes.device.type == areas.device.type == "cuda"
    differ = (moved.paste().cpu() != masks.paste()).sum().item()
    assert differ <= 2  # fused multiply-add rounds otherwise
    assert rle == WindowMasks.cat([moved]).rle()
    assert rle == [coco_mask.encode(np.asfortranarray(b.astype(np.uint8))) for b in moved.paste().cpu().numpy()]
