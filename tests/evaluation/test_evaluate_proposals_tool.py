"""The scripts evaluate_proposals.py and selective_search.py, run with command lines in this process."""

import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from sharpmask_d2.evaluation.proposal_evaluation import evaluate_proposal_json, write_json
from sharpmask_d2.visualization import rank_images

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run_tool(monkeypatch, name, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(TOOLS / name), run_name="__main__")


@pytest.fixture
def annotations(tmp_path):
    """One image of 100 x 120 with one object of 40 x 50, and one without objects."""
    content = {
        "images": [{"id": i, "height": 100, "width": 120, "file_name": f"{i}.png"} for i in (3, 4)],
        "annotations": [
            {
                "id": 1,
                "image_id": 3,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": [10, 20, 50, 40],
                "area": 2000,
                "segmentation": [[10, 20, 60, 20, 60, 60, 10, 60]],
            }
        ],
        "categories": [{"id": 1, "name": "object"}],
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def test_evaluate_proposals_prints_and_writes(annotations, tmp_path, monkeypatch, capsys):
    proposals, output = tmp_path / "proposals.json", tmp_path / "metrics.json"
    proposals.write_text(json.dumps([{"image_id": 3, "category_id": 1, "bbox": [10, 20, 50, 31], "score": 0.5}]))
    run_tool(
        monkeypatch, "evaluate_proposals.py", "--annotations", annotations, "--proposals", proposals, "--output", output
    )
    written = json.loads(output.read_text())
    expected = evaluate_proposal_json(annotations, proposals)
    # IoU 0.775: six of the ten thresholds.
    assert written["bbox"]["AR@10"] == pytest.approx(60)
    assert written["bbox"]["AR@10-small"] is None
    assert {k for k, v in written["bbox"].items() if v is None} == {
        k for k, v in expected["bbox"].items() if np.isnan(v)
    }
    printed = capsys.readouterr().out
    assert "AR@1000" in printed
    assert "60.00" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations.json", "metrics.json", "proposals.json"]


def test_precision_is_printed_when_it_is_asked_for(annotations, tmp_path, monkeypatch, capsys):
    proposals = tmp_path / "masks.json"
    found = {"image_id": 3, "category_id": 1, "bbox": [10, 20, 50, 31], "score": 0.5}
    wrong = {**found, "image_id": 4, "score": 0.4}
    proposals.write_text(json.dumps([found, wrong, {**found, "score": 0.3}]))
    arguments = ("evaluate_proposals.py", "--annotations", annotations, "--proposals", proposals)
    run_tool(monkeypatch, *arguments)
    assert "Precision" not in capsys.readouterr().out
    run_tool(monkeypatch, *arguments, "--precision")
    row = capsys.readouterr().out.splitlines()[-1]
    # The object is found once; the second mask of it and that in the other image are wrong. Its IoU is 0.775.
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["bbox", "1.50", "33.33", "100.00", "33.33", "100.00"]


def test_pictures_show_the_best_and_the_worst(annotations, tmp_path, monkeypatch, capsys):
    content = json.loads(annotations.read_text())
    content["annotations"].append({**content["annotations"][0], "id": 2, "image_id": 4})
    annotations.write_text(json.dumps(content))
    for image_id in (3, 4):
        cv2.imwrite(str(tmp_path / f"{image_id}.png"), np.full((100, 120, 3), 60 * (image_id - 2), np.uint8))
    square = {"category_id": 1, "segmentation": [[10, 20, 60, 20, 60, 60, 10, 60]]}
    half = {**square, "segmentation": [[10, 20, 60, 20, 60, 40, 10, 40]]}
    proposals = tmp_path / "proposals.json"
    # A mask of the whole object exists in image 4 only.
    results = [{**half, "image_id": 3, "score": 0.9}, {**square, "image_id": 4, "score": 0.5}]
    proposals.write_text(json.dumps([*results, {**half, "image_id": 4, "score": 0.7}]))
    ranked = rank_images(COCO(str(annotations)), json.loads(proposals.read_text()))
    assert [image.image_id for image in ranked] == [4, 3]
    assert [image.overlap for image in ranked] == pytest.approx([1.0, 0.5])
    assert rank_images(COCO(str(annotations)), json.loads(proposals.read_text()), num_proposals=1)[0].overlap == 0.5
    arguments = ["--annotations", annotations, "--proposals", proposals, "--pictures", tmp_path / "pictures"]
    run_tool(monkeypatch, "evaluate_proposals.py", *arguments, "--image-root", tmp_path)
    best, worst = (cv2.imread(str(tmp_path / "pictures" / name)) for name in ("best_1.jpg", "worst_1.jpg"))
    assert best.shape == (100, 240, 3)
    # The grey value of image 4 is 120. The lower half of the object is coloured in both panels of the best picture, but only in the left
    # panel of the worst.
    assert abs(int(best[90, 100].mean()) - 120) < 8
    changed = {
        name: np.ptp(picture[50, [30, 150]].astype(int), axis=1) > 40
        for name, picture in (("best", best), ("worst", worst))
    }
    assert changed["best"].tolist() == [True, True]
    assert changed["worst"].tolist() == [True, False]
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, "evaluate_proposals.py", *arguments)
    assert "--image-root" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "proposals.json is not JSON"),
        ('[{"image_id": 9, "score": 1, "bbox": [0, 0, 1, 1]}]', "image 9 of result 0"),
        (None, "proposals.json"),
        ('[{"image_id": 3, "score": NaN, "bbox": [0, 0, 1, 1]}]', "result 0, of image 3, has the score nan"),
    ],
)
def test_evaluate_proposals_ends_in_one_line_for_broken_results(
    annotations, tmp_path, monkeypatch, capsys, content, message
):
    proposals = tmp_path / "proposals.json"
    if content is not None:
        proposals.write_text(content)
    with pytest.raises(SystemExit) as ended:
        run_tool(monkeypatch, "evaluate_proposals.py", "--annotations", annotations, "--proposals", proposals)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_evaluate_proposals_warns(annotations, tmp_path, monkeypatch, caplog):
    proposals = tmp_path / "proposals.json"
    proposals.write_text(json.dumps([{"image_id": 3, "score": 0.5, "bbox": [10, 20, 150, 31]}]))
    run_tool(monkeypatch, "evaluate_proposals.py", "--annotations", annotations, "--proposals", proposals)
    assert f"{proposals}: 1 of the 2 images of the annotations have no results" in caplog.text
    assert "1 of 1 boxes extend beyond their images" in caplog.text


@pytest.mark.parametrize("content", ["[" * 100_000, '{"images": [{"id": 1}]}', '{"images": [1]}', '{"images": 1}'])
def test_selective_search_names_a_broken_annotation_file(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setattr(cv2, "ximgproc", None, raising=False)
    annotations = tmp_path / "annotations.json"
    annotations.write_text(content)
    with pytest.raises(SystemExit) as ended:
        run_tool(monkeypatch, "selective_search.py", *selective_search_arguments(annotations, tmp_path))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(str(annotations))
    assert error.count("\n") == 1


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "metrics.json"
    write_json({"a": [float("nan"), 1.5]}, path)
    assert json.loads(path.read_text()) == {"a": [None, 1.5]}
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": [None, 1.5]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def selective_search_arguments(annotations, tmp_path):
    return ["--annotations", annotations, "--image-root", tmp_path, "--output", tmp_path / "boxes.json"]


def test_selective_search_finds_the_object(annotations, tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "ximgproc"):
        pytest.skip("this OpenCV has no ximgproc")
    image = np.random.default_rng(0).integers(0, 20, size=(100, 120, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "4.png"), image)
    image[20:60, 10:60] += 200
    cv2.imwrite(str(tmp_path / "3.png"), image)
    run_tool(
        monkeypatch, "selective_search.py", *selective_search_arguments(annotations, tmp_path), "--num-proposals", 20
    )
    results = json.loads((tmp_path / "boxes.json").read_text())
    of_image = [r for r in results if r["image_id"] == 3]
    assert 0 < len(of_image) <= 20
    scores = [r["score"] for r in of_image]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    assert scores[-1] > 0
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    assert evaluate_proposal_json(annotations, results)["bbox"]["Recall@1000-IoU90"] == 100


def test_selective_search_names_the_missing_package(annotations, tmp_path, monkeypatch, capsys):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.delattr(cv2, "ximgproc", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_tool(monkeypatch, "selective_search.py", *selective_search_arguments(annotations, tmp_path))
    assert ended.value.code == 2
    assert "opencv-contrib-python-headless" in capsys.readouterr().err
