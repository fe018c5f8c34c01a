"""Large-scale jitter against numpy's padding, and what the loader makes of drawn images."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import itertools
import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.utils.env import seed_all_rng
from drawing import draw_dataset, draw_polygon, polygon_mask
from PIL import Image
from sharpmask_d2.data import register_datasets
from sharpmask_d2.data.scale_jitter import (
    CutTransform,
    RandomCut,
    build_jitter_augmentations,
    build_jitter_train_loader,
)

SIZE = (40, 56)
# x0, y0, width, height.
CUTS = {
    "inside": (7, 5, 20, 30),
    "all": (0, 0, 56, 40),
    "left": (-6, 5, 20, 30),
    "top": (7, -9, 20, 30),
    "right": (45, 5, 20, 30),
    "bottom": (7, 25, 20, 30),
    "corner": (-8, 30, 40, 25),
    "around": (-10, -3, 90, 60),
    "across": (-10, 8, 90, 12),
    "beyond the left": (-30, 5, 20, 30),
    "beyond the top": (7, -32, 20, 30),
    "beyond the bottom": (7, 60, 20, 30),
    "beside the right": (56, 0, 20, 30),
}
NAME = "bright_on_dark"


def padded_cut(x, x0, y0, width, height, fill):
    """Padded so far that every window is inside."""
    margin = 100
    sides = [(margin, margin), (margin, margin), *[(0, 0)] * (x.ndim - 2)]
    padded = np.pad(x, sides, constant_values=fill)
    return padded[margin + y0 : margin + y0 + height, margin + x0 : margin + x0 + width]


# --------------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("shape", [(*SIZE, 3), SIZE])
def test_cuts_are_those_of_the_padded_image(cut, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before = image.copy()
    transform = CutTransform(*cut, 127.5)
    found = transform.apply_image(image)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, padded_cut(image, *cut, 127))
    # Nothing is outside of the image.
    np.testing.assert_array_equal(transform.apply_segmentation(image), padded_cut(image, *cut, 0))
    found[:] = 0
    np.testing.assert_array_equal(image, before)


def test_filling_keeps_its_fraction_in_images_of_floats():
    found = CutTransform(-1, -2, 8, 6, 127.5).apply_image(np.zeros((4, 4), dtype=np.float32))
    assert found.dtype == np.float32
    assert (found == 127.5).sum() == 8 * 6 - 16


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_coordinates_move_by_the_corner(dtype):
    coords = np.array([[0, 0], [3.25, 9.5], [-7, 100]], dtype=dtype)
    before = coords.copy()
    found = CutTransform(-6, 11, 20, 30, 0).apply_coords(coords)
    np.testing.assert_array_equal(found, np.array([[6, -11], [9.25, -1.5], [-1, 89]]))
    assert found.dtype == dtype
    np.testing.assert_array_equal(coords, before)
    np.testing.assert_array_equal(CutTransform(4, 2, 9, 9, 0).apply_box(np.array([[1.0, 2, 8, 9]])), [[-3, 0, 4, 7]])


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("shape", ["rectangle", "ellipse", "triangle"])
def test_polygons_stay_on_what_they_outline(cut, shape):
    """Rasterised in the cut they are the cut of what they are in the image: moved whole, not clipped corner by corner."""
    polygon = draw_polygon(shape, (10, 6, 50, 36))
    (moved,) = CutTransform(*cut, 0).apply_polygons([np.array(polygon).reshape(-1, 2)])
    assert moved.shape == (len(polygon) // 2, 2)
    found = polygon_mask(moved.ravel().tolist(), (cut[3], cut[2]))
    expected = padded_cut(polygon_mask(polygon, SIZE), *cut, False)
    assert_agree(found, expected, near=1)
    # At the borders of a cut pycocotools rounds otherwise, but no more than a pixel in a row.
    assert (found != expected).sum() <= 0.1 * max(expected.sum(), 10)


def assert_agree(found, expected, *, near, border=0):
    """Masks that differ nowhere but within `near` pixels of where the expected one changes, and in `border` pixels at the border."""
    kernel = np.ones((2 * near + 1,) * 2, dtype=np.uint8)
    mask = expected.astype(np.uint8)
    # Without cv2's border, so that the image's edge is no edge of the mask.
    sure = cv2.erode(mask, kernel) > 0
    possible = cv2.dilate(mask, kernel) > 0
    wrong = (~found & sure) | (found & ~possible)
    assert not wrong[border : len(wrong) - border, border : wrong.shape[1] - border].any()


@pytest.mark.parametrize(
    "size", [(100, 140), (30, 50), (100, 50), (30, 140), (64, 64), (65, 63), (1, 200)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_random_cuts_stay_in_the_image_or_hold_it(size):
    seed_all_rng(0)
    image = np.zeros((*size, 3), dtype=np.uint8)
    cuts = [RandomCut(64).get_transform(image) for _ in range(300)]
    assert {(cut.width, cut.height, cut.fill) for cut in cuts} == {(64, 64, 127.5)}
    for side, starts in ((size[0], [cut.y0 for cut in cuts]), (size[1], [cut.x0 for cut in cuts])):
        room = side - 64
        # A larger image holds the cut, a smaller one lies within it; either way it may touch both ends.
        assert all(min(room, 0) <= start <= max(room, 0) for start in starts)
        assert max(starts) - min(starts) >= 0.9 * abs(room)
        assert abs(np.mean(starts) - room / 2) <= 0.1 * abs(room)
    assert {cut.apply_image(image).shape for cut in cuts} == {(64, 64, 3)}


def test_both_sides_are_drawn_apart():
    seed_all_rng(0)
    image = np.zeros((164, 164, 3), dtype=np.uint8)
    places = np.array([(cut.y0, cut.x0) for cut in (RandomCut(64).get_transform(image) for _ in range(300))])
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.2


@pytest.mark.parametrize("flip", ["horizontal", "none"])
@pytest.mark.parametrize("color", [0.0, 0.3])
def test_augmentations_are_those_configured(cfg, flip, color):
    cfg.INPUT.RANDOM_FLIP = flip
    cfg.INPUT.SCALE_JITTER.COLOR = color
    augmentations = build_jitter_augmentations(cfg)
    expected = [T.ResizeScale, RandomCut]
    expected += [T.RandomFlip] * (flip == "horizontal")
    expected += [T.RandomBrightness, T.RandomContrast, T.RandomSaturation] * bool(color)
    assert [type(x) for x in augmentations] == expected
    assert augmentations[1].side == cfg.INPUT.SCALE_JITTER.CROP
    for x in augmentations:
        if hasattr(x, "intensity_min"):
            assert (x.intensity_min, x.intensity_max) == (pytest.approx(0.7), pytest.approx(1.3))


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (200, 300)])
def test_a_scale_of_one_gives_the_longer_side_configured(cfg, size):
    cfg.INPUT.SCALE_JITTER.MIN_SCALE = cfg.INPUT.SCALE_JITTER.MAX_SCALE = 0.5
    cfg.INPUT.SCALE_JITTER.SIDE = 240
    transform = build_jitter_augmentations(cfg)[0].get_transform(np.zeros((*size, 3), dtype=np.uint8))
    longer = max(size)
    assert (transform.new_h, transform.new_w) == tuple(round(side * 120 / longer) for side in size)


# ------------------------------------------------------------------------------------------------------------------- loader


@pytest.fixture
def cfg(tiny_cfg):
    """Crops of 96 pixels from images of 75 to 225."""
    cfg = tiny_cfg.clone()
    cfg.MODEL.MASK_ON = True
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.INPUT.FORMAT = "RGB"
    jitter = cfg.INPUT.SCALE_JITTER
    jitter.ENABLED = True
    jitter.SIDE, jitter.MIN_SCALE, jitter.MAX_SCALE = 150, 0.5, 1.5
    jitter.CROP = 96
    jitter.COLOR = 0.0
    cfg.SOLVER.IMS_PER_BATCH = 4
    return cfg


@pytest.fixture
def register():
    names = []

    def add(data):
        register_datasets([(NAME, str(data.annotations), str(data.image_root))])
        names.append(NAME)
        return data

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def bright_on_dark(folder, **options):
    """Objects of 255 on 0, which no filling equals."""
    data = draw_dataset(folder, size=(120, 160), objects_per_image=5, **options)
    for image_id, masks in data.masks.items():
        pixels = np.zeros((120, 160, 3), dtype=np.uint8)
        for mask in masks:
            pixels[mask] = 255
        Image.fromarray(pixels).save(data.image_root / f"{image_id}.png")
    return data


def batches(cfg, count):
    seed_all_rng(0)
    return [x for batch in itertools.islice(build_jitter_train_loader(cfg), count) for x in batch]


@pytest.mark.parametrize("rle", [False, True])
@pytest.mark.parametrize("flip", ["horizontal", "none"])
def test_masks_lie_on_what_the_image_shows(cfg, register, tmp_path, rle, flip):
    register(bright_on_dark(tmp_path / "data", rle=rle))
    cfg.INPUT.RANDOM_FLIP = flip
    examples = batches(cfg, 8)
    assert len(examples) == 32
    clipped, outside, counts = 0, 0, set()
    for example in examples:
        image, instances = example["image"].numpy(), example["instances"]
        assert image.shape == (3, 96, 96)
        assert image.dtype == np.uint8
        assert instances.image_size == (96, 96)
        if not len(instances):
            assert not (image == 255).any()
            continue
        masks = instances.gt_masks.tensor.numpy()
        assert masks.shape == (len(instances), 96, 96)
        assert masks.dtype == bool
        counts.add(len(masks))
        # Objects do not touch, so they have no pixel in common.
        assert masks.sum(0).max() <= 1
        # The filling is 127. An edge that is nearly on the border may be seen on one side of it.
        assert_agree(image[0] > 127, masks.any(0), near=1, border=1)
        assert_agree(masks.any(0), image[0] > 127, near=1, border=1)
        outside += (image == 127).all(0).any()
        for mask, box in zip(masks, instances.gt_boxes.tensor.tolist()):
            ys, xs = np.nonzero(mask)
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            clipped += 0 in box[:2] or 96 in box[2:]
        assert set(instances.gt_classes.tolist()) <= {0, 1}
    # What makes this hard happened: crops of a part, objects cut in two, images smaller than the crop.
    assert clipped > 5
    assert outside > 3
    assert len(counts) > 1


def test_flips_are_drawn(cfg, register, tmp_path):
    """Half of the images are mirrored, and their masks with them."""
    data = bright_on_dark(tmp_path / "data", num_images=1)
    register(data)
    cfg.INPUT.SCALE_JITTER.MIN_SCALE = cfg.INPUT.SCALE_JITTER.MAX_SCALE = 1.0
    cfg.INPUT.SCALE_JITTER.SIDE = cfg.INPUT.SCALE_JITTER.CROP = 160
    drawn = np.any(data.masks[1], axis=0)
    mirrored = 0
    for example in batches(cfg, 8):
        found = example["instances"].gt_masks.tensor.any(0).numpy()
        # The image is as it is, at any height in the square.
        rows = np.flatnonzero((example["image"][0] != 127).all(1).numpy())
        assert len(rows) == 120
        found = found[rows[0] : rows[0] + 120]
        if not np.array_equal(found, drawn):
            # A polygon that is mirrored first may lose or win a pixel on its edge.
            assert (found[:, ::-1] != drawn).sum() < 10 < (found != drawn).sum()
            mirrored += 1
    assert 6 < mirrored < 26


def test_colours_change_in_the_image_alone(cfg, register, tmp_path):
    register(bright_on_dark(tmp_path / "data"))
    cfg.INPUT.SCALE_JITTER.COLOR = 0.5
    cfg.INPUT.RANDOM_FLIP = "none"
    brightest = {example["image"].max().item() for example in batches(cfg, 3)}
    assert len(brightest) > 1


@pytest.mark.parametrize("mask_on", [True, False])
def test_images_without_objects_are_read_where_they_are_asked_for(cfg, register, tmp_path, mask_on):
    data = draw_dataset(tmp_path / "data", num_images=1, empty=True)
    register(data)
    cfg.MODEL.MASK_ON = mask_on
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    counts = [len(example["instances"]) for example in batches(cfg, 4)]
    assert 0 in counts
    assert max(counts) > 0


def test_crowds_are_no_objects(cfg, register, tmp_path):
    data = draw_dataset(tmp_path / "data", num_images=1, crowd=True)
    register(data)
    cfg.INPUT.SCALE_JITTER.MIN_SCALE = cfg.INPUT.SCALE_JITTER.MAX_SCALE = 0.5
    assert {len(example["instances"]) for example in batches(cfg, 2)} == {len(data.masks[1])}
    assert sum(a["iscrowd"] for a in json.loads(data.annotations.read_text())["annotations"]) == 1


def test_without_masks_boxes_are_cut(cfg, register, tmp_path):
    register(bright_on_dark(tmp_path / "data"))
    cfg.MODEL.MASK_ON = False
    for example in batches(cfg, 3):
        assert set(example["instances"].get_fields()) == {"gt_boxes", "gt_classes"}
        boxes = example["instances"].gt_boxes.tensor
        assert (boxes >= 0).all()
        assert (boxes <= 96).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
