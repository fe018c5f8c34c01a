"""Recall of proposals against pycocotools; the evaluator for Detectron2 against the function for result files."""

import contextlib
import io
import json
import logging

import numpy as np
import pytest
import sharpmask_d2  # noqa: F401  (before Detectron2)
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.data import MetadataCatalog  # isort: skip
from detectron2.structures import Boxes, Instances  # isort: skip
from sharpmask_d2.errors import UserError
from sharpmask_d2.evaluation import ProposalEvaluator
from sharpmask_d2.evaluation.proposal_evaluation import evaluate_proposal_json, format_table
from sharpmask_d2.evaluation.recall import UNMATCHED, GroundTruth, RecallAccumulator, match_ranks

HEIGHT, WIDTH = 150, 190
AREAS = ("", "-small", "-medium", "-large")
COUNTS = (10, 100, 1000)


class Masks:
    """The part of window masks that the evaluator uses."""

    def __init__(self, rles):
        self.rles = rles

    def __len__(self):
        return len(self.rles)

    def rle(self):
        return self.rles


def encode(mask) -> dict:
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def draw_ellipse(center_y, center_x, radius_y, radius_x) -> dict:
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    return encode(((y - center_y) / radius_y) ** 2 + ((x - center_x) / radius_x) ** 2 <= 1)


def annotation(annotation_id, image_id, rle, **fields) -> dict:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 1,
        "segmentation": rle,
        "bbox": mask_utils.toBbox(rle).tolist(),
        "area": float(mask_utils.area(rle)),
        "iscrowd": 0,
        **fields,
    }


def result(image_id, rle, score) -> dict:
    return {
        "image_id": image_id,
        "category_id": 1,
        "segmentation": rle,
        "bbox": mask_utils.toBbox(rle).tolist(),
        "score": score,
    }


def as_dataset(num_images, annotations) -> dict:
    images = [{"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.png"} for i in range(1, num_images + 1)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def random_dataset(seed, num_images=7, max_proposals=40):
    """Objects of all sizes with crowds and duplicates, and proposals with equal scores and duplicates. Image 2 has no objects, image 3 no
    proposals."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image_id in range(1, num_images + 1):
        shapes = []
        for _ in range(0 if image_id == 2 else rng.integers(2, 7)):
            radii = rng.choice([7, 15, 17, 30, 60]) * rng.uniform(0.7, 1.4, size=2)
            shape = (*rng.uniform(0, (HEIGHT, WIDTH)), *radii)
            shapes.append(shape)
            for _ in range(2 if rng.random() < 0.2 else 1):  # the same object twice: equal IoUs
                fields = {"category_id": int(rng.integers(1, 3)), "iscrowd": int(rng.random() < 0.2)}
                if rng.random() < 0.15:
                    fields["area"] = float(rng.choice([32**2, 96**2]))  # belongs to two ranges
                annotations.append(annotation(len(annotations) + 1, image_id, draw_ellipse(*shape), **fields))
        if image_id == 3:
            continue
        for _ in range(rng.integers(2, max_proposals + 1)):
            if shapes and rng.random() < 0.8:
                scatter = rng.choice([0.0, 0.1, 0.3])
                center_y, center_x, radius_y, radius_x = shapes[rng.integers(len(shapes))]
                center_y += rng.normal() * scatter * radius_y
                center_x += rng.normal() * scatter * radius_x
                radius_y *= np.exp(rng.normal() * scatter)
                radius_x *= np.exp(rng.normal() * scatter)
            else:
                center_y, center_x, radius_y, radius_x = rng.uniform(5, 80, size=4)
            rle = draw_ellipse(center_y, center_x, radius_y, radius_x)
            results.append(result(image_id, rle, round(float(rng.random()), 1)))
    return as_dataset(num_images, annotations), results


def load(dataset) -> COCO:
    coco = COCO()
    # COCOeval writes into annotations; a copy keeps them as drawn.
    coco.dataset = json.loads(json.dumps(dataset))
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def cocoeval_recall(dataset, results, kind, max_dets) -> np.ndarray:
    """Recall as T x A x len(max_dets); nan without objects."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = load(dataset)
        evaluation = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), kind)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(max_dets)
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0]
    return np.where(recall < 0, np.nan, recall)


def cocoeval_metrics(dataset, results, kind) -> dict:
    """The figures of `RecallAccumulator.summarize` except AUC, from COCOeval."""
    recall = 100 * cocoeval_recall(dataset, results, kind, COUNTS)
    metrics = {}
    for n, count in enumerate(COUNTS):
        metrics.update({f"AR@{count}{area}": recall[:, a, n].mean() for a, area in enumerate(AREAS)})
        metrics.update({f"Recall@{count}-IoU{50 + 5 * t}": recall[t, 0, n] for t in range(10)})
    return metrics


def instances(results, with_masks=True) -> Instances:
    proposals = Instances((HEIGHT, WIDTH))
    boxes = torch.tensor([r["bbox"] for r in results], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    proposals.proposal_boxes = Boxes(boxes)
    proposals.objectness_logits = torch.tensor([r["score"] for r in results], dtype=torch.float64)
    if with_masks:
        proposals.proposal_masks = Masks(
            [{**r["segmentation"], "counts": r["segmentation"]["counts"].encode()} for r in results]
        )
    return proposals


def run_evaluator(evaluator, results, image_ids, with_masks=True) -> None:
    for image_id in image_ids:
        of_image = [r for r in results if r["image_id"] == image_id]
        evaluator.process([{"image_id": image_id}], [{"proposals": instances(of_image, with_masks)}])


@pytest.fixture
def register(tmp_path):
    """A function that registers the metadata of a dataset for the duration of the test and returns its name."""
    names = []

    def register_dataset(dataset) -> str:
        name = f"proposal_evaluation_{len(names)}"
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(dataset))
        MetadataCatalog.get(name).set(json_file=str(path))
        names.append(name)
        return name

    yield register_dataset
    for name in names:
        MetadataCatalog.remove(name)


def literal_precision(dataset, results, threshold) -> tuple:
    """Precision, recall and results per image, from bitmaps and loops over single results and objects."""
    right = judged = objects = 0
    for image in dataset["images"]:
        annotations = [a for a in dataset["annotations"] if a["image_id"] == image["id"]]
        # Of equal IoUs the last object is taken, and objects are ordered by category.
        annotations.sort(key=lambda a: a["category_id"])
        truths = [mask_utils.decode(a["segmentation"]).astype(bool) for a in annotations]
        objects += sum(not a["iscrowd"] for a in annotations)
        taken = set()
        of_image = [r for r in results if r["image_id"] == image["id"]]
        for candidate in sorted(of_image, key=lambda r: -r["score"]):
            mask = mask_utils.decode(candidate["segmentation"]).astype(bool)
            best, best_iou, in_crowd = None, threshold, False
            for i, truth in enumerate(truths):
                both = (mask & truth).sum()
                if annotations[i]["iscrowd"]:
                    in_crowd |= both / mask.sum() >= threshold
                elif i not in taken and both / (mask | truth).sum() >= best_iou:
                    best, best_iou = i, both / (mask | truth).sum()
            if best is not None:
                taken.add(best)
                right += 1
            judged += best is not None or not in_crowd
    return 100 * right / judged, 100 * right / objects, len(results) / len(dataset["images"])


# -------------------------------------------------------------------------------------------------- against pycocotools


@pytest.mark.parametrize("kind", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(6))
def test_precision_equals_that_of_cocoeval(kind, seed):
    dataset, results = random_dataset(seed, num_images=12, max_proposals=60)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = load(dataset)
        evaluation = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), kind)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [1000]
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.evaluate()
    matched, ignored = (
        np.concatenate([image[key] for image in evaluation.evalImgs if image], axis=1)
        for key in ("dtMatches", "dtIgnore")
    )
    assert ignored.any()
    expected = 100 * ((matched > 0) & (ignored == 0)).sum(axis=1) / (ignored == 0).sum(axis=1)
    metrics = evaluate_proposal_json(load(dataset), results, precision=True)[kind]
    assert metrics["Precision-IoU50"] == pytest.approx(expected[0])
    assert metrics["Precision-IoU75"] == pytest.approx(expected[5])
    assert metrics["Precision-IoU50"] > metrics["Precision-IoU75"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_equal_a_literal_count(seed):
    dataset, results = random_dataset(seed, max_proposals=12)
    metrics = evaluate_proposal_json(load(dataset), results, precision=True)["segm"]
    for iou in (50, 75):
        precision, recall, per_image = literal_precision(dataset, results, iou / 100)
        assert metrics[f"Precision-IoU{iou}"] == pytest.approx(precision)
        assert metrics[f"Recall-IoU{iou}"] == pytest.approx(recall)
        assert metrics["Results-per-image"] == pytest.approx(per_image)


def test_without_results_there_is_no_precision():
    dataset, _ = random_dataset(0)
    metrics = evaluate_proposal_json(load(dataset), [], precision=True)["bbox"]
    assert np.isnan([metrics["Precision-IoU50"], metrics["Precision-IoU75"]]).all()
    assert metrics["Recall-IoU50"] == metrics["Results-per-image"] == 0


@pytest.mark.parametrize("kind", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(6))
def test_figures_equal_those_of_cocoeval(kind, seed):
    # Many small datasets, and one with more than the maximum of 1000 proposals in an image.
    dataset, results = random_dataset(seed, num_images=12, max_proposals=250)
    if seed == 5:
        extra = [{**r, "score": r["score"] + 0.01 * i} for i in range(1, 26) for r in results if r["image_id"] == 1]
        results = results + extra[:1100]
        assert sum(r["image_id"] == 1 for r in results) > 1000
    expected = cocoeval_metrics(dataset, results, kind)
    metrics = evaluate_proposal_json(load(dataset), results)[kind]
    assert set(metrics) == set(expected) | {"AUC"}
    assert all(expected[f"AR@1000{area}"] > 0 for area in AREAS)
    assert expected["AR@10"] < expected["AR@1000"] < 100
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, abs=1e-6, nan_ok=True), key


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_auc_is_the_area_under_cocoevals_ar(kind):
    dataset, results = random_dataset(11, max_proposals=60)
    counts = np.arange(1, 41)
    average_recall = cocoeval_recall(dataset, results, kind, counts)[:, 0].mean(axis=0)
    area = 0.0
    for n in range(1, 40):
        area += (average_recall[n] + average_recall[n - 1]) / 2 * (np.log10(n + 1) - np.log10(n))
    metrics = evaluate_proposal_json(load(dataset), results, max_proposals=40)[kind]
    assert metrics["AUC"] == pytest.approx(100 * area / np.log10(40), abs=1e-6)
    # Only the best `max_proposals` of an image are evaluated, as with COCOeval's largest maxDets.
    assert metrics["AR@1000"] == pytest.approx(100 * average_recall[-1], abs=1e-6)
    assert metrics["AR@1000"] < evaluate_proposal_json(load(dataset), results)[kind]["AR@1000"]


def test_auc_of_the_whole_range():
    # One object, matched at every threshold by the tenth proposal: AR is 0 below N = 10 and 1 from N = 10 on.
    recall = RecallAccumulator()
    boxes = np.array([[50.0, 50, 5, 5]] * 9 + [[0.0, 0, 10, 10]])
    recall.add(1, GroundTruth(boxes[9:], np.array([100.0]), np.array([False])), boxes, np.arange(10, 0, -1))
    expected = (2 + (1 - np.log10(9)) / 2) / 3
    assert recall.auc() == pytest.approx(expected, abs=1e-12)
    assert recall.average_recall([9, 10, 11]).tolist() == [0, 1, 1]


# --------------------------------------------------------------------------------------------------------- the matching


def test_matching_by_hand():
    ious = np.array([[0.6, 0.9, 0.9], [0.7, 0.8, 0.6], [0.0, 0.9, 0.9], [0.8, 0.0, 0.7]])
    counted = np.array([[True, True, True], [True, False, False]])
    ranks = match_ranks(ious, counted, thresholds=np.array([0.5, 0.65, 0.85]))
    assert ranks[0].tolist() == [
        # Proposal 0 is matched to the last of two equal objects, 1 to its second choice, 2 to none, 3 to the remaining object.
        [3, 1, 0],
        [3, 1, 0],
        [UNMATCHED, 2, 0],
    ]
    # If objects 1 and 2 do not count, proposals are matched to object 0 although they fit another object better.
    assert ranks[1].tolist() == [[0, UNMATCHED, UNMATCHED], [1, UNMATCHED, UNMATCHED], [UNMATCHED] * 3]


def test_objects_of_images_without_proposals_count_as_missed():
    rle = draw_ellipse(40, 50, 20, 25)
    dataset = as_dataset(4, [annotation(i, i, rle) for i in range(1, 5)])
    metrics = evaluate_proposal_json(load(dataset), [result(2, rle, 0.5)])
    for kind in ("segm", "bbox"):
        assert metrics[kind]["AR@10"] == metrics[kind]["AUC"] == metrics[kind]["Recall@1000-IoU95"] == 25


def test_recall_without_objects_is_nan():
    rle = draw_ellipse(40, 50, 20, 25)
    crowd_only = as_dataset(2, [annotation(1, 1, rle, iscrowd=1)])
    assert all(np.isnan(v) for v in evaluate_proposal_json(load(crowd_only), [result(1, rle, 0.5)])["segm"].values())
    one_size = as_dataset(1, [annotation(1, 1, rle)])
    metrics = evaluate_proposal_json(load(one_size), [result(1, rle, 0.5)])["bbox"]
    assert {key for key, value in metrics.items() if np.isnan(value)} == {
        f"AR@{count}-{area}" for count in COUNTS for area in ("small", "large")
    }


@pytest.mark.parametrize(("categories", "recall"), [((1, 2), 50), ((2, 1), 100)])
def test_category_order_decides_between_equal_ious(categories, recall):
    # The first proposal fits both objects equally and is matched to the one of the higher category; the second fits only b.
    a, b, between = np.zeros((3, HEIGHT, WIDTH))
    a[:100, :100] = b[:100, 50:150] = between[:100, 25:125] = 1
    dataset = as_dataset(
        1,
        [
            annotation(1, 1, encode(a), category_id=categories[0]),
            annotation(2, 1, encode(b), category_id=categories[1]),
        ],
    )
    results = [result(1, encode(between), 0.9), result(1, encode(b), 0.8)]
    for kind in ("segm", "bbox"):
        metrics = evaluate_proposal_json(load(dataset), results)[kind]
        assert metrics["Recall@10-IoU60"] == cocoeval_metrics(dataset, results, kind)["Recall@10-IoU60"] == recall


def test_accumulator_errors_name_the_image():
    rle = draw_ellipse(40, 50, 20, 25)
    truth = GroundTruth([rle], np.array([100.0]), np.array([False]))
    recall = RecallAccumulator()
    with pytest.raises(ValueError, match="image 7: 1 proposals but 2 scores"):
        recall.add(7, truth, [rle], [1, 2])
    with pytest.raises(ValueError, match="image 7: the score of proposal 1 is nan"):
        recall.add(7, truth, [rle, rle], [1, float("nan")])
    with pytest.raises(ValueError, match=r"image 7: masks of different sizes .*\(20, 30\), \(150, 190\)"):
        recall.add(7, truth, [encode(np.ones((20, 30)))], [1])
    with pytest.raises(ValueError, match="max_proposals"):
        RecallAccumulator(max_proposals=1)


# -------------------------------------------------------------------------------------------------------- the evaluator


def test_evaluator_agrees_with_the_json(register, tmp_path):
    dataset, results = random_dataset(21)
    evaluator = ProposalEvaluator(register(dataset), distributed=False, output_dir=str(tmp_path / "out"))
    run_evaluator(evaluator, results, range(1, 8))
    metrics = evaluator.evaluate()
    expected = evaluate_proposal_json(load(dataset), results)
    assert list(metrics) == ["segm", "bbox"]
    assert metrics == {kind: pytest.approx(values, abs=1e-9, nan_ok=True) for kind, values in expected.items()}
    written = json.loads((tmp_path / "out" / "proposal_metrics.json").read_text())
    assert written == {
        kind: {key: None if np.isnan(value) else value for key, value in values.items()}
        for kind, values in metrics.items()
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["proposal_metrics.json"]

    evaluator.reset()
    assert evaluator.evaluate()["bbox"]["AR@1000"] == 0


def test_evaluator_without_masks_reports_boxes_only(register):
    dataset, results = random_dataset(22)
    for entry in dataset["annotations"]:
        del entry["segmentation"]
    evaluator = ProposalEvaluator(register(dataset), distributed=False)
    run_evaluator(evaluator, results, range(1, 8), with_masks=False)
    without_masks = [{key: value for key, value in r.items() if key != "segmentation"} for r in results]
    assert evaluator.evaluate() == evaluate_proposal_json(load(dataset), without_masks)
    assert list(evaluator.evaluate()) == ["bbox"]


def test_evaluator_warns_of_images_that_were_not_processed(register, caplog):
    dataset, results = random_dataset(23)
    evaluator = ProposalEvaluator(register(dataset), distributed=False)
    run_evaluator(evaluator, results, range(1, 5))
    with caplog.at_level(logging.WARNING):
        metrics = evaluator.evaluate()
    assert "3 of the 7 images" in caplog.text
    assert metrics == {
        kind: pytest.approx(values, abs=1e-9, nan_ok=True)
        for kind, values in evaluate_proposal_json(load(dataset), [r for r in results if r["image_id"] < 5]).items()
    }


def test_evaluator_gathers_over_processes(register, monkeypatch, caplog):
    dataset, results = random_dataset(24)
    name = register(dataset)
    first, second = ProposalEvaluator(name), ProposalEvaluator(name)
    run_evaluator(first, results, range(1, 5))
    run_evaluator(second, results, range(4, 8))  # samplers may repeat an image
    sent = []

    def gather(data, dst):
        sent.append(data)
        return list(sent)

    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.utils.comm.synchronize", lambda: None)
    monkeypatch.setattr("detectron2.utils.comm.gather", gather)
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: len(sent) == 2)
    assert second.evaluate() == {}
    with caplog.at_level(logging.WARNING):
        metrics = first.evaluate()
    assert not caplog.records
    expected = evaluate_proposal_json(load(dataset), results)
    assert metrics == {kind: pytest.approx(values, abs=1e-9, nan_ok=True) for kind, values in expected.items()}


def test_evaluator_errors_name_image_and_annotation(register):
    rle = draw_ellipse(40, 50, 20, 25)
    dataset = as_dataset(2, [annotation(5, 1, rle), annotation(6, 2, rle)])
    del dataset["annotations"][1]["segmentation"]
    evaluator = ProposalEvaluator(register(dataset), distributed=False)
    with pytest.raises(ValueError, match="annotation 6 of image 2 has no segmentation"):
        run_evaluator(evaluator, [result(2, rle, 1.0)], [2])
    with pytest.raises(ValueError, match="image 3 is not in the annotations"):
        run_evaluator(evaluator, [], [3])
    with pytest.raises(ValueError, match="no_such_dataset has no json_file"):
        ProposalEvaluator("no_such_dataset")

    evaluator = ProposalEvaluator(register(as_dataset(2, [annotation(5, 1, rle)])), distributed=False)
    run_evaluator(evaluator, [result(1, rle, 1.0)], [1])
    run_evaluator(evaluator, [], [2], with_masks=False)
    assert evaluator.evaluate()["segm"]["AR@10"] == 100  # an empty set of proposals needs no masks
    run_evaluator(evaluator, [result(2, rle, 1.0)], [2], with_masks=False)
    with pytest.raises(ValueError, match="image 2: its proposals have no proposal_masks"):
        evaluator.evaluate()


# ---------------------------------------------------------------------------------------------------- the JSON function


def test_results_are_read_from_files_and_missing_boxes_from_masks(tmp_path):
    dataset, results = random_dataset(31)
    for name, content in (("annotations", dataset), ("proposals", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    metrics = evaluate_proposal_json(str(tmp_path / "annotations.json"), tmp_path / "proposals.json")
    without_boxes = [{key: value for key, value in r.items() if key != "bbox"} for r in results]
    assert evaluate_proposal_json(load(dataset), without_boxes) == metrics
    assert evaluate_proposal_json(load(dataset), [])["bbox"]["AR@1000"] == 0


def test_errors_in_result_files_name_file_and_result(tmp_path):
    rle = draw_ellipse(40, 50, 20, 25)
    coco = load(as_dataset(1, [annotation(1, 1, rle)]))
    good = result(1, rle, 0.5)
    boxes_only = {key: value for key, value in good.items() if key != "segmentation"}
    for results, message in (
        ([result(99, rle, 0.5)], "none of its 1 images is in the annotations, for example image 99 of result 0"),
        ([good, boxes_only], "only some results have a segmentation; result 1"),
        ([{"image_id": 1, "bbox": [0, 0, 1, 1]}], "result 0 has no score"),
        ([{"image_id": 1, "score": 1}], "result 0 has no bbox or segmentation"),
        ({"a": 1}, "not a COCO result file"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_proposal_json(coco, results)
    broken = tmp_path / "broken.json"
    broken.write_text("[{")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        evaluate_proposal_json(coco, broken)
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        evaluate_proposal_json(broken, [])
    broken.write_text("[]")
    with pytest.raises(ValueError, match=r"broken\.json is not a COCO annotation file"):
        evaluate_proposal_json(broken, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [float("nan")] * 4}, r"has the bbox \[nan, nan, nan, nan\], not four finite numbers"),
        ({"bbox": [10, 20, float("inf"), 5]}, "not four finite numbers"),
        ({"bbox": [10, 20, -30, 5]}, r"has the bbox \[10, 20, -30, 5\], not four finite numbers"),
        ({"bbox": [10, 20, 30]}, r"has the bbox \[10, 20, 30\]"),
        ({"bbox": ["1", "2", "3", "4"]}, r"has the bbox \['1', '2', '3', '4'\]"),
        ({"bbox": None}, "has the bbox None"),
        ({"bbox": [1, 2, 3, 10**400]}, "has the bbox"),
        ({"score": float("nan")}, "has the score nan, not a finite number"),
        ({"score": "high"}, "has the score 'high'"),
        ({"score": [0.5]}, r"has the score \[0\.5\]"),
        (
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "%%%garbage"}},
            "segmentation that is broken RLE: counts '%%%garbage'",
        ),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "PPPPo"}}, "segmentation that is broken RLE"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "0PPP0"}}, "segmentation that is broken RLE"),
        (
            {"segmentation": encode(np.ones((20, 30)))},
            r"RLE of size \(height, width\) \(20, 30\), its image is of \(150, 190\)",
        ),
        ({"segmentation": [[10, 20, 1e9, 20, 60, 60]]}, "far outside of its image"),
        ({"segmentation": "mask.png"}, "neither polygons nor RLE"),
    ],
)
def test_broken_results_are_named(change, message):
    rle = draw_ellipse(40, 50, 20, 25)
    coco = load(as_dataset(2, [annotation(1, 2, rle)]))
    good = result(2, rle, 0.5)
    with pytest.raises(UserError, match=f"proposals: result 2, of image 2, .*{message}") as raised:
        evaluate_proposal_json(coco, [result(1, rle, 0.5), good, {**good, **change}, good])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("area", [float("nan"), -1, "12"])
def test_an_invalid_area_is_an_error(area):
    rle = draw_ellipse(40, 50, 20, 25)
    dataset = load(as_dataset(1, [annotation(7, 1, rle, area=area)]))
    with pytest.raises(ValueError, match="annotation 7 of image 1: area is"):
        evaluate_proposal_json(dataset, [result(1, rle, 0.5)])


def test_suspicious_results_are_logged_with_counts(caplog):
    rle = draw_ellipse(40, 100, 20, 25)
    dataset = as_dataset(5, [annotation(i, i, rle) for i in (1, 2, 3)] + [annotation(9, 3, rle)])
    good, unknown = result(1, rle, 0.5), result(99, rle, 0.5)
    x, y, w, h = good["bbox"]
    shifted = {**good, "bbox": [x + 1, y - 1, w, h]}
    corners = {**good, "bbox": [x, y, x + w, y + h]}
    with caplog.at_level(logging.WARNING):
        metrics = evaluate_proposal_json(load(dataset), [good, shifted, corners, corners, result(2, rle, 0.5), unknown])
    assert metrics["segm"]["AR@10"] == metrics["bbox"]["AR@10"] == 50
    assert [record.getMessage() for record in caplog.records] == [
        "proposals: 1 of 6 results are ignored: their 1 images are not in the annotations, for example image 99",
        "proposals: 3 of the 5 images of the annotations have no results, for example image 3; their 2 objects count as missed",
        "proposals: 2 of 5 boxes do not fit their masks, for example the box of result 2: "
        "are they in the form x0, y0, x1, y1 instead of x, y, width, height?",
        "proposals: 2 of 6 boxes extend beyond their images, for example the box of result 2: "
        "are they in the form x0, y0, x1, y1 instead of x, y, width, height?",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        evaluate_proposal_json(load(dataset), [result(i, rle, 0.5) for i in range(1, 6)])
    assert not caplog.records


def test_accumulator_refuses_boxes_that_are_not_finite():
    boxes = np.array([[0.0, 0, 10, 10], [0, np.nan, 10, 10], [0, 0, np.inf, 10]])
    truth = GroundTruth(boxes[:1], np.array([100.0]), np.array([False]))
    for number in (1, 2):
        proposals = np.concatenate([boxes[[0] * number], boxes[[number]]])
        with pytest.raises(ValueError, match=f"image 7: the box of proposal {number} is "):
            RecallAccumulator().add(7, truth, proposals, np.arange(number + 1))


def test_table_shows_the_figures():
    dataset, results = random_dataset(32)
    metrics = evaluate_proposal_json(load(dataset), results)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_table(metrics).splitlines()]
    shown = {tuple(row[:2]): row[2:] for row in rows if row}
    for kind, values in metrics.items():
        for area in AREAS:
            row = [f"{values[f'AR@{count}{area}']:.2f}" for count in COUNTS]
            assert shown[kind, area[1:] or "all"] == row + ([""] if area else [f"{values['AUC']:.2f}"])
        row = [f"{values[f'Recall@100-IoU{threshold}']:.2f}" for threshold in range(50, 100, 5)]
        assert shown[kind, "100"] == row
