"""The reader of annotation files, and the checks of masks before pycocotools reads them."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import copy
import json
import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from drawing import draw_dataset, uncompressed_rle
from pycocotools import mask as mask_util
from sharpmask_d2.data import coco, register_datasets
from sharpmask_d2.data.coco import AnnotationError, load_annotations, load_images
from sharpmask_d2.data.objects import read_objects
from sharpmask_d2.inference.image_files import list_annotated
from sharpmask_d2.structures.coco_masks import MaskError, check_masks, count_pixels, to_rle
from sharpmask_d2.torch7.published_proposals import convert_proposals
from torch7_writer import dumps

SIZE = (100, 120)
POLYGON = [10, 20, 60, 20, 60, 60, 10, 60]
IMAGE = {"id": 3, "height": SIZE[0], "width": SIZE[1], "file_name": "3.png"}
OBJECT = {
    "id": 1,
    "image_id": 3,
    "category_id": 1,
    "iscrowd": 0,
    "bbox": [10, 20, 50, 40],
    "area": 2000,
    "segmentation": [POLYGON],
}


def encode(mask) -> dict:
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def drawn_mask() -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[20:60, 10:60] = True
    return mask


RLE = encode(drawn_mask())


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def with_object(**changes) -> dict:
    changed = {key: value for key, value in {**OBJECT, **changes}.items() if value is not ...}
    return {"images": [IMAGE], "annotations": [changed], "categories": [{"id": 1, "name": "a"}]}


def with_image(**changes) -> dict:
    return {
        **with_object(),
        "images": [{key: value for key, value in {**IMAGE, **changes}.items() if value is not ...}],
    }


# Invalid masks and what the messages say. With most of these, pycocotools never returns or ends the process.
BROKEN_MASKS = [
    ({**RLE, "counts": RLE["counts"][:-1] + "o"}, "broken RLE"),
    ({**RLE, "counts": RLE["counts"] + "11"}, "broken RLE: counts .* run over 18082 pixels, its size is 100 x 120"),
    ({**RLE, "counts": RLE["counts"][:-2]}, "broken RLE"),
    ({**RLE, "counts": "%%%garbage"}, "broken RLE: counts '%%%garbage' are no run lengths"),
    ({**RLE, "counts": ""}, "broken RLE"),
    ({**RLE, "counts": "é" + RLE["counts"]}, "broken RLE"),
    ({"size": list(SIZE), "counts": [5, 11996]}, "run over 12001 pixels"),
    ({"size": list(SIZE), "counts": [-5, 12005]}, "not all whole numbers from 0"),
    ({"size": list(SIZE), "counts": [0.5, 11999.5]}, "not all whole numbers from 0"),
    ({"size": list(SIZE), "counts": {"a": 1}}, "RLE without counts"),
    ({"size": list(SIZE)}, "RLE without counts"),
    ({**RLE, "size": [0, 12000]}, r"the RLE size \[0, 12000\]"),
    ({**RLE, "size": [200, 60]}, r"RLE of size \(height, width\) \(200, 60\), its image is of \(100, 120\)"),
    ({**RLE, "size": "ab"}, "the RLE size 'ab'"),
    (
        [[10, 20, 1e9, 20, 60, 60]],
        r"polygon with a coordinate .* far outside of its image of 120 x 100 pixels: \[10, 1000000000\.0\]",
    ),
    ([[10, 20, -1e7, 20, 60, 60]], "far outside"),
    ([POLYGON, [10, 20, 10**400, 20.5, 60, 60]], "far outside|not all are numbers"),
    ([[10, 20, float("nan"), 20, 60, 60]], "not finite"),
    ([[10, 20, float("inf"), 20, float("-inf"), 60]], "not finite"),
    ([[10, 20, "30", 20, 60, 60]], "not all are numbers"),
    ([[10, 20, None, 20, 60, 60]], "not all are numbers"),
    ([[[10, 20], [30, 20], [60, 60]]], "not all are numbers"),
    ([7], "the polygon 7, not a list"),
    ([[0, 0, 1000, 900] * 400], "outline is longer than its image has pixels"),
    ("mask.png", "neither polygons nor RLE"),
    (3.5, "neither polygons nor RLE"),
]


@pytest.mark.parametrize(("mask", "message"), BROKEN_MASKS)
def test_invalid_masks_are_named(tmp_path, mask, message):
    good = [RLE, [POLYGON], uncompressed_rle(drawn_mask())]
    with pytest.raises(MaskError, match=message) as raised:
        check_masks([*good, mask, *good], [SIZE] * 7)
    assert raised.value.index == 3
    assert "\n" not in str(raised.value)
    # Both in annotation files and in datasets for training.
    path = write(tmp_path / "a.json", with_object(segmentation=mask, id=17))
    with pytest.raises(AnnotationError, match=f"annotation 17 of image 3: segmentation .*({message})") as raised:
        load_annotations(path)
    assert str(raised.value).startswith(path)
    record = {"image_id": 3, "file_name": "3.png", "height": SIZE[0], "width": SIZE[1]}
    with pytest.raises(ValueError, match=rf"annotation 0 of image 3 \(3\.png\) .*({message})"):
        read_objects(
            {**record, "annotations": [{**OBJECT, "bbox_mode": 1, "segmentation": mask}]}, min_area=0, min_side=0
        )


def test_valid_masks_equal_those_of_pycocotools():
    rng = np.random.default_rng(0)
    masks = [rng.random(SIZE) < density for density in (0, 0.001, 0.5, 1.1)] + [drawn_mask()]
    ragged = [[p + rng.uniform(-900, 900) for p in POLYGON], (1, 2, 3), [5, 5, 8, 8]]
    segmentations = [form(mask) for mask in masks for form in (encode, uncompressed_rle)] + [[POLYGON], ragged]
    check_masks(segmentations, [SIZE] * len(segmentations))
    check_masks(segmentations, [None] * len(segmentations))
    for mask, *forms in zip(masks, segmentations[0:10:2], segmentations[1:10:2]):
        for form in forms:
            np.testing.assert_array_equal(mask_util.decode(to_rle(form, SIZE)), mask)
    np.testing.assert_array_equal(mask_util.decode(to_rle([POLYGON], SIZE)), drawn_mask())
    with pytest.raises(MaskError, match="no polygon with three points"):
        to_rle([[1, 2, 3, 4]], SIZE)


def decoded_one_by_one(text: bytes) -> int:
    """The result of `count_pixels`, computed by a loop over characters."""
    counts, number, digits = [], 0, 0
    for character in text:
        digit = character - 48
        if not 0 <= digit < 64 or digits == 7:
            return -1
        number |= (digit & 31) << (5 * digits)
        digits += 1
        if digit < 32:
            number -= (digit & 16) << (5 * digits - 4)
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = digits = 0
    return sum(counts) if counts and not digits and min(counts) >= 0 else -1


def test_pixels_of_run_lengths_equal_those_of_a_loop(monkeypatch):
    rng = np.random.default_rng(1)
    for chunk in (1, 60, 2**16):
        monkeypatch.setattr("sharpmask_d2.structures.coco_masks._CHUNK", chunk)
        for _ in range(60):
            texts = []
            for _ in range(rng.integers(1, 9)):
                lowest, highest = [(48, 112), (48, 80), (40, 112)][rng.integers(3)]
                texts.append(bytes(rng.integers(lowest, highest, rng.integers(0, 12)).astype(np.uint8)))
                texts.append(encode(rng.random(rng.integers(1, 40, 2)) < rng.random())["counts"].encode())
            expected = [decoded_one_by_one(text) for text in texts]
            assert count_pixels(texts).tolist() == expected
            assert count_pixels([text.decode() for text in texts]).tolist() == expected


# ------------------------------------------------------------------ the reader

DEEP = "[" * 100_000
NO_IMAGES = [
    ("", "is not JSON"),
    ("[{", "is not JSON"),
    (DEEP, "nested too deeply"),
    ('{"images": ' + DEEP, "nested too deeply"),
    ("[" + "1" * 5000 + "]", "is not JSON"),
    ([1, 2], "it has no 'images'|'images' and 'annotations' are expected"),
    ({"annotations": []}, "it has no 'images'|'images' and 'annotations' are expected"),
    ({"images": 5, "annotations": []}, "'images' is not a list"),
    ({"images": [1], "annotations": []}, "entry 0 of 'images' is 1"),
    (with_image(id=...), "image number 0 of the list has no id"),
    (with_image(id=[3]), r"image number 0 of the list has id \[3\]"),
    (with_image(id=None), "image number 0 of the list has id None"),
    ({"images": [IMAGE, IMAGE], "annotations": []}, "two images have the id 3"),
]


@pytest.mark.parametrize(("content", "message"), NO_IMAGES)
@pytest.mark.parametrize("read", [load_images, load_annotations])
def test_a_file_without_annotations_is_refused_in_one_line(tmp_path, content, message, read):
    path = write(tmp_path / "instances.json", content)
    with pytest.raises(AnnotationError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(path)
    assert "\n" not in str(raised.value)
    with pytest.raises(AnnotationError, match=message):
        list_annotated(path, str(tmp_path))
    boxes = tmp_path / "val.t7"
    boxes.write_bytes(dumps({"images": ["a3.jpg"], "boxes": [np.ones((1, 4))]}))
    with pytest.raises(AnnotationError, match=message):
        convert_proposals(input=[str(boxes)], output=str(tmp_path / "o.json"), annotations=path)


@pytest.mark.parametrize("name", [..., None, "", 5, ["a"]])
def test_an_image_without_a_file_is_named(tmp_path, name):
    path = write(tmp_path / "instances.json", with_image(file_name=name))
    with pytest.raises(AnnotationError, match=r"instances\.json: image 3 \(number 0 in the list\) has (no )?file_name"):
        load_images(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**with_object(), "annotations": {}}, "'annotations' is not a list"),
        ({**with_object(), "categories": {}}, "'categories' is not a list"),
        ({**with_object(), "categories": [{"name": "a"}]}, "category number 0 of the list has no id"),
        (with_object(category_id=...), "annotation number 0 of the list has no category_id"),
        ({**with_object(), "annotations": [None]}, "entry 0 of 'annotations' is None"),
        (with_object(id=...), "annotation number 0 of the list has no id"),
        (with_object(id={}), r"annotation number 0 of the list has id {}"),
        (with_object(image_id=...), "annotation number 0 of the list has no image_id"),
        (with_object(image_id=[3]), r"has image_id \[3\]"),
        (with_image(height="100"), r"image 3 has height, width \['100', 120\]"),
        (with_image(width=...), r"image 3 has height, width \[100, None\]"),
        (with_image(width=-4), r"image 3 has height, width \[100, -4\]"),
        (with_object(area=float("nan")), "annotation 1 of image 3: area is nan: a number of square pixels"),
        (with_object(area=-1), "area is -1"),
        (with_object(area=1e11), r"area is 1000+\.0"),
        (with_object(area="2000"), "area is '2000'"),
        (with_object(bbox=[float("nan")] * 4), r"bbox is \[nan, nan, nan, nan\]: four finite numbers are expected"),
        (with_object(bbox=[60, 20, -50, 40]), r"bbox is \[60, 20, -50, 40\]"),
        (with_object(bbox=[1, 2, 3]), r"bbox is \[1, 2, 3\]"),
        (with_object(bbox="abcd"), "bbox is 'abcd'"),
        (with_object(bbox=[1, 2, 3, 10**400]), "four finite numbers"),
        (with_object(iscrowd="no"), "iscrowd is 'no': 0 or 1"),
        (with_object(category_id=[1]), r"annotation number 0 of the list has category_id \[1\]"),
    ],
)
def test_fields_of_a_wrong_type_are_named(tmp_path, content, message):
    path = write(tmp_path / "instances.json", content)
    with pytest.raises(AnnotationError, match=message) as raised:
        load_annotations(path)
    assert str(raised.value).startswith(path)


def test_optional_fields_may_be_missing(tmp_path, caplog):
    content = {key: value for key, value in with_object().items() if key != "categories"}
    content["images"] = [IMAGE, {"id": "b"}]
    content["annotations"] += [
        {"id": 2, "image_id": 3, "segmentation": [], "bbox": None},
        {"id": 3, "image_id": "b", "segmentation": RLE},
        {"id": 4, "image_id": 99, "segmentation": {"counts": "%%"}},
    ]
    with caplog.at_level(logging.WARNING, logger=coco.__name__):
        loaded = load_annotations(write(tmp_path / "a.json", "\ufeff" + json.dumps(content)))
    assert sorted(map(str, loaded.imgs)) == ["3", "b"]
    assert [len(loaded.imgToAnns[i]) for i in (3, "b")] == [2, 1]
    assert "1 of 4 annotations belong to images that it does not list" in caplog.text
    # Only the fields that are present are checked.
    images = {"images": [IMAGE], "annotations": "none"}
    assert load_images(write(tmp_path / "b.json", images)) == [(3, "3.png")]
    with pytest.raises(FileNotFoundError):
        load_annotations(tmp_path / "c.json")


# ------------------------------------------------------------------ datasets for training


@pytest.fixture
def register(tmp_path):
    """A function that registers a dataset of some content as the option --dataset does; the name is freed afterwards."""
    name = "from_outside"

    def register_content(content) -> str:
        register_datasets([(name, write(tmp_path / "train.json", content), str(tmp_path))])
        return name

    yield register_content
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_a_registered_dataset_equals_detectron2s(tmp_path, register):
    dataset = draw_dataset(tmp_path / "drawn", crowd=True)
    name = register(json.loads(dataset.annotations.read_text()))
    records = DatasetCatalog.get(name)
    assert [len(record["annotations"]) for record in records] == [3, 3, 3]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["odd", "even"]
    assert (metadata.json_file, metadata.evaluator_type) == (str(tmp_path / "train.json"), "coco")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "nested too deeply"),
        ({**with_object(), "categories": ...}, "has no categories"),
        (with_image(height=..., width=...), "image 3 has no height"),
        (with_image(file_name=...), "image 3 has no file_name"),
        (with_object(category_id=9), "Detectron2 cannot read it: KeyError: .*category_id=9"),
        (with_object(category_id=...), "category_id"),
        (with_object(bbox=...), "annotation 0 of image 3 has no bbox"),
        (with_object(bbox=[float("nan")] * 4), r"annotation 0 of image 3: bbox is \[nan"),
        (with_object(segmentation=[[10, 20, 1e7, 20, 60, 60]]), "annotation 0 of image 3: segmentation .* far outside"),
        (
            with_object(segmentation={**RLE, "counts": "%%%garbage"}),
            "annotation 0 of image 3: segmentation is broken RLE",
        ),
        (with_object(segmentation={**RLE, "counts": [1, -2]}), "annotation 1 of image 3: segmentation has RLE counts"),
    ],
)
def test_a_broken_dataset_for_training_is_named(register, content, message):
    content = copy.deepcopy(content)
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if value is not ...}
    name = register(content)
    with pytest.raises(AnnotationError, match=f"train\\.json.*{message}") as raised:
        DatasetCatalog.get(name)
    assert "\n" not in str(raised.value)
