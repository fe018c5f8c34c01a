"""Geometry and labels of windows, compared with loops and with the sizes of the released code."""

import math

import pytest
import torch
from sharpmask_d2.modeling.image_pyramid.levels import Level, cell_windows, grid_shifts, level_padding, pyramid_levels
from sharpmask_d2.windows.geometry import canonical_size, object_windows
from sharpmask_d2.windows.labels import label_windows

WINDOW, STRIDE = 160, 16
RELEASED = {"positive_shift": 16.0, "positive_octaves": 0.25, "negative_shift": 48.0, "negative_octaves": 2.5}
PAPER = {"positive_shift": 16.0, "positive_octaves": 0.25, "negative_shift": 32.0, "negative_octaves": 1.0}


def grid_size(level, divisor=1):
    """Number of rows and columns of windows: convolutions of stride 2 round up, and a window has ten cells."""
    left, right, top, bottom = level_padding(level, WINDOW, divisor)
    padded = level.size[0] + top + bottom, level.size[1] + left + right
    return tuple(-(-side // STRIDE) - WINDOW // STRIDE + 1 for side in padded)


@pytest.mark.parametrize(("window_size", "expected"), [(160, 92), (224, 128)])
def test_canonical_size_is_rounded_up(window_size, expected):
    assert canonical_size(window_size) == expected


def test_grid_sizes_equal_those_of_the_released_code():
    levels = pyramid_levels((480, 640), [-2.5 + i / 2 for i in range(8)], [(0, 0)])
    assert [level.size for level in levels[:7]] == [
        (85, 113),
        (120, 160),
        (170, 226),
        (240, 320),
        (339, 453),
        (480, 640),
        (679, 905),
    ]
    grids = [grid_size(level) for level in levels]
    assert grids[:7] == [(7, 9), (9, 11), (12, 16), (16, 21), (23, 30), (31, 41), (44, 58)]
    counts = [rows * columns for rows, columns in grids]
    assert sum(counts[:7]) == 5203
    assert sum(counts) == 10144


def test_levels_are_ordered_by_scale_and_have_at_least_one_pixel():
    levels = pyramid_levels((5, 900), [-5.0, 0.0], [(0, 0), (0, 8)])
    assert levels == [
        Level((5, 900), (1, 28), (0, 0)),
        Level((5, 900), (1, 28), (0, 8)),
        Level((5, 900), (5, 900), (0, 0)),
        Level((5, 900), (5, 900), (0, 8)),
    ]


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0])
def test_cells_are_centred_at_multiples_of_the_stride(exponent):
    # These sides are halved and doubled without rounding, so that the scale is exact.
    (level,) = pyramid_levels((96, 128), [exponent], [(0, 0)])
    rows, columns = grid_size(level)
    ys, xs = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    windows = cell_windows(level, ys.flatten(), xs.flatten(), WINDOW, STRIDE)
    scale = 2.0**exponent
    for window, y, x in zip(windows.tolist(), ys.flatten().tolist(), xs.flatten().tolist()):
        assert (window[0] + window[2]) / 2 == 16 * x / scale
        assert (window[1] + window[3]) / 2 == 16 * y / scale
        assert window[2] - window[0] == window[3] - window[1] == WINDOW / scale


@pytest.mark.parametrize("shift", [(0, 0), (4, 12)])
def test_windows_of_cells_cover_the_pixels_that_the_network_reads(shift):
    """Cell (y, x) reads the pixels [16 y, 16 y + W) of the padded level. Undoing the padding and the resizing gives its window."""
    level = Level((61, 83), (37, 50), shift)
    left, _, top, _ = level_padding(level, WINDOW, 1)
    cells = [(0, 0), (1, 4), (2, 3)]
    ys, xs = torch.tensor(cells).T
    expected = []
    for y, x in cells:
        pixels = [STRIDE * x - left, STRIDE * y - top, STRIDE * x - left + WINDOW, STRIDE * y - top + WINDOW]
        expected.append([pixel * factor for pixel, factor in zip(pixels, (83 / 50, 61 / 37) * 2)])
    windows = cell_windows(level, ys, xs, WINDOW, STRIDE)
    assert windows.dtype == torch.float32
    torch.testing.assert_close(windows, torch.tensor(expected))


@pytest.mark.parametrize("grid_stride", [16, 8, 4])
def test_shifted_grids_contain_every_position_once(grid_stride):
    centres = []
    for level in pyramid_levels((48, 80), [0.0], grid_shifts(STRIDE, grid_stride)):
        rows, columns = grid_size(level)
        assert (rows, columns) == (4, 6)
        ys, xs = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        windows = cell_windows(level, ys.flatten(), xs.flatten(), WINDOW, STRIDE)
        centres += [((y0 + y1) / 2, (x0 + x1) / 2) for x0, y0, x1, y1 in windows.tolist()]
    expected = [(y, x) for y in range(0, 4 * STRIDE, grid_stride) for x in range(0, 6 * STRIDE, grid_stride)]
    assert sorted(centres) == expected


@pytest.mark.parametrize("grid_stride", [0, -8, 5, 32])
def test_a_grid_stride_that_does_not_divide_the_stride_is_an_error(grid_stride):
    with pytest.raises(ValueError, match=rf"GRID_STRIDE is {grid_stride}.*16"):
        grid_shifts(STRIDE, grid_stride)


@pytest.mark.parametrize("divisor", [1, 16, 32])
@pytest.mark.parametrize("shift", [(0, 0), (8, 4)])
def test_padding_is_half_a_window_and_rounded_up_to_the_divisor(divisor, shift):
    level = Level((70, 90), (35, 47), shift)
    left, right, top, bottom = level_padding(level, WINDOW, divisor)
    assert (top, left) == (80 - shift[0], 80 - shift[1])
    assert 0 <= bottom - 80 - shift[0] < divisor
    assert 0 <= right - 80 - shift[1] < divisor
    assert (35 + top + bottom) % divisor == (47 + left + right) % divisor == 0


def test_object_windows_are_canonical():
    windows = object_windows(torch.tensor([[10.0, 20.0, 56.0, 30.0], [0.0, 0.0, 92.0, 184.0]]), WINDOW)
    # A larger side of 46 pixels is half of 92, so that the window has 80 pixels.
    torch.testing.assert_close(windows, torch.tensor([[-7.0, -15.0, 73.0, 65.0], [-114.0, -68.0, 206.0, 252.0]]))


def label_one(window, boxes, rule):
    """Label and object of one window, by a loop over the objects, and the smallest difference from any limit of the rule."""
    side = window[2] - window[0]
    best, owner, negative, margin = math.inf, -1, True, math.inf
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        canonical_side = max(x1 - x0, y1 - y0) * WINDOW / 92
        pixels = WINDOW / side
        dx = abs((window[0] + window[2]) / 2 - (x0 + x1) / 2) * pixels
        dy = abs((window[1] + window[3]) / 2 - (y0 + y1) / 2) * pixels
        shift, octaves = max(dx, dy), abs(math.log2(side / canonical_side))
        if shift <= rule["positive_shift"] and octaves <= rule["positive_octaves"]:
            distance = max(shift / rule["positive_shift"], octaves / rule["positive_octaves"])
            if distance < best:
                best, owner = distance, number
        if shift < rule["negative_shift"] and octaves < rule["negative_octaves"]:
            negative = False
        for kind in ("positive", "negative"):
            margin = min(margin, abs(shift - rule[f"{kind}_shift"]), abs(octaves - rule[f"{kind}_octaves"]))
    return (1 if owner >= 0 else 0 if negative else -1), owner, margin


@pytest.mark.parametrize("rule", [RELEASED, PAPER], ids=["released", "paper"])
def test_labels_equal_those_of_a_loop(rule):
    generator = torch.Generator().manual_seed(0)
    centres = 60 + 80 * torch.rand(6, 2, generator=generator, dtype=torch.float64)
    half = 8 + 30 * torch.rand(6, 2, generator=generator, dtype=torch.float64)
    # The last object is close to the first one, so that some windows are positive for both.
    boxes = torch.cat([centres - half, centres + half], dim=1)
    boxes = torch.cat([boxes, boxes[:1] + 2])
    # Half of the windows are close to canonical windows, and half are anywhere.
    near = object_windows(boxes, WINDOW)[torch.randint(7, (300,), generator=generator)]
    middle = (near[:, :2] + near[:, 2:]) / 2
    middle = middle + (torch.rand(300, 2, generator=generator) - 0.5) * (near[:, 2:] - near[:, :2]) / 2
    sides = (near[:, 2:3] - near[:, :1]) * 2 ** (1.2 * torch.rand(300, 1, generator=generator) - 0.6)
    middle = torch.cat([middle, 200 * torch.rand(300, 2, generator=generator)])
    sides = torch.cat([sides, 160 * 2 ** (6 * torch.rand(300, 1, generator=generator) - 3)])
    windows = torch.cat([middle - sides / 2, middle + sides / 2], dim=1)

    labels, objects = label_windows(windows, boxes, WINDOW, **rule)

    assert labels.dtype == objects.dtype == torch.int64
    expected = [label_one(window, boxes.tolist(), rule) for window in windows.tolist()]
    clear = [i for i, (_, _, margin) in enumerate(expected) if margin > 1e-9]
    assert len(clear) > 590
    assert [labels[i].item() for i in clear] == [expected[i][0] for i in clear]
    assert [objects[i].item() for i in clear] == [expected[i][1] for i in clear]
    assert all((labels == value).sum() > 20 for value in (-1, 0, 1))
    assert set(objects.tolist()) == set(range(-1, 7))


def test_limits_of_labels_are_inclusive():
    box = torch.tensor([[54.0, 54.0, 146.0, 146.0]])  # the canonical window has 160 pixels and its centre at 100

    def label(shift, side=160.0):
        centre = torch.tensor([100.0 + shift, 100.0])
        window = torch.cat([centre - side / 2, centre + side / 2])[None]
        return label_windows(window, box, WINDOW, **PAPER)[0].item()

    assert [label(shift) for shift in (0, 16, -16, 16.5, 31.5, 32, -32)] == [1, 1, 1, -1, -1, 0, 0]
    assert [label(0, 160 * 2**octaves) for octaves in (0.24, -0.24, 0.5, -0.5, 1, -1)] == [1, 1, -1, -1, 0, 0]
    # Distances are in pixels of the patch. In a window of 320 pixels, 32 pixels of the image are 16 pixels of the patch.
    wide = torch.tensor([[-92.0 + 32, -92.0, 92.0 + 32, 92.0]])
    assert label_windows(torch.tensor([[-160.0, -160.0, 160.0, 160.0]]), wide, WINDOW, **PAPER)[0].item() == 1


def test_all_windows_of_an_image_without_objects_are_negative():
    labels, objects = label_windows(torch.rand(5, 4), torch.zeros(0, 4), WINDOW, **RELEASED)
    assert labels.tolist() == [0] * 5
    assert objects.tolist() == [-1] * 5
    assert labels.dtype == objects.dtype == torch.int64


def test_labels_of_no_windows_are_empty():
    labels, objects = label_windows(torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 9.0, 9.0]]), WINDOW, **RELEASED)
    assert labels.shape == objects.shape == (0,)


@pytest.mark.parametrize("limit", ["positive_shift", "positive_octaves"])
def test_canonical_windows_meet_a_limit_of_zero(limit):
    """Patches without jitter are cut with such limits."""
    box = torch.tensor([[20.0, 30.0, 84.0, 62.0]])
    window = object_windows(box, WINDOW)
    others = torch.cat([window + 1, window + torch.tensor([[-1.0, -1.0, 1.0, 1.0]])])
    labels, objects = label_windows(torch.cat([window, others]), box, WINDOW, **{**PAPER, limit: 0})
    assert labels[0] == 1
    assert objects[0] == 0
    assert labels[1 if limit == "positive_shift" else 2] == -1
