"""COCO files of masks are read with their images and categories, and what cannot be used is named."""

import json

import numpy as np
import pytest
from drawing import compressed_rle, uncompressed_rle
from labelled import SCORES, SIZE, draw_masks, write_files
from pycocotools import mask as mask_utils
from sharpmask_d2.errors import UserError
from sharpmask_d2.interop.labelled_images import read_labelled_images
from sharpmask_d2.structures import TightMask


@pytest.fixture
def drawn(tmp_path):
    return write_files(tmp_path)


def test_results_name_their_images(drawn):
    content = read_labelled_images(drawn.results)
    first, second = content.images
    assert (first.image_id, first.file_name, first.size) == (1, "1.png", SIZE)
    assert [mask.score for mask in first.masks] == list(SCORES.values())
    for mask, bitmap in zip(first.masks, drawn.bitmaps):
        assert np.array_equal(mask_utils.decode(mask.rle).astype(bool), bitmap)
        assert np.array_equal(mask.tight().paste(SIZE), bitmap)
    assert (second.file_name, len(second.masks)) == ("sub/2.jpg", 1)
    assert content.labels == {1: "object"}


def test_masks_are_chosen_by_number_score_and_get_a_label(drawn):
    content = read_labelled_images(drawn.results, keep=2, min_score=0.75, label="thing")
    assert [[mask.score for mask in image.masks] for image in content.images] == [[0.9, 0.8], []]
    assert content.labels == {1: "thing"}
    scores = [mask.score for mask in read_labelled_images(drawn.results, keep=1, min_score=0.1).images[0].masks]
    assert scores == [0.9]


def test_images_without_masks_come_from_the_list(drawn):
    content = read_labelled_images(drawn.results, annotations=str(drawn.annotations))
    assert [(image.image_id, len(image.masks)) for image in content.images] == [(1, 5), (2, 1), (3, 0)]
    # Proposals are of no category of the list.
    assert content.labels == {1: "object"}


def test_categories_of_detections_have_names(drawn):
    results = json.loads(drawn.results.read_text())
    results[0]["category_id"] = 2
    drawn.results.write_text(json.dumps(results))
    assert read_labelled_images(drawn.results, annotations=str(drawn.annotations)).labels == {1: "cat", 2: "dog"}
    assert read_labelled_images(drawn.results).labels == {1: "category 1", 2: "category 2"}
    for result in results:
        result["category_name"] = f"name {result['category_id']}"
    drawn.results.write_text(json.dumps(results))
    assert read_labelled_images(drawn.results).labels == {1: "name 1", 2: "name 2"}


def test_empty_results(drawn):
    drawn.results.write_text("[]")
    assert read_labelled_images(drawn.results).images == []
    images = read_labelled_images(drawn.results, annotations=str(drawn.annotations)).images
    assert [image.masks for image in images] == [[], [], []]


def test_a_dataset_lists_its_images(tmp_path, make_dataset):
    dataset = make_dataset(tmp_path, num_images=2, crowd=True, empty=True)
    content = read_labelled_images(dataset.annotations)
    assert content.labels == {3: "odd", 7: "even"}
    for image in content.images:
        bitmaps = [mask.tight().paste(image.size) for mask in image.masks]
        assert np.array_equal(bitmaps, dataset.masks[image.image_id])
    with pytest.raises(UserError, match="leave out --annotations"):
        read_labelled_images(dataset.annotations, annotations=str(dataset.annotations))


def test_the_size_of_polygons_comes_from_the_image(drawn):
    results = [{"image_id": 3, "category_id": 1, "segmentation": [[2, 2, 20, 2, 20, 30]], "file_name": "3.png"}]
    drawn.results.write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"results\.json: the size of image 3, 3\.png, is not known.*--image-root"):
        read_labelled_images(drawn.results)
    (image,) = read_labelled_images(drawn.results, image_root=str(drawn.image_root)).images
    assert image.size == SIZE
    assert image.masks[0].score is None


def test_uncompressed_rle_is_read(drawn):
    bitmap = draw_masks()[1]
    results = [{"image_id": 3, "category_id": 1, "segmentation": uncompressed_rle(bitmap), "file_name": "3.png"}]
    drawn.results.write_text(json.dumps(results))
    (image,) = read_labelled_images(drawn.results).images
    assert np.array_equal(image.masks[0].tight().paste(SIZE), bitmap)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, r"result 0 of image 99: .*images\.json does not list this image"),
        ({"image_id": [1]}, r"result 0 of image \[1\]: image_id \[1\]"),
        ({"category_id": "cat"}, "result 0 of image 1: .*category_id 'cat'"),
        ({"segmentation": None}, "result 0 of image 1 has no segmentation: sharpmask segment --boxes"),
        ({"score": float("nan")}, "result 0 of image 1 has the score nan"),
        ({"score": "high"}, "result 0 of image 1 has the score 'high'"),
        (
            {"segmentation": {"size": list(SIZE), "counts": "12"}},
            "result 0 of image 1 has a segmentation that is broken",
        ),
        (
            {"segmentation": compressed_rle(np.ones((3, 3), bool))},
            "result 0 of image 1 has a segmentation that is an RLE of",
        ),
    ],
)
def test_a_result_that_cannot_be_used_is_named(drawn, change, message):
    results = json.loads(drawn.results.read_text())
    results[0].update(change)
    drawn.results.write_text(json.dumps(results))
    with pytest.raises(UserError, match=rf"results\.json: {message}"):
        read_labelled_images(drawn.results, annotations=str(drawn.annotations))


def test_images_of_two_sizes_or_without_a_name_are_named(drawn):
    results = json.loads(drawn.results.read_text())
    results[1]["segmentation"] = compressed_rle(np.ones((3, 3), bool))
    drawn.results.write_text(json.dumps(results))
    with pytest.raises(UserError, match="result 1 of image 1 has a segmentation that is an RLE of size"):
        read_labelled_images(drawn.results)
    del results[0]["file_name"]
    drawn.results.write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"result 0 of image 1 has no file_name: .*--annotations"):
        read_labelled_images(drawn.results)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "not a COCO result file"),
        ("{}", "not a COCO annotation file"),
        ("3", "not a COCO"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(drawn, content, message):
    drawn.results.write_text(content)
    with pytest.raises(UserError, match=rf"results\.json {message}|results\.json is {message}"):
        read_labelled_images(drawn.results)


def test_an_empty_mask_is_tight():
    mask = TightMask.from_bitmap(np.zeros(SIZE, bool))
    assert mask.box == (0, 0, 0, 0)
    assert mask.polygons() == []
    assert not mask.paste(SIZE).any()
