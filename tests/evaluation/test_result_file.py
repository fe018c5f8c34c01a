"""Result files are read image by image, in any order of their results."""

import json
import random
import tracemalloc

import pytest
from drawing import compressed_rle
from sharpmask_d2.data.coco import load_annotations
from sharpmask_d2.errors import UserError
from sharpmask_d2.evaluation.proposal_evaluation import evaluate_proposal_json
from sharpmask_d2.evaluation.result_file import ResultFile


@pytest.fixture
def dataset(make_dataset, tmp_path):
    return make_dataset(tmp_path, num_images=4, rle=True, crowd=True, empty=True)


def draw_results(dataset, copies: int = 1) -> list:
    """Results that cover part of each object, with scores in no order; those of image 2 are left out."""
    results = []
    for image_id, masks in dataset.masks.items():
        for mask in masks * copies if image_id != 2 else []:
            part = mask.copy()
            part[: mask.shape[0] * len(results) % 7 // 2] = False
            results.append(
                {"image_id": image_id, "score": (len(results) * 37 % 11) / 11, "segmentation": compressed_rle(part)}
            )
    random.Random(0).shuffle(results)
    return results


def test_images_have_all_their_results_in_the_order_of_the_file(dataset, tmp_path):
    results = draw_results(dataset, copies=3)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with ResultFile(path, load_annotations(dataset.annotations)) as file:
        assert file.has_masks
        found = dict(file.images())
        assert list(found) == [1, 3, 4]
        for image_id, of_image in found.items():
            expected = [result for result in results if result["image_id"] == image_id]
            assert of_image == expected
            assert file.count(image_id) == len(expected)
            by_score = sorted(expected, key=lambda result: -result["score"])
            assert file.scores(image_id).tolist() == [result["score"] for result in by_score]
            assert file.read(image_id, [2, 0]) == [by_score[2], by_score[0]]
        assert file.count(2) == 0
        assert file.read(2) == []
        assert not len(file.scores(2))
        assert set(file.image_ids()) == {1, 3, 4}


def test_a_file_is_evaluated_as_its_list_is(dataset, tmp_path):
    results = draw_results(dataset)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    expected = evaluate_proposal_json(dataset.annotations, results)
    assert str(evaluate_proposal_json(dataset.annotations, path)) == str(expected)
    assert 0 < expected["segm"]["AR@10"] < 100


def test_a_broken_result_is_named_with_its_place_in_the_file(dataset, tmp_path):
    results = draw_results(dataset)
    number = next(i for i, result in enumerate(results) if result["image_id"] == 3)
    results[number]["score"] = "high"
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match=f"results.json: result {number}, of image 3, has the score 'high'"):
        evaluate_proposal_json(dataset.annotations, path)


def test_images_without_annotations_have_the_names_of_their_results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps([{"image_id": i, "score": 1, "bbox": [0, 0, 1, 1], "file_name": f"{i}.jpg"} for i in (7, 3)])
    )
    with ResultFile(path, None) as file:
        assert not file.has_masks
        assert [image["file_name"] for image in file.coco.imgs.values()] == ["7.jpg", "3.jpg"]
        assert [image_id for image_id, _ in file.images()] == [7, 3]


def test_memory_holds_the_places_of_results_but_not_the_results(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("sharpmask_d2.io.json_lists._CHUNK", 2**12)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(draw_results(dataset, copies=300)))
    coco = load_annotations(dataset.annotations)
    peaks = []
    for read in (lambda: ResultFile(path, coco).close(), lambda: json.loads(path.read_text())):
        tracemalloc.start()
        read()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < peaks[1] / 5
