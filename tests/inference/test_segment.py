"""`sharpmask segment`: files of boxes become files of masks, and images become clean masks."""

import json

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from sharpmask_d2.cli.segment import main
from sharpmask_d2.data.coco import load_annotations
from sharpmask_d2.errors import UserError

SMALL = ["INPUT.MIN_SIZE_TEST", "96", "MODEL.DEVICE", "cpu"]


@pytest.fixture
def dataset(tmp_path, make_dataset):
    """Two images of 96 x 128 pixels with three objects each, one of them a crowd."""
    return make_dataset(tmp_path, num_images=2, size=(96, 128), crowd=True)


def segment(dataset, output, boxes, *options) -> int:
    arguments = ["--boxes", str(boxes), "--image-root", str(dataset.image_root), "--output", str(output), *options]
    return main([*arguments, *SMALL])


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def iou(rle, mask) -> float:
    other = mask_utils.decode(rle).astype(bool)
    return (other & mask).sum() / (other | mask).sum()


def true_masks(dataset) -> list:
    return [mask for image_id in (1, 2) for mask in dataset.masks[image_id]]


def test_a_dataset_of_boxes_becomes_one_with_masks(dataset, tmp_path, capsys):
    content = json.loads(dataset.annotations.read_text())
    for annotation in content["annotations"]:
        annotation["note"] = f"kept {annotation['id']}"
        if not annotation["iscrowd"]:
            del annotation["segmentation"], annotation["area"]
    output = tmp_path / "masks.json"
    assert segment(dataset, output, write(tmp_path / "boxes.json", content)) == 0
    assert "wrote 6 masks of 6 boxes in 2 images" in capsys.readouterr().out
    written = load_annotations(output).dataset
    assert written["images"] == content["images"]
    assert written["categories"] == content["categories"]
    given = {annotation["id"]: annotation for annotation in content["annotations"]}
    masks = []
    for annotation in written["annotations"]:
        before = given.pop(annotation["id"])
        if before["iscrowd"]:
            assert annotation == before
            continue
        assert {key: annotation[key] for key in before} == before
        assert annotation["area"] == mask_utils.area(annotation["segmentation"])
        assert 0 < annotation["mask_quality"] <= 1
        masks.append(annotation["segmentation"])
    assert not given
    assert np.mean([iou(rle, mask) for rle, mask in zip(masks, true_masks(dataset))]) > 0.85


def test_results_of_a_detector_get_masks_of_enough_quality(dataset, tmp_path):
    annotations = json.loads(dataset.annotations.read_text())["annotations"]
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5, "name": "x"}
        for a in annotations
    ]
    results.append({"image_id": 2, "category_id": 3, "bbox": [5, 5, 0, 0], "score": 0.1, "name": "empty"})
    boxes, output = write(tmp_path / "detections.json", results), tmp_path / "masks.json"
    listed = ("--annotations", str(dataset.annotations))
    assert segment(dataset, output, boxes, *listed, "--visualize", str(tmp_path / "pictures")) == 0
    written = json.loads(output.read_text())
    assert [{key: result[key] for key in results[0]} for result in written] == results[:-1]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["1.jpg", "2.jpg"]
    limit = sorted(result["mask_quality"] for result in written)[3]
    assert segment(dataset, output, boxes, *listed, "--min-quality", str(limit)) == 0
    fewer = json.loads(output.read_text())
    assert fewer == [result for result in written if result["mask_quality"] >= limit]


def test_a_run_resumes_and_images_of_equal_content_keep_their_own_boxes(dataset, tmp_path):
    # The second file is a copy of the first one, with other boxes.
    first = (dataset.image_root / "1.png").read_bytes()
    (dataset.image_root / "2.png").write_bytes(b"broken")
    content = json.loads(dataset.annotations.read_text())
    content["annotations"] = [{**a, "iscrowd": 0} for a in content["annotations"] if a["id"] in (1, 5)]
    boxes, output = write(tmp_path / "boxes.json", content), tmp_path / "masks.json"
    assert segment(dataset, output, boxes) == 1
    assert {a["image_id"] for a in json.loads(output.read_text())["annotations"]} == {1}
    (dataset.image_root / "2.png").write_bytes(first)
    assert segment(dataset, output, boxes) == 0
    assert [a["id"] for a in json.loads(output.read_text())["annotations"]] == [1, 5]
    assert not list(tmp_path.glob("*.partial"))


def test_images_become_clean_masks(dataset, tmp_path):
    output = tmp_path / "masks.json"
    arguments = ["--input", str(dataset.image_root), "--output", str(output), "--min-quality", "0.3"]
    assert main([*arguments, "--non-overlapping", *SMALL]) == 0
    results = json.loads(output.read_text())
    assert {result["image_id"] for result in results} == {1, 2}
    for image_id in (1, 2):
        masks = [mask_utils.decode(result["segmentation"]) for result in results if result["image_id"] == image_id]
        assert np.sum(masks, axis=0).max() == 1
    assert all(0.3 <= result["score"] <= 1 for result in results)
    for mask in true_masks(dataset):
        assert max(iou(result["segmentation"], mask) for result in results) > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--boxes b.json --output o.json", "--boxes needs --image-root"),
        ("--boxes b.json --input images --image-root images --output o.json", "cannot be combined with --input"),
        ("--output o.json", "give one of --input, --annotations and --boxes"),
        ("--input images --output o.json --min-quality 2", "not in 0..1"),
    ],
)
def test_options_that_do_not_fit_together(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert message in capsys.readouterr().err


def test_wrong_files_end_in_one_line(dataset, tmp_path):
    content = json.loads(dataset.annotations.read_text())
    output = tmp_path / "masks.json"
    results = write(tmp_path / "results.json", [{"image_id": 1, "score": 1, "bbox": [0, 0, 5, 5], "category_id": 3}])
    with pytest.raises(UserError, match=r"results.json is not a COCO dataset: .* --annotations"):
        segment(dataset, output, results)
    with pytest.raises(UserError, match="leave out --annotations"):
        segment(dataset, output, dataset.annotations, "--annotations", str(dataset.annotations))
    del content["annotations"][1]["bbox"]
    with pytest.raises(UserError, match=r"boxes.json: annotation 2 has no bbox"):
        segment(dataset, output, write(tmp_path / "boxes.json", content))
    write(results, [{"image_id": 1, "score": 1, "bbox": [0, 0, 5], "category_id": 3}])
    with pytest.raises(UserError, match=r"results.json: result 0.* bbox"):
        segment(dataset, output, results, "--annotations", str(dataset.annotations))
    with pytest.raises(FileNotFoundError, match="--image-root"):
        main(["--boxes", str(dataset.annotations), "--image-root", "nowhere", "--output", str(output)])


def test_an_image_of_another_size_is_named(dataset, tmp_path, capsys):
    content = json.loads(dataset.annotations.read_text())
    content["images"][0]["height"] = 97
    for annotation in content["annotations"]:
        annotation.pop("segmentation")
    assert segment(dataset, tmp_path / "masks.json", write(tmp_path / "boxes.json", content)) == 1
    assert "1.png: its size (height, width) is (96, 128), but the COCO file says (97, 128)" in capsys.readouterr().err
