"""Masks rendered into windows, windows drawn for training, patches of images, and their repeatable stream."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import itertools
import json
import signal

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode, Instances
from drawing import draw_polygon, polygon_mask
from PIL import Image
from sharpmask_d2.data import PatchMapper, WindowSampler, build_patch_test_loader, register_datasets
from sharpmask_d2.data.loader import PatchBatches, build_patch_train_loader, category_weights
from sharpmask_d2.data.objects import ImageObjects, cut_region, read_objects, render_mask
from sharpmask_d2.data.patch_mapper import _jitter_colors
from sharpmask_d2.data.resumable import ResumableLoader
from sharpmask_d2.data.window_sampling import WindowSamples
from sharpmask_d2.windows.geometry import object_windows
from sharpmask_d2.windows.labels import label_windows

WINDOW = 160
RELEASED = {"positive_shift": 16.0, "positive_octaves": 0.25, "negative_shift": 48.0, "negative_octaves": 2.5}
PAPER = {"positive_shift": 16.0, "positive_octaves": 0.25, "negative_shift": 32.0, "negative_octaves": 1.0}


def iou(a, b):
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    return (a & b).sum() / max((a | b).sum(), 1)


def forms(polygon, size):
    """A mask as polygons, as RLE and as bitmap."""
    bitmap = polygon_mask(polygon, size)
    return {"polygon": [polygon], "rle": coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8))), "bitmap": bitmap}


# ------------------------------------------------------------------ masks and pixels of a region


@pytest.mark.parametrize("form", ["polygon", "rle", "bitmap"])
@pytest.mark.parametrize("region", [(10, 5, 70), (-20, -7, 80), (60, 40, 50), (110, 0, 30)])
def test_mask_is_exact_where_pixels_coincide(form, region):
    size = 90, 120
    bitmap = polygon_mask(draw_polygon("rectangle", (25, 17, 71, 50)), size)
    x0, y0, side = region
    expected = np.pad(bitmap, 100)[y0 + 100 : y0 + 100 + side, x0 + 100 : x0 + 100 + side]
    mask = render_mask(forms(draw_polygon("rectangle", (25, 17, 71, 50)), size)[form], region, side)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("form", ["polygon", "rle", "bitmap"])
@pytest.mark.parametrize("shape", ["ellipse", "triangle"])
def test_mask_of_a_contained_shape_is_exact_where_pixels_coincide(form, shape):
    polygon = draw_polygon(shape, (25, 17, 71, 60))
    expected = polygon_mask(polygon, (90, 120))[10:70, 20:80]
    np.testing.assert_array_equal(render_mask(forms(polygon, (90, 120))[form], (20, 10, 60), 60), expected)


@pytest.mark.parametrize("form", ["polygon", "rle", "bitmap"])
@pytest.mark.parametrize("shape", ["rectangle", "ellipse", "triangle"])
@pytest.mark.parametrize(
    "region", [(13.3, 4.8, 160.4), (-31.7, 20.2, 130.0), (80.6, 50.1, 61.9), (-90.0, -95.5, 400.0)]
)
def test_mask_against_decoding_and_cropping(form, shape, region):
    size, m = (180, 200), 112
    polygon = draw_polygon(shape, (40, 30, 170, 150))
    x0, y0, side = region
    # Every pixel of the result equals the image pixel under its centre.
    at = np.floor(np.array([[x0], [y0]]) + (np.arange(m) + 0.5) * side / m).astype(int) + 500
    expected = np.pad(polygon_mask(polygon, size), 500)[np.ix_(at[1], at[0])]
    assert expected.any()
    mask = render_mask(forms(polygon, size)[form], region, m)
    assert iou(mask, expected) > 0.95
    # No shift of a pixel fits better: the centres of the pixels agree.
    for move in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        assert iou(np.roll(mask, move, axis=(0, 1)), expected) <= iou(mask, expected)


def test_mask_of_two_polygons_is_their_union():
    polygons = [draw_polygon("rectangle", (2, 3, 12, 9)), draw_polygon("rectangle", (8, 5, 20, 18))]
    expected = polygon_mask(polygons[0], (30, 30)) | polygon_mask(polygons[1], (30, 30))
    np.testing.assert_array_equal(render_mask(polygons, (0, 0, 30), 30), expected)


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def test_region_at_its_own_size_is_a_slice(picture):
    np.testing.assert_array_equal(cut_region(picture, (7, 3, 30), 30, 127.5), picture[3:33, 7:37])


@pytest.mark.parametrize("region", [(-5, -9, 30), (45, 25, 30), (-10, -20, 90)])
def test_region_partly_outside_is_filled(picture, region):
    x0, y0, side = region
    expected = np.full((240, 260, 3), 200, np.uint8)
    expected[100:140, 100:160] = picture
    expected = expected[100 + y0 : 100 + y0 + side, 100 + x0 : 100 + x0 + side]
    np.testing.assert_array_equal(cut_region(picture, region, side, 200), expected)


def test_fill_is_equal_for_regions_partly_and_wholly_outside(picture):
    partly = cut_region(picture, (-20, -20, 30), 30, 127.5)[0, 0, 0]
    for region in ((-30, 5, 30), (60, 5, 30), (5, -31, 30), (5, 40, 30), (-90, -90, 20)):
        assert (cut_region(picture, region, 15, 127.5) == partly).all()


def test_region_is_resized(picture):
    smooth = cv2.GaussianBlur(picture, (0, 0), 5)
    half = cut_region(smooth, (4, 8, 32), 16, 0)
    expected = smooth[8:40, 4:36].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - expected).max() <= 1
    twice = cut_region(smooth, (4, 8, 16), 32, 0)
    assert np.abs(twice.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)) - smooth[8:24, 4:20]).max() <= 3


# ------------------------------------------------------------------ windows to train on


def image_objects(boxes, crowd_boxes=(), targets=None):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return ImageObjects(
        boxes=boxes,
        segmentations=[[draw_polygon("rectangle", box)] for box in boxes],
        categories=np.zeros(len(boxes), np.int64),
        targets=np.ones(len(boxes), bool) if targets is None else np.asarray(targets),
        crowd_boxes=np.asarray(crowd_boxes, np.float32).reshape(-1, 4),
    )


def make_sampler(rule=RELEASED, **changes):
    options = {"mask_fraction": 0.5, "shared_positives": False, "near_negatives": 0.0, **changes}
    return WindowSampler(window_size=WINDOW, exponents=[-2.5, 0.5], label_rule=rule, **options)


def label(windows, objects, rule):
    boxes = torch.from_numpy(objects.boxes).double()
    return [part.numpy() for part in label_windows(torch.from_numpy(windows), boxes, WINDOW, **rule)]


SPREAD = [(20, 30, 70, 90), (300, 200, 420, 260), (500, 40, 530, 60)]


@pytest.mark.parametrize("rule", [RELEASED, PAPER], ids=["released", "paper"])
@pytest.mark.parametrize("near_negatives", [0.0, 1.0])
def test_labels_agree_with_the_rule(rule, near_negatives):
    objects = image_objects(SPREAD)
    sampler = make_sampler(rule, near_negatives=near_negatives)
    samples = sampler(objects, np.ones(3), (300, 600), 400, np.random.default_rng(0))
    labels, owners = label(samples.windows, objects, rule)
    jittered = samples.in_mask_loss
    assert (labels[jittered] == 1).all()
    np.testing.assert_array_equal(owners[jittered], samples.objects[jittered])
    assert set(samples.objects[jittered]) == {0, 1, 2}
    assert (labels[samples.labels == 0] == 0).all()
    assert (samples.objects[samples.labels == 0] == -1).all()
    windows = samples.windows
    np.testing.assert_allclose(windows[:, 2] - windows[:, 0], windows[:, 3] - windows[:, 1])


def test_jitter_fills_its_range():
    objects = image_objects(SPREAD[:1])
    samples = make_sampler(mask_fraction=1.0)(objects, np.ones(1), (300, 600), 2000, np.random.default_rng(0))
    canonical = object_windows(torch.from_numpy(objects.boxes).double(), WINDOW).numpy()[0]
    sides = samples.windows[:, 2] - samples.windows[:, 0]
    octaves = np.log2(sides / (canonical[2] - canonical[0]))
    shift = (
        (samples.windows[:, :2] + samples.windows[:, 2:] - canonical[:2] - canonical[2:]) / 2 * WINDOW / sides[:, None]
    )
    for values, limit in ((octaves, 0.25), (shift[:, 0], 16), (shift[:, 1], 16)):
        assert -limit <= values.min() < -0.98 * limit
        assert 0.98 * limit < values.max() <= limit
        assert abs(values.mean()) < 0.05 * limit


def test_released_samples_contribute_to_one_loss_each():
    samples = make_sampler()(image_objects(SPREAD), np.ones(3), (300, 600), 80, np.random.default_rng(0))
    np.testing.assert_array_equal(samples.in_mask_loss, ~samples.in_score_loss)
    assert samples.in_mask_loss.sum() == 40
    assert (samples.labels[samples.in_mask_loss] == 1).all()
    assert samples.labels[samples.in_score_loss].sum() == 20


def test_all_samples_of_the_paper_contribute_to_the_score_loss():
    sampler = make_sampler(PAPER, shared_positives=True, mask_fraction=0.25)
    samples = sampler(image_objects(SPREAD), np.ones(3), (300, 600), 80, np.random.default_rng(0))
    assert samples.in_score_loss.all()
    assert samples.in_mask_loss.sum() == 20
    np.testing.assert_array_equal(samples.labels == 1, samples.in_mask_loss)


def test_released_score_positives_are_centred_and_at_half_octaves():
    objects = image_objects(SPREAD)
    samples = make_sampler()(objects, np.ones(3), (300, 600), 200, np.random.default_rng(0))
    unjittered = samples.in_score_loss & (samples.labels == 1)
    boxes = objects.boxes[samples.objects[unjittered]]
    windows = samples.windows[unjittered]
    np.testing.assert_allclose(windows[:, :2] + windows[:, 2:], boxes[:, :2] + boxes[:, 2:])
    halves = 2 * np.log2(WINDOW / (windows[:, 2] - windows[:, 0]))
    np.testing.assert_allclose(halves, halves.round())
    canonical = object_windows(torch.from_numpy(boxes), WINDOW).numpy()
    octaves = np.log2((windows[:, 2] - windows[:, 0]) / (canonical[:, 2] - canonical[:, 0]))
    assert np.abs(octaves).max() <= 0.25


@pytest.mark.parametrize("mask_fraction", [0.0, 0.3, 1.0])
def test_fractions_hold_on_average_with_few_patches(mask_fraction):
    sampler, rng = make_sampler(mask_fraction=mask_fraction), np.random.default_rng(0)
    drawn = [sampler(image_objects(SPREAD), np.ones(3), (300, 600), 3, rng) for _ in range(400)]
    assert all(len(samples.windows) == 3 for samples in drawn)
    assert np.mean([samples.in_mask_loss.mean() for samples in drawn]) == pytest.approx(mask_fraction, abs=0.02)
    still = np.mean([(samples.labels == 1)[samples.in_score_loss].sum() / 3 for samples in drawn])
    assert still == pytest.approx((1 - mask_fraction) / 2, abs=0.02)


@pytest.mark.parametrize("boxes", [[], [(10, 10, 13, 13)]], ids=["no objects", "no targets"])
@pytest.mark.parametrize("shared_positives", [False, True])
def test_without_targets_all_windows_are_negatives(boxes, shared_positives):
    objects = image_objects(boxes, targets=[False] * len(boxes))
    sampler = make_sampler(shared_positives=shared_positives, near_negatives=0.5)
    samples = sampler(objects, np.zeros(len(boxes)), (300, 600), 50, np.random.default_rng(0))
    assert len(samples.windows) == 50
    assert not samples.labels.any()
    assert not samples.in_mask_loss.any()
    assert samples.in_score_loss.all()
    assert (samples.objects == -1).all()
    assert (label(samples.windows, objects, RELEASED)[0] == 0).all()


def test_no_negative_is_centred_in_a_crowd():
    objects = image_objects(SPREAD[:1], crowd_boxes=[(100, 0, 350, 300), (400, 100, 600, 300)])
    sampler = make_sampler(mask_fraction=0.0, shared_positives=True)
    samples = sampler(objects, np.ones(1), (300, 600), 300, np.random.default_rng(0))
    x, y = ((samples.windows[:, :2] + samples.windows[:, 2:]) / 2).T
    assert (x < 100).any()
    assert ((x > 350) & (y < 100)).any()
    for x0, y0, x1, y1 in objects.crowd_boxes:
        assert not ((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).any()


def test_a_window_is_drawn_even_where_there_is_no_negative():
    objects = image_objects(SPREAD[:1], crowd_boxes=[(-1, -1, 601, 301)])
    samples = make_sampler(mask_fraction=0.0)(objects, np.zeros(1), (300, 600), 7, np.random.default_rng(0))
    assert samples.windows.shape == (7, 4)
    assert not samples.labels.any()


def test_objects_are_drawn_in_proportion_to_their_weights():
    sampler = make_sampler(mask_fraction=1.0)
    samples = sampler(image_objects(SPREAD), np.array([3.0, 0.0, 1.0]), (300, 600), 4000, np.random.default_rng(0))
    shares = np.bincount(samples.objects, minlength=3) / 4000
    assert shares[1] == 0
    assert shares == pytest.approx([0.75, 0, 0.25], abs=0.03)


# ------------------------------------------------------------------ objects of a dataset dict


def one_annotation(**changes):
    polygon = draw_polygon("rectangle", (10, 10, 50, 40))
    annotation = {"bbox": [10, 10, 40, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": [polygon]}
    return {"image_id": 17, "file_name": "somewhere/17.png", "annotations": [{**annotation, **changes}]}


def test_tiny_objects_are_not_targets():
    square = {"bbox": [10, 10, 10, 10], "segmentation": [draw_polygon("rectangle", (10, 10, 20, 20))]}
    sliver = {"bbox": [10, 10, 90, 4], "segmentation": [draw_polygon("rectangle", (10, 10, 100, 14))]}
    speck = {"bbox": [10, 10, 12, 12], "segmentation": [draw_polygon("triangle", (10, 10, 22, 22))]}
    for changes, expected in ((square, True), (sliver, False), (speck, False)):
        objects = read_objects(one_annotation(**changes), min_area=100, min_side=5)
        assert objects.targets.tolist() == [expected]
        bitmap = polygon_mask(changes["segmentation"][0], (40, 120))
        rle = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
        objects = read_objects(one_annotation(**{**changes, "segmentation": rle}), min_area=100, min_side=5)
        assert objects.targets.tolist() == [expected]


def test_crowds_are_not_objects():
    objects = read_objects(one_annotation(iscrowd=1, segmentation=None), min_area=100, min_side=5)
    assert len(objects.boxes) == len(objects.segmentations) == len(objects.categories) == len(objects.targets) == 0
    assert objects.crowd_boxes.tolist() == [[10, 10, 50, 40]]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "no segmentation"),
        ({}, "no segmentation"),
        ([], "no polygon"),
        ([[1, 2, 3, 4]], "no polygon"),
        ([[1, 2, 3, 4, 5, 6, 7]], "no polygon"),
    ],
)
def test_broken_segmentations_name_the_image(segmentation, message):
    with pytest.raises(ValueError, match=rf"annotation 0 of image 17 \(somewhere/17.png\).*{message}"):
        read_objects(one_annotation(segmentation=segmentation), min_area=100, min_side=5)


def test_degenerate_polygons_beside_good_ones_are_left_out():
    good = draw_polygon("rectangle", (10, 10, 50, 40))
    objects = read_objects(one_annotation(segmentation=[[1, 2, 3, 4], good]), min_area=100, min_side=5)
    assert objects.segmentations == [[good]]


# ------------------------------------------------------------------ patches


def load(dataset):
    """Detectron2's dataset dicts of a drawn dataset."""
    return load_coco_json(str(dataset.annotations), str(dataset.image_root))


def make_mapper(cfg, **options):
    return PatchMapper(cfg, category_weights={}, **options)


def colored(patch):
    """Which pixels of a patch (3, S, S) belong to drawn objects: these are coloured, the background is grey."""
    return (patch.max(0) - patch.min(0)) > 90


def window_of(patch, context=32):
    return patch[..., context // 2 : -context // 2, context // 2 : -context // 2]


def equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key], key


def test_mapper_makes_the_inputs_of_the_network(make_dataset, tiny_cfg, tmp_path):
    sample = make_mapper(tiny_cfg)(load(make_dataset(tmp_path))[0], np.random.default_rng(0))
    assert {name: (tuple(value.shape), value.dtype) for name, value in sample.items() if torch.is_tensor(value)} == {
        "patches": ((4, 3, 192, 192), torch.uint8),
        "masks": ((4, 160, 160), torch.uint8),
        "labels": ((4,), torch.int64),
        "in_mask_loss": ((4,), torch.bool),
        "in_score_loss": ((4,), torch.bool),
    }
    assert sample["image_id"] == 1
    assert sample["file_name"].endswith("1.png")
    assert sample["masks"].max() == 1
    assert (sample["masks"].flatten(1).any(1) == (sample["labels"] == 1)).all()
    tiny_cfg.MODEL.SHARPMASK.REFINEMENT.NAME = "none"
    assert make_mapper(tiny_cfg).mask_size == 112
    assert make_mapper(tiny_cfg, is_train=False).mask_size == 160


def test_patch_is_the_window_with_context_around_it(picture, tiny_cfg):
    """A window of 80 pixels becomes the central 160 pixels of a patch of 192, which covers 96 pixels of the image."""
    objects, window = image_objects([(5, 5, 45, 30)]), np.array([[-10.0, -20, 70, 60]])
    one = np.ones(1, bool)
    mapper = make_mapper(tiny_cfg)
    mapper.flip = False
    mapper.sampler = lambda *_: WindowSamples(window, np.ones(1, int), np.zeros(1, int), one, one)
    sample = mapper.cut(picture, objects, np.random.default_rng(0))
    expected = cut_region(picture, (-18, -28, 96), 192, 127.5)
    np.testing.assert_array_equal(sample["patches"][0].permute(1, 2, 0), expected)
    np.testing.assert_array_equal(sample["masks"][0], render_mask(objects.segmentations[0], (-10, -20, 80), 160))


@pytest.mark.parametrize("exif", [False, True], ids=["upright", "exif"])
@pytest.mark.parametrize("rle", [False, True], ids=["polygons", "rle"])
def test_masks_lie_on_the_drawn_objects(make_dataset, tiny_cfg, tmp_path, exif, rle):
    """For all shifts, scales, flips and borders, the coloured pixels of a patch are those of its mask."""
    tiny_cfg.MODEL.SHARPMASK.SAMPLING.MASK_FRACTION = 1.0
    dataset = make_dataset(tmp_path, num_images=2, objects_per_image=1, size=(90, 130), exif=exif, rle=rle)
    mapper = make_mapper(tiny_cfg)
    for seed, dataset_dict in itertools.product(range(5), load(dataset)):
        sample = mapper(dataset_dict, np.random.default_rng(seed))
        assert sample["labels"].all()
        for patch, mask in zip(sample["patches"].numpy(), sample["masks"].numpy()):
            # 0.9, because enlarging an object of 30 pixels blurs its edge, and JPEG adds blocks.
            assert iou(window_of(colored(patch)), mask) > 0.9


def test_rle_and_polygons_give_equal_patches(make_dataset, tiny_cfg, tmp_path):
    mapper = make_mapper(tiny_cfg)
    dicts = [load(make_dataset(tmp_path / str(rle), size=(240, 330), rle=rle)) for rle in (False, True)]
    for pair in zip(*dicts):
        a, b = (mapper(dataset_dict, np.random.default_rng(3)) for dataset_dict in pair)
        assert torch.equal(a["patches"], b["patches"])
        for mask, other in zip(a["masks"], b["masks"]):
            assert not mask.any() or iou(mask, other) > 0.96


def test_uncompressed_rle_is_read(make_dataset, tiny_cfg, tmp_path):
    dataset = make_dataset(tmp_path, crowd=True)
    content = json.loads(dataset.annotations.read_text())
    (crowd,) = (a for a in content["annotations"] if a["iscrowd"])
    assert isinstance(crowd["segmentation"]["counts"], list)
    bitmap = coco_mask.decode(coco_mask.frPyObjects(crowd["segmentation"], 120, 160))
    objects = read_objects(one_annotation(segmentation=crowd["segmentation"]), min_area=100, min_side=5)
    np.testing.assert_array_equal(coco_mask.decode(objects.segmentations[0]), bitmap)
    assert objects.targets.all()


def test_crowds_of_a_dataset_are_not_targets(make_dataset, tiny_cfg, tmp_path):
    mapper = make_mapper(tiny_cfg)
    plain, crowded = (
        mapper.objects(load(make_dataset(tmp_path / str(crowd), crowd=crowd))[0]) for crowd in (False, True)
    )
    assert (len(plain.boxes), len(plain.crowd_boxes)) == (3, 0)
    assert (len(crowded.boxes), len(crowded.crowd_boxes)) == (2, 1)
    np.testing.assert_array_equal(crowded.crowd_boxes[0], plain.boxes[2])


def test_greyscale_image(make_dataset, tiny_cfg, tmp_path):
    tiny_cfg.MODEL.SHARPMASK.SAMPLING.MASK_FRACTION = 1.0
    dataset = make_dataset(tmp_path, num_images=1, objects_per_image=1, grey=True)
    assert Image.open(dataset.image_root / "1.png").mode == "L"
    sample = make_mapper(tiny_cfg)(load(dataset)[0], np.random.default_rng(0))
    patches = sample["patches"].numpy()
    np.testing.assert_array_equal(patches, patches[:, :1].repeat(3, axis=1))
    assert min(iou(window_of(p[0]) > 185, m) for p, m in zip(patches, sample["masks"].numpy())) > 0.9


def test_channel_order(make_dataset, tiny_cfg, tmp_path):
    (dataset_dict,) = load(make_dataset(tmp_path, num_images=1))
    tiny_cfg.MODEL.SHARPMASK.SAMPLING.COLOR_JITTER = 0.3
    rgb = make_mapper(tiny_cfg)(dataset_dict, np.random.default_rng(0))["patches"]
    tiny_cfg.INPUT.FORMAT = "BGR"
    bgr = make_mapper(tiny_cfg)(dataset_dict, np.random.default_rng(0))["patches"]
    assert torch.equal(rgb, bgr.flip(1))
    assert not torch.equal(rgb, bgr)


def test_flips_mirror_patch_and_mask(make_dataset, tiny_cfg, tmp_path):
    (dataset_dict,) = load(make_dataset(tmp_path, num_images=1))
    flipping, plain = make_mapper(tiny_cfg), make_mapper(tiny_cfg)
    plain.flip = False
    flips = 0
    for seed in range(10):
        a, b = (mapper(dataset_dict, np.random.default_rng(seed)) for mapper in (flipping, plain))
        assert torch.equal(a["labels"], b["labels"])
        for i in range(4):
            flipped = not torch.equal(a["patches"][i], b["patches"][i])
            flips += flipped
            for key in ("patches", "masks"):
                assert torch.equal(a[key][i], b[key][i].flip(-1) if flipped else b[key][i])
    assert 8 < flips < 32


def test_mapper_is_deterministic(make_dataset, tiny_cfg, tmp_path):
    tiny_cfg.MODEL.SHARPMASK.SAMPLING.COLOR_JITTER = 0.2
    mapper, (dataset_dict,) = make_mapper(tiny_cfg), load(make_dataset(tmp_path, num_images=1))
    equal(*(mapper(dataset_dict, np.random.default_rng(5)) for _ in range(2)))
    other = mapper(dataset_dict, np.random.default_rng(6))
    assert not torch.equal(mapper(dataset_dict, np.random.default_rng(5))["patches"], other["patches"])


def test_color_jitter_moves_brightness_contrast_and_saturation(make_dataset, tiny_cfg, tmp_path):
    tiny_cfg.MODEL.SHARPMASK.SAMPLING.COLOR_JITTER = 0.4
    mapper, (dataset_dict,) = make_mapper(tiny_cfg), load(make_dataset(tmp_path, num_images=1, objects_per_image=6))
    sample = [mapper(dataset_dict, np.random.default_rng(seed))["patches"].float() for seed in range(12)]
    spread = torch.tensor([[x.mean(), (x.amax(1) - x.amin(1)).amax()] for x in sample])
    assert (spread.std(dim=0) > 3).all()


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((1, 1, 1), [[10, 40, 100], [60, 90, 60]]),
        ((0, 1, 1), [[50, 50, 50], [70, 70, 70]]),
        ((0.5, 1, 1), [[30, 45, 75], [65, 80, 65]]),
        ((1, 0, 1), [[60, 60, 60], [60, 60, 60]]),
        ((1, 0.5, 1), [[35, 50, 80], [60, 75, 60]]),
        ((1, 1, 2), [[20, 80, 200], [120, 180, 120]]),
        ((0.5, 0.5, 2), [[90, 105, 135], [125, 140, 125]]),
    ],
)
def test_saturation_contrast_and_brightness(factors, expected):
    """Saturation moves values towards the pixel's mean (50 and 70), contrast towards the image's mean (60), brightness away from black."""

    class Given:
        def uniform(self, low, high, count):
            return factors

    image = np.array([[[10, 40, 100], [60, 90, 60]]], np.uint8)
    np.testing.assert_array_equal(_jitter_colors(image, 0.2, Given()), [expected])


def test_image_without_objects_gives_negatives(make_dataset, tiny_cfg, tmp_path):
    dataset_dict = load(make_dataset(tmp_path, empty=True))[-1]
    assert not dataset_dict["annotations"]
    sample = make_mapper(tiny_cfg)(dataset_dict, np.random.default_rng(0))
    assert not sample["labels"].any()
    assert not sample["masks"].any()


@pytest.mark.parametrize("fault", ["missing", "empty", "text", "cut png", "cut jpeg", "folder"])
def test_unreadable_images_are_named(make_dataset, tiny_cfg, tmp_path, fault):
    dataset = make_dataset(tmp_path, num_images=1, exif=fault == "cut jpeg")
    (dataset_dict,) = load(dataset)
    (path,) = dataset.image_root.iterdir()
    content = path.read_bytes()
    path.unlink()
    if fault == "folder":
        path.mkdir()
    elif fault != "missing":
        path.write_bytes({"empty": b"", "text": b"no image"}.get(fault, content[: len(content) // 2]))
    with pytest.raises(OSError, match=f"cannot read image 1, .*{path.name}"):
        make_mapper(tiny_cfg)(dataset_dict, np.random.default_rng(0))


def test_image_of_another_size_is_named(make_dataset, tiny_cfg, tmp_path):
    (dataset_dict,) = load(make_dataset(tmp_path, num_images=1))
    dataset_dict["height"] = 121
    with pytest.raises(ValueError, match=r"image 1, .*1\.png, has \(120, 160\).*\(121, 160\)"):
        make_mapper(tiny_cfg)(dataset_dict, np.random.default_rng(0))


def test_annotation_without_mask_is_named(make_dataset, tiny_cfg, tmp_path):
    dataset_dict = load(make_dataset(tmp_path))[1]
    del dataset_dict["annotations"][2]["segmentation"]
    with pytest.raises(ValueError, match=r"annotation 2 of image 2 .*no segmentation"):
        make_mapper(tiny_cfg)(dataset_dict, np.random.default_rng(0))


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_instances_of_detectron2s_mapper(make_dataset, tiny_cfg, tmp_path, mask_format):
    dataset_dict = load(make_dataset(tmp_path, num_images=1, crowd=True))[0]
    stock = DatasetMapper(
        is_train=True, augmentations=[], image_format="RGB", use_instance_mask=True, instance_mask_format=mask_format
    )
    mapped = stock(dataset_dict)
    mapper = make_mapper(tiny_cfg)
    sample = mapper.cut_instances(mapped["image"], mapped["instances"], np.random.default_rng(0))
    # The list of objects without its crowd, read by our mapper.
    dataset_dict["annotations"] = [a for a in dataset_dict["annotations"] if not a["iscrowd"]]
    own = mapper(dataset_dict, np.random.default_rng(0))
    for key in ("patches", "labels", "in_mask_loss", "in_score_loss"):
        assert torch.equal(sample[key], own[key]), key
    for mask, other in zip(sample["masks"], own["masks"]):
        assert not other.any() or iou(mask, other) > (0.9999 if mask_format == "polygon" else 0.92)


def test_instances_without_masks(make_dataset, tiny_cfg, tmp_path):
    mapped = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")(load(make_dataset(tmp_path))[0])
    with pytest.raises(ValueError, match="MASK_ON"):
        make_mapper(tiny_cfg).cut_instances(mapped["image"], mapped["instances"], np.random.default_rng(0))


def test_instances_of_an_image_without_objects(make_dataset, tiny_cfg, tmp_path):
    stock = DatasetMapper(is_train=True, augmentations=[], image_format="RGB", use_instance_mask=True)
    mapped = stock(load(make_dataset(tmp_path, empty=True))[-1])
    assert isinstance(mapped["instances"], Instances)
    assert not mapped["instances"].has("gt_masks")
    sample = make_mapper(tiny_cfg).cut_instances(mapped["image"], mapped["instances"], np.random.default_rng(0))
    assert sample["patches"].shape == (4, 3, 192, 192)
    assert not sample["labels"].any()


# ------------------------------------------------------------------ batches


@pytest.fixture
def batches(make_dataset, tiny_cfg, tmp_path):
    """A function that makes a stream of batches, of which `start` is the first."""
    dicts = load(make_dataset(tmp_path, num_images=5, rle=True, crowd=True))

    def make(start=0, seed=1):
        return PatchBatches(dicts, make_mapper(tiny_cfg), total_batch_size=2, seed=seed, start=start)

    return make


def first(stream, count):
    return list(itertools.islice(iter(stream), count))


def assert_same_batches(a, b):
    assert len(a) == len(b) > 0
    for batch, other in zip(a, b):
        assert len(batch) == len(other) == 2
        for image, same in zip(batch, other):
            equal(image, same)


def test_batches_depend_on_their_number_only(batches):
    stream = first(batches(), 5)
    assert_same_batches(first(batches(), 5), stream)
    assert_same_batches(first(batches(start=3), 2), stream[3:])
    assert not torch.equal(stream[0][0]["patches"], stream[1][0]["patches"])
    assert not torch.equal(stream[0][0]["patches"], first(batches(seed=2), 1)[0][0]["patches"])


def test_processes_share_the_batches(batches, monkeypatch):
    """Two processes have the images of one, with equal patches."""
    whole = first(batches(), 3)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        parts.append(first(batches(), 3))
    assert_same_batches([[*pair[0], *pair[1]] for pair in zip(*parts)], whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_same_batches_with_any_number_of_workers(batches, num_workers):
    loader = ResumableLoader(batches(), num_workers=num_workers)
    assert_same_batches(first(loader, 3), first(batches(), 3))
    iterator = iter(loader)
    # A trainer asks for the iterator first and resumes later.
    loader.start = 2
    assert_same_batches(list(itertools.islice(iterator, 2)), first(batches(start=2), 2))


def test_workers_start_after_opencv_ran_in_threads(batches):
    def give_up(*_):
        raise TimeoutError("the worker waits for OpenCV's threads, which it has not inherited")

    cv2.setNumThreads(2)
    cv2.resize(np.zeros((1000, 1000, 3), np.uint8), (1500, 1500), interpolation=cv2.INTER_LINEAR)
    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        assert_same_batches(first(ResumableLoader(batches(), num_workers=1), 1), first(batches(), 1))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_only_images_with_targets_are_read(make_dataset, tiny_cfg, tmp_path):
    dicts = load(make_dataset(tmp_path, num_images=2, empty=True))
    dicts[0]["annotations"] = dicts[0]["annotations"][:1]
    stream = PatchBatches(dicts, make_mapper(tiny_cfg), total_batch_size=2, seed=0)
    # In proportion to their objects: all objects of the dataset are equally likely.
    np.testing.assert_allclose(stream.probabilities, [1 / 4, 3 / 4, 0])
    drawn = [image["image_id"] for batch in first(stream, 20) for image in batch]
    assert set(drawn) == {1, 2}
    assert 20 < drawn.count(2) < 38


def test_a_dataset_without_targets_is_named(make_dataset, tiny_cfg, tmp_path):
    tiny_cfg.MODEL.SHARPMASK.SAMPLING.MIN_AREA = 1e6
    dicts = load(make_dataset(tmp_path))
    for some in (dicts, [dict(d, annotations=[]) for d in dicts]):
        with pytest.raises(ValueError, match=r"DATASETS\.TRAIN.*MIN_AREA"):
            PatchBatches(some, make_mapper(tiny_cfg), total_batch_size=2, seed=0)


@pytest.fixture
def registered(make_dataset, tmp_path):
    """Name of a registered dataset of four images, the last without objects."""
    dataset = make_dataset(tmp_path, num_images=3, empty=True)
    name = "drawn_for_test_data"
    register_datasets([(name, str(dataset.annotations), str(dataset.image_root))])
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_train_loader_from_a_config(registered, tiny_cfg):
    tiny_cfg.DATASETS.TRAIN = (registered,)
    loader = build_patch_train_loader(tiny_cfg)
    assert_same_batches(first(loader, 2), first(build_patch_train_loader(tiny_cfg), 2))
    assert loader.batches.mapper.category_weights.keys() == {0, 1}
    tiny_cfg.MODEL.SHARPMASK.SAMPLING.BALANCE_CATEGORIES = False
    assert build_patch_train_loader(tiny_cfg).batches.mapper.category_weights == {}


def test_batch_size_has_to_be_a_multiple_of_the_processes(registered, tiny_cfg, monkeypatch):
    tiny_cfg.DATASETS.TRAIN = (registered,)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 2.*3 processes"):
        build_patch_train_loader(tiny_cfg)


def test_balanced_categories_are_drawn_equally_often(registered, tiny_cfg):
    """Category 0 has two objects per image, category 1 one. Objects that are too small for targets have no effect."""
    dicts = DatasetCatalog.get(registered)
    speck = dict(dicts[0]["annotations"][0], bbox=[1, 1, 4, 4], category_id=1)
    speck["segmentation"] = [draw_polygon("rectangle", (1, 1, 5, 5))]
    dicts[0]["annotations"] += [speck] * 5
    DatasetCatalog.remove(registered)
    DatasetCatalog.register(registered, lambda: dicts)
    tiny_cfg.DATASETS.TRAIN = (registered,)
    stream = build_patch_train_loader(tiny_cfg).batches
    share = np.zeros(2)
    for dataset_dict, probability in zip(stream.dicts, stream.probabilities):
        objects = stream.mapper.objects(dataset_dict)
        weights = stream.mapper.weights(objects)
        share += probability * np.bincount(objects.categories, weights / weights.sum(), minlength=2)
    np.testing.assert_allclose(share, 0.5)


def test_patches_for_evaluation_are_fixed(registered, tiny_cfg, monkeypatch):
    batches = list(build_patch_test_loader(tiny_cfg, registered))
    assert [len(batch) for batch in batches] == [1, 1, 1]  # the image without objects is left out
    for batch, again in zip(batches, build_patch_test_loader(tiny_cfg, registered)):
        equal(batch[0], again[0])
    assert [batch[0]["image_id"] for batch in batches] == [1, 2, 3]
    for sample in (batch[0] for batch in batches):
        assert sample["in_mask_loss"].sum() == (sample["labels"] == 1).sum() == 2
        assert sample["in_score_loss"].all()
    # One of several processes gets equal patches of its images.
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    (share,) = build_patch_test_loader(tiny_cfg, registered)
    equal(share[0], batches[1][0])


@pytest.mark.parametrize("missing", ["annotation file", "image folder"])
def test_registering_missing_files_is_an_error(make_dataset, tmp_path, missing):
    dataset = make_dataset(tmp_path)
    json_file, image_root = str(dataset.annotations), str(dataset.image_root)
    wrong = str(tmp_path / "nowhere")
    entry = ("absent", wrong, image_root) if missing == "annotation file" else ("absent", json_file, wrong)
    with pytest.raises(FileNotFoundError, match=f"dataset absent: there is no {missing} {wrong}"):
        register_datasets([entry])
    assert "absent" not in DatasetCatalog


def test_registering_twice_keeps_the_first(registered, make_dataset, tmp_path):
    other = make_dataset(tmp_path / "other", num_images=1)
    register_datasets([(registered, str(other.annotations), str(other.image_root))])
    assert len(DatasetCatalog.get(registered)) == 4


def test_category_weights_do_not_count_crowds(make_dataset, tiny_cfg, tmp_path):
    dicts = load(make_dataset(tmp_path, num_images=2, objects_per_image=4, crowd=True))
    mapper = make_mapper(tiny_cfg)
    raw = [a["category_id"] for d in dicts for a in d["annotations"] if not a["iscrowd"]]
    expected = {category: 1 / raw.count(category) for category in set(raw)}
    assert len(set(expected.values())) == 2
    assert category_weights([mapper.objects(d) for d in dicts]) == expected
