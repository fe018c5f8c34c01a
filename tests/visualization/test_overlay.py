"""Masks drawn over an image."""

import numpy as np
import pytest
from pycocotools import mask as mask_util
from sharpmask_d2.visualization import draw_masks
from sharpmask_d2.visualization.overlay import PALETTE


def encode(*masks):
    return [mask_util.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]


def rectangle(y0, x0, y1, x1):
    mask = np.zeros((120, 160), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize("opacity", [0.0, 0.25, 1.0])
def test_each_mask_has_its_colour_and_the_smaller_one_is_above(opacity):
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    before = image.copy()
    small, large = rectangle(40, 40, 70, 70), rectangle(10, 10, 110, 150)
    drawn = draw_masks(image, encode(small, large), opacity=opacity)
    assert np.array_equal(image, before)
    assert np.array_equal(drawn[:5], image[:5])
    # Away from the outlines.
    alone = np.s_[90:100, 100:140]
    expected = (1 - opacity) * image[alone] + opacity * PALETTE[1][::-1]
    assert np.abs(drawn[alone] - expected).max() <= 1
    both = np.s_[50:60, 50:60]
    under = (1 - opacity) * image[both] + opacity * PALETTE[1][::-1]
    assert np.abs(drawn[both] - ((1 - opacity) * under + opacity * PALETTE[0][::-1])).max() <= 1.5


def test_outlines_surround_parts_and_holes_and_colours_repeat():
    image = np.full((120, 160, 3), 128, dtype=np.uint8)
    ring = rectangle(20, 20, 100, 140) & ~rectangle(50, 60, 70, 100)
    drawn = draw_masks(image, encode(*[rectangle(0, 0, 1, 1)] * len(PALETTE), ring), opacity=0.0)
    colour = PALETTE[0][::-1]
    for row, column in ((20, 80), (60, 20), (50, 80)):  # the outer edge twice, and the edge of the hole
        nearby = drawn[row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3)
        assert np.abs(nearby - colour).max(axis=1).min() <= 10, (row, column)
    assert np.array_equal(drawn[60, 75], image[60, 75])


def test_without_masks_the_picture_is_the_image():
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    assert np.array_equal(draw_masks(image, []), image)
