"""Straight edges, repetition and the ranking oracle against slow references; the script that prints the tables."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from sharpmask_d2.data.coco import load_annotations
from sharpmask_d2.evaluation.analysis.image_proposals import images_of_results
from sharpmask_d2.evaluation.analysis.ranking_oracle import by_overlap, one_of_each_first
from sharpmask_d2.evaluation.analysis.repetition import overlap_with_earlier
from sharpmask_d2.evaluation.analysis.straight_edges import StraightEdges, has_straight_edge, longest_straight_run
from sharpmask_d2.evaluation.proposal_evaluation import evaluate_proposal_json

TOOL = Path(__file__).resolve().parents[2] / "tools" / "analyze_proposals.py"


def encode(mask: np.ndarray) -> dict:
    return mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))


def disc(radius: float, *, size=(200, 200), centre=(100, 100)) -> np.ndarray:
    ys, xs = np.indices(size) + 0.5
    return (ys - centre[0]) ** 2 + (xs - centre[1]) ** 2 <= radius**2


def reference_run(mask: np.ndarray, border: float) -> int:
    """Length of the longest run, found pixel by pixel along every boundary between two rows, then between two columns."""
    longest = 0
    for bitmap in (mask, mask.T):
        height, width = bitmap.shape
        for y in range(1, height):
            if y < border or height - y < border:
                continue
            length, last = 0, None
            for x in range(width):
                edge = (bool(bitmap[y - 1, x]), bool(bitmap[y, x]))
                if edge[0] == edge[1]:
                    length = 0
                else:
                    length = length + 1 if edge == last else 1
                last = edge
                longest = max(longest, length)
    return longest


def test_longest_straight_run_equals_a_pixelwise_search():
    rng = np.random.default_rng(0)
    for size in ((1, 1), (1, 7), (6, 9), (13, 8)):
        for density in (0.0, 0.2, 0.5, 0.9, 1.0):
            mask = rng.random(size) < density
            # Enlarged pixels make runs longer than one pixel.
            for bitmap in (mask, np.kron(mask, np.ones((2, 3), bool))):
                for border in (0, 1.5, 3):
                    assert longest_straight_run(bitmap, border) == reference_run(bitmap, border)


def test_runs_on_opposite_sides_of_the_mask_are_not_joined():
    # Two blocks that touch at a corner: one lies above the boundary between the rows, the other one below it.
    mask = np.zeros((20, 40), bool)
    mask[5:10, 10:20] = mask[10:15, 20:30] = True
    assert longest_straight_run(mask) == 10


@pytest.mark.parametrize("radius", [13, 20, 37.3, 90])
def test_discs_have_no_straight_edge_and_cut_discs_have_one(radius):
    whole = disc(radius)
    assert not has_straight_edge(encode(whole))
    for cut in (
        np.s_[: int(100 - radius / 2)],
        np.s_[int(100 + radius / 2) :],
        np.s_[:, int(100 + radius / 2) :],
    ):
        part = whole.copy()
        part[cut] = False
        # A chord at half the radius has 0.87 of the diameter's length.
        assert has_straight_edge(encode(part))


def test_an_image_may_have_more_objects_than_pycocotools_adds_up_at_once(tmp_path):
    annotations = []
    for number in range(300):
        x, y = 3 * (number % 30), 3 * (number // 30)
        box, polygon = [x, y, 2, 2], [[x, y, x + 2, y, x + 2, y + 2, x, y + 2]]
        annotation = {"id": number + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 4}
        annotations.append({**annotation, "bbox": box, "segmentation": polygon})
    mask = encode(disc(20, size=(90, 90), centre=(45, 45)))
    mask["counts"] = mask["counts"].decode()
    results = [{"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [25, 25, 40, 40], "segmentation": mask}]
    images = [{"id": 1, "width": 90, "height": 90, "file_name": "1.jpg"}]
    files = tmp_path / "annotations.json", tmp_path / "results.json"
    files[0].write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]})
    )
    files[1].write_text(json.dumps(results))
    analysis = StraightEdges()
    for image in images_of_results(load_annotations(str(files[0])), str(files[1])):
        analysis.add(image)
    assert analysis.tables()


def test_the_image_border_is_not_a_straight_edge():
    # The image cuts the disc, or the outline ends one or two pixels inside the image.
    for x in (0, 1, 2):
        mask = disc(60, size=(200, 300), centre=(100, 10))
        mask[:, :x] = False
        assert not has_straight_edge(encode(mask)), x
    mask[:, :4] = False
    assert has_straight_edge(encode(mask))
    assert not has_straight_edge(encode(np.ones((30, 40), bool)))
    assert not has_straight_edge(encode(np.zeros((30, 40), bool)))


def test_a_straight_edge_is_longer_than_forty_percent_of_the_larger_side():
    # A step of 40 or 41 pixels in a box of 100 pixels.
    for step, straight in ((40, False), (41, True)):
        mask = np.zeros((200, 200), bool)
        for number, width in enumerate((step, 30, 100 - step - 30)):
            x = 50 + sum((step, 30)[:number])
            mask[100 - 3 * number : 100 + 3 * number + 1, x : x + width] = True
        assert has_straight_edge(encode(mask)) == straight


def test_overlap_with_earlier_is_the_highest_iou_with_a_better_proposal():
    rows = np.zeros((4, 10, 10), bool)
    rows[0, :4] = rows[1, 5:7] = rows[2, 2:4] = rows[3, :4] = True
    assert overlap_with_earlier([encode(mask) for mask in rows]).tolist() == [0, 0, 0.5, 1]
    assert overlap_with_earlier([]).tolist() == []


def test_oracle_orders_by_hand():
    ious = np.array([[0.1, 0.3], [0.8, 0.2], [0.9, 0.0], [0.0, 0.0], [0.85, 0.5]])
    assert by_overlap(ious).tolist() == [2, 4, 1, 0, 3]
    # Both objects get a proposal of their own before any object gets a second one.
    assert one_of_each_first(ious).tolist() == [2, 4, 1, 0, 3]
    assert one_of_each_first(ious[[0, 1, 2, 3]]).tolist() == [2, 0, 1, 3]
    assert one_of_each_first(ious[:, :1]).tolist() == [2, 4, 1, 0, 3]
    for order in (by_overlap, one_of_each_first):
        assert order(np.zeros((3, 0))).tolist() == [0, 1, 2]
        assert order(np.zeros((0, 3))).tolist() == []


@pytest.fixture
def files(tmp_path, make_dataset):
    """Three images with three objects each, one of them a crowd, an empty image, and proposals: 20 copies of each image's first object,
    then its other objects."""
    dataset = make_dataset(tmp_path, num_images=3, crowd=True, empty=True)
    results = []
    for image_id, masks in dataset.masks.items():
        for mask in [*masks[:1] * 20, *masks[1:]]:
            results.append({"image_id": image_id, "score": 1 - len(results) / 1000, "segmentation": encode(mask)})
    for result in results:
        result["segmentation"]["counts"] = result["segmentation"]["counts"].decode()
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps(results))
    return dataset, path


def run_tool(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [TOOL.name, *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_the_tool_prints_and_writes_its_tables(files, tmp_path, monkeypatch, capsys):
    dataset, proposals = files
    output = tmp_path / "tables.json"
    run_tool(monkeypatch, "--annotations", dataset.annotations, "--proposals", proposals, "--output", output)
    printed, written = capsys.readouterr().out, json.loads(output.read_text())
    for table in ("Straight edges", "Repetition", "as scored"):
        assert table in printed
    assert "nan" not in printed.split("Repetition")[1].split("Order")[0]
    numbers = {row["masks"]: row["number"] for row in written["straight edges"]}
    # Image 1 has two objects and a crowd, images 2 and 3 have three objects, and image 4 has none.
    assert numbers == {"first 10": 30, "first 100": 21 + 22 + 22, "true masks": 8}
    (repetition,) = written["repetition"]
    assert repetition["IoU 0.9"] == pytest.approx(100 * 57 / 65)
    orders = {(row["order"], row["objects"]): row for row in written["order"]}
    expected = evaluate_proposal_json(dataset.annotations, proposals)["segm"]
    for count in (10, 100, 1000):
        key = f"AR@{count}"
        assert orders["as scored", "all"][key] == pytest.approx(expected[key])
        small = expected[f"{key}-small"]
        assert orders["as scored", "small"][key] == (None if math.isnan(small) else pytest.approx(small))
    # All objects are found, but the first ten proposals of an image show one object, unless every object is shown once first.
    assert orders["as scored", "all"]["AR@10"] == pytest.approx(100 * 3 / 8)
    assert orders["by their IoU", "all"]["AR@10"] == pytest.approx(100 * 3 / 8)
    assert orders["one of each object first", "all"]["AR@10"] == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda results: results[0].pop("segmentation") and results[0].update(bbox=[0, 0, 1, 1]), "only some results"),
        (
            lambda results: results[0]["segmentation"].update(size=[5, 5]),
            "result 0, of image 1, has a segmentation that is an RLE of size",
        ),
    ],
)
def test_broken_results_end_in_one_line(files, monkeypatch, capsys, change, message):
    dataset, proposals = files
    results = json.loads(proposals.read_text())
    change(results)
    proposals.write_text(json.dumps(results))
    with pytest.raises(SystemExit) as stopped:
        run_tool(monkeypatch, "--annotations", dataset.annotations, "--proposals", proposals)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_results_without_masks_and_annotations_without_boxes_are_refused(files, tmp_path):
    dataset, _ = files
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([{"image_id": 1, "score": 1, "bbox": [0, 0, 5, 5]}]))
    with pytest.raises(ValueError, match="no segmentation"):
        list(images_of_results(load_annotations(dataset.annotations), path))
    path.write_text("[]")
    with pytest.raises(ValueError, match="no segmentation"):
        list(images_of_results(load_annotations(dataset.annotations), path))
    content = json.loads(dataset.annotations.read_text())
    del content["annotations"][0]["bbox"]
    dataset.annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 1 of image 1 has no bbox"):
        list(images_of_results(load_annotations(dataset.annotations), files[1]))
