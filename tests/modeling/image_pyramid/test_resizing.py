"""Resizing of images and masks in both modes, compared with slow implementations."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import numpy as np
import pytest
import torch
from sharpmask_d2.modeling.image_pyramid.resizing import resize
from sharpmask_d2.structures import WindowMasks
from sharpmask_d2.windows.geometry import corner_aligned


def released_sampler(plane: np.ndarray, size: tuple) -> np.ndarray:
    """nnx.SpatialReSamplingEx of the released code in its bilinear mode, pixel by pixel."""
    (height, width), (new_height, new_width) = plane.shape, size
    result = np.empty(size)
    for y in range(new_height):
        for x in range(new_width):
            at_y, at_x = y * (height - 1) / (new_height - 1), x * (width - 1) / (new_width - 1)
            row, column = int(at_y), int(at_x)
            below, right = min(row + 1, height - 1), min(column + 1, width - 1)
            upper = plane[row, column] * (column + 1 - at_x) + plane[row, right] * (at_x - column)
            lower = plane[below, column] * (column + 1 - at_x) + plane[below, right] * (at_x - column)
            result[y, x] = upper * (row + 1 - at_y) + lower * (at_y - row)
    return result


@pytest.mark.parametrize("size", [(7, 9), (20, 31), (12, 12)])
def test_released_resizing_equals_the_sampler_of_the_released_code(size):
    x = torch.rand(1, 2, 12, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.stack([released_sampler(plane, size) for plane in x[0].numpy()])
    np.testing.assert_allclose(resize(x, size, "released")[0].numpy(), expected, atol=1e-12)


def test_antialiased_resizing_averages_all_pixels_when_it_shrinks():
    # The image is a chequerboard, of which the released sampler reads the pixels of one colour only.
    x = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float()[None, None]
    assert resize(x, (4, 4), "antialiased")[..., 1:3, 1:3].sub(0.5).abs().max() < 0.05
    assert resize(x, (8, 8), "antialiased") is x


def test_antialiased_resizing_treats_pixels_as_areas_when_it_enlarges():
    x = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    assert torch.allclose(resize(x, (2, 4), "antialiased")[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))
    assert torch.allclose(resize(x, (2, 4), "released")[0, 0, 0], torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]))


def test_masks_of_corner_aligned_windows_lie_where_the_released_code_puts_them():
    # The released code computes pixel i of a window of s pixels from position i (M - 1) / (s - 1) in cells. With many pixels, this is the
    # position of the pixel's centre up to half a pixel.
    side, pixels = 8, 400
    logits = torch.linspace(-1, 1, side).expand(1, side, side).contiguous()
    window = torch.tensor([[0.0, 0.0, pixels, pixels]])
    masks = WindowMasks(logits, corner_aligned(window, side), (pixels, pixels), threshold=0.6)
    expected = released_sampler(logits[0].numpy(), (pixels, pixels)) > 0.6
    assert abs(int(masks.areas()) - expected.sum()) <= pixels
    # Without the enlargement, the masks differ.
    assert abs(int(WindowMasks(logits, window, (pixels, pixels), threshold=0.6).areas()) - expected.sum()) > 5 * pixels
