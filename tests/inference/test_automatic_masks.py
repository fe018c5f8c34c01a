"""The clean masks of whole images: in drawn images, by the packaged model."""

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from scipy import ndimage
from sharpmask_d2 import model_zoo
from sharpmask_d2.errors import UserError
from sharpmask_d2.inference import ProposalPredictor, SharpMaskAutomaticMaskGenerator
from sharpmask_d2.inference.automatic_mask_generator import remove_small_regions, suppress
from sharpmask_d2.inference.configuration import build_config

KEYS = {"segmentation", "area", "bbox", "predicted_iou", "stability_score", "point_coords", "crop_box"}


@pytest.fixture(scope="module")
def proposals():
    return ProposalPredictor(build_config(opts=("INPUT.MIN_SIZE_TEST", "192", "MODEL.DEVICE", "cpu")))


@pytest.fixture(scope="module")
def drawing(make_dataset, tmp_path_factory):
    dataset = make_dataset(tmp_path_factory.mktemp("drawing"), num_images=1, size=(192, 256))
    return cv2.imread(str(dataset.image_root / "1.png")), dataset.masks[1]


def iou(mask, other) -> float:
    return (mask & other).sum() / (mask | other).sum()


def test_records_have_the_keys_of_segment_anything(proposals, drawing):
    image, truth = drawing
    records = SharpMaskAutomaticMaskGenerator(proposals, pred_iou_thresh=0.3).generate(image)
    assert records
    for record in records:
        mask = record["segmentation"]
        assert record.keys() == KEYS
        assert mask.shape == (192, 256)
        assert mask.dtype == bool
        assert record["area"] == mask.sum()
        ys, xs = np.nonzero(mask)
        assert record["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert record["crop_box"] == [0, 0, 256, 192]
        ((x, y),) = record["point_coords"]
        assert 0 <= x <= 256
        assert 0 <= y <= 192
        assert 0.3 <= record["predicted_iou"] <= 1
        assert 0 <= record["stability_score"] <= 1
    scores = [record["predicted_iou"] for record in records]
    assert scores == sorted(scores, reverse=True)
    for mask in truth:
        assert max(iou(mask, record["segmentation"]) for record in records) > 0.7


def test_output_modes_hold_the_same_masks(proposals, drawing):
    by_mode = {
        mode: SharpMaskAutomaticMaskGenerator(proposals, pred_iou_thresh=0.3, output_mode=mode).generate(drawing[0])
        for mode in ("binary_mask", "coco_rle", "uncompressed_rle")
    }
    for array, text, counts in zip(*([record["segmentation"] for record in by_mode[mode]] for mode in by_mode)):
        assert np.array_equal(mask_utils.decode(text), array)
        assert isinstance(text["counts"], str)
        assert isinstance(counts["counts"], list)
        assert np.array_equal(mask_utils.decode(mask_utils.frPyObjects(counts, *counts["size"])), array)


def test_masks_that_do_not_overlap(proposals, drawing):
    options = {"pred_iou_thresh": 0.2, "mask_nms_thresh": 0.9}
    plain = SharpMaskAutomaticMaskGenerator(proposals, **options).generate(drawing[0])
    assert np.sum([record["segmentation"] for record in plain], axis=0).max() > 1
    apart = SharpMaskAutomaticMaskGenerator(proposals, **options, non_overlapping=True).generate(drawing[0])
    assert np.sum([record["segmentation"] for record in apart], axis=0).max() == 1
    assert np.array_equal(apart[0]["segmentation"], plain[0]["segmentation"])


def test_thresholds_remove_masks(proposals, drawing):
    def scores(**options):
        records = SharpMaskAutomaticMaskGenerator(proposals, **{"pred_iou_thresh": 0.2, **options}).generate(drawing[0])
        return [(record["predicted_iou"], record["stability_score"]) for record in records]

    every = scores(mask_nms_thresh=1.0)
    strict = scores(mask_nms_thresh=1.0, pred_iou_thresh=0.5)
    np.testing.assert_allclose(strict, [x for x in every if x[0] >= 0.5], atol=1e-4)
    stable = scores(mask_nms_thresh=1.0, stability_score_thresh=0.9)
    assert stable == [x for x in every if x[1] >= 0.9]
    assert 0 < len(stable) < len(every)
    assert len(scores(mask_nms_thresh=0.3)) < len(every)
    assert scores(pred_iou_thresh=1.0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pred_iou_thresh": 1.5}, "pred_iou_thresh is 1.5"),
        ({"output_mode": "png"}, "choose from"),
        ({"mask_nms_thresh": -1}, "0..1"),
    ],
)
def test_wrong_settings_end_in_one_line(proposals, options, message):
    with pytest.raises(UserError, match=message):
        SharpMaskAutomaticMaskGenerator(proposals, **options)


def test_image_pyramids_are_refused():
    with pytest.raises(UserError, match="image pyramid"):
        SharpMaskAutomaticMaskGenerator(model_zoo.get_config("deepmask_lite0"))


def test_specks_and_holes_are_removed():
    clean = np.zeros((40, 50), bool)
    clean[5:30, 5:30] = True
    clean[10:20, 10:20] = False  # a large hole
    dirty = clean.copy()
    dirty[7, 7] = False
    dirty[8, 8] = False  # touches the hole above at a corner
    dirty[35:38, 40:43] = True
    assert np.array_equal(remove_small_regions(dirty, 20), clean)
    assert np.array_equal(remove_small_regions(dirty, 0), dirty)
    assert not remove_small_regions(dirty, 5000).any() or remove_small_regions(dirty, 5000).all()


def test_suppression_keeps_the_better_of_two_masks():
    masks = np.zeros((20, 20, 3), np.uint8, order="F")
    masks[:10, :, 0] = masks[:9, :, 1] = masks[12:, :, 2] = 1
    rles = mask_utils.encode(masks)
    assert suppress(rles, 0.8) == [0, 2]
    assert suppress(rles, 0.95) == [0, 1, 2]
    assert suppress([], 0.5) == []


@pytest.mark.parametrize("seed", range(20))
def test_small_regions_are_those_of_the_whole_image(seed):
    rng = np.random.default_rng(seed)
    noise = cv2.resize(rng.random((12, 14)), (70, 60))
    bitmap = noise > 0.5
    top, left = rng.integers(0, 30, 2)
    bitmap[:top], bitmap[:, :left] = False, False
    expected = bitmap.copy()
    for is_foreground, structure in ((False, None), (True, np.ones((3, 3)))):
        labels, _ = ndimage.label(expected == is_foreground, structure)
        small = np.bincount(labels.ravel()) < 25
        small[0] = False
        expected[small[labels]] = not is_foreground
    assert np.array_equal(remove_small_regions(bitmap, 25), expected)


def test_the_background_beside_a_mask_is_not_a_hole():
    bitmap = np.zeros((20, 80), dtype=bool)
    bitmap[:, 30:50] = True
    assert np.array_equal(remove_small_regions(bitmap, 100), bitmap)
    bitmap[:, 3:50] = True  # what is left beside the border is small
    assert remove_small_regions(bitmap, 100)[:, :50].all()
    assert not remove_small_regions(bitmap, 100)[:, 50:].any()
