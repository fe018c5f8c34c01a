"""Why objects are missed: windows near objects, causes against a slow reference, and the windows of a model end to end."""

import json
import math
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_utils
from sharpmask_d2.data.coco import load_annotations
from sharpmask_d2.evaluation.analysis.image_proposals import image_proposals
from sharpmask_d2.evaluation.analysis.missed_objects import (
    BAD_MASK,
    BAD_RANK,
    CAUSES,
    FOUND,
    NO_WINDOW,
    TAKEN,
    MissedObjects,
    WindowRule,
    causes,
)
from sharpmask_d2.evaluation.analysis.model_proposals import images_of_model, window_rule
from sharpmask_d2.evaluation.proposal_evaluation import evaluate_proposal_json
from sharpmask_d2.evaluation.recall import IOU_THRESHOLDS, match_ranks
from sharpmask_d2.inference.configuration import build_config
from sharpmask_d2.inference.predictor import ProposalPredictor, load_model
from sharpmask_d2.structures import WindowMasks
from sharpmask_d2.windows.geometry import square_windows
from sharpmask_d2.windows.labels import label_rule, label_windows

TOOL = Path(__file__).resolve().parents[2] / "tools" / "analyze_proposals.py"
RULE = WindowRule(share=0.8, shift=16 * 0.8 / 92, octaves=0.25)
SIZE = (400, 600)


def encode(mask: np.ndarray) -> dict:
    return mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))


def filled(box, size=SIZE) -> np.ndarray:
    x0, y0, x1, y1 = box
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def annotate(objects: list, size=SIZE) -> dict:
    """A COCO dataset of one image, whose id is 1, with filled boxes (x0, y0, x1, y1) as objects."""
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": 1,
            "iscrowd": 0,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        }
        for number, (x0, y0, x1, y1) in enumerate(objects, start=1)
    ]
    images = [{"id": 1, "file_name": "1.png", "height": size[0], "width": size[1]}]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}


def load(content: dict, folder: Path):
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return load_annotations(path)


def test_near_windows_lie_within_shift_and_octaves_of_the_canonical_window():
    # The larger side of the object is 80 pixels, so its canonical window has a side of 100 pixels and its centre at (200, 150).
    box = np.array([[160.0, 130, 240, 170]])
    # The canonical object has 92 pixels in a patch of 160, so the patch of a window of 100 pixels has a side of 100 * 0.8 * 160 / 92.
    limit = 16 * (100 * 0.8 * 160 / 92) / 160
    moves = [(0, 0, 1), (limit - 0.1, 0, 1), (0, 0.1 - limit, 1), (limit + 0.1, 0, 1), (0, -limit - 0.1, 1)]
    moves += [(0, 0, 2**0.24), (0, 0, 2**-0.24), (0, 0, 2**0.26), (0, 0, 2**-0.26)]
    windows = [[200 + x - 50 * f, 150 + y - 50 * f, 200 + x + 50 * f, 150 + y + 50 * f] for x, y, f in moves]
    expected = [True, True, True, False, False, True, True, False, False]
    assert RULE.near(np.array(windows), box)[:, 0].tolist() == expected
    # The rule does not depend on the scale of the image.
    assert RULE.near(np.array(windows) * 0.1, box * 0.1)[:, 0].tolist() == expected
    assert RULE.near(np.zeros((0, 4)), box).shape == (0, 1)
    assert RULE.near(np.array(windows), np.zeros((0, 4))).shape == (9, 0)


@pytest.mark.parametrize("model", ["sharpmask_bifpn_lite0", "sharpmask_lite0"])
def test_near_windows_are_those_that_training_labels_positive(model):
    cfg = build_config(model, opts=("MODEL.WEIGHTS", ""))
    network = load_model(cfg)
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 300, (6, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 200, (6, 2))], axis=1)
    sides = rng.uniform(30, 500, (5000, 1))
    corners = rng.uniform(-50, 350, (5000, 2))
    windows = np.concatenate([corners, corners + sides], axis=1)
    patches = torch.from_numpy(windows)
    if model == "sharpmask_bifpn_lite0":
        # Patches in which an object that fits its window has the 92 of 160 pixels that the rule speaks of.
        patches = square_windows(patches, 92 / 160 / network.proposal_generator.mask_share)
    near = window_rule(cfg, network).near(windows, boxes)
    for number, box in enumerate(boxes):
        labels, _ = label_windows(
            patches, torch.from_numpy(box[None]), cfg.MODEL.SHARPMASK.WINDOW_SIZE, **label_rule(cfg)
        )
        assert (near[:, number] == (labels == 1).numpy()).all()
    assert near.any()


def reference_cause(rank, ious, near, threshold, count) -> str:
    if rank < count:
        return FOUND
    if any(iou >= threshold for iou in ious[:count]):
        return TAKEN
    if any(iou >= threshold for iou in ious):
        return BAD_RANK
    return BAD_MASK if near else NO_WINDOW


def test_causes_equal_those_of_a_slow_reference():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        ious = rng.uniform(0, 1, (12, 5)) ** rng.choice([0.3, 1, 4])
        counted = rng.random((4, 5)) < 0.7
        near = rng.random(5) < 0.5
        ranks = match_ranks(ious, counted)
        for count in (0, 4, 12):
            found = causes(ranks, ious, near, count)
            for area, threshold, index in np.ndindex(*found.shape):
                if counted[area, index]:
                    expected = reference_cause(
                        ranks[area, threshold, index], ious[:, index], near[index], IOU_THRESHOLDS[threshold], count
                    )
                    assert CAUSES[found[area, threshold, index]] == expected
                    seen.add(expected)
    assert seen == set(CAUSES)
    ranks = match_ranks(np.zeros((0, 2)), np.ones((1, 2), bool))
    assert causes(ranks, np.zeros((0, 2)), np.zeros(2, bool), 10).shape == (1, 10, 2)


def test_each_cause_is_reported_for_an_object_made_for_it(tmp_path):
    # Objects of 100 x 100 pixels: found, with a low rank, with a bad mask, without a window; and two that overlap by 90 % and share a mask.
    objects = [(x, 10, x + 100, 110) for x in (10, 130, 250, 370)] + [(10, 200, 110, 300), (10, 205, 110, 305)]
    coco = load(annotate(objects), tmp_path)
    good = [filled(objects[i]) for i in (0, 4)]
    half = filled((250, 10, 350, 50))  # IoU 0.4
    noise = filled((560, 380, 561, 381))
    masks = [*good, half, *[noise] * 147, filled(objects[1])]
    # Canonical windows of objects of 100 pixels; the windows of noise are far from all objects.
    around = {0: objects[0], 1: objects[4], 2: objects[2], 150: objects[1]}
    windows = np.full((151, 4), 5000.0)
    windows[:, 2:] += 10
    for number, (x0, y0, x1, y1) in around.items():
        windows[number] = [x0 - 12.5, y0 - 12.5, x1 + 12.5, y1 + 12.5]
    # The proposals are not sorted by score.
    shuffled = np.random.default_rng(0).permutation(151)
    image = image_proposals(coco, 1, [encode(masks[i]) for i in shuffled], -shuffled, windows[shuffled])
    analysis = MissedObjects(RULE)
    analysis.add(image)
    (table,) = analysis.tables()
    rows = {(r["proposals"], r["objects"], r["cause"]): r for r in table.records()}
    overlap = 95 / 105
    assert sum(overlap >= IOU_THRESHOLDS) == 9
    for area in ("all", "large"):
        for count, late in ((100, BAD_RANK), (1000, FOUND)):
            assert {r["number"] for key, r in rows.items() if key[:2] == (count, area)} == {6}
            at_half = {cause: rows[count, area, cause]["0.50"] for cause in CAUSES if (count, area, cause) in rows}
            expected = {FOUND: 2, NO_WINDOW: 1, BAD_MASK: 1, BAD_RANK: 0, TAKEN: 1}
            expected[late] += 1
            if count == 1000:
                del expected[BAD_RANK]
            assert at_half == pytest.approx({cause: 100 * number / 6 for cause, number in expected.items()})
            # At 0.95 no mask fits the second of the overlapping objects, but the window of the first one is near it.
            assert rows[count, area, TAKEN]["0.95"] == 0
            assert rows[count, area, BAD_MASK]["0.95"] == pytest.approx(100 * 2 / 6)
            assert rows[count, area, BAD_MASK]["mean"] == pytest.approx(100 * 1.1 / 6)
            shares = [r["mean"] for key, r in rows.items() if key[:2] == (count, area)]
            assert sum(shares) == pytest.approx(100)
    assert rows[100, "small", FOUND]["number"] == 0
    assert math.isnan(rows[100, "small", FOUND]["mean"])


class FakePredictor:
    """Returns prepared proposals for any image."""

    def __init__(self, proposals: Instances):
        self.proposals = proposals

    def __call__(self, pixels: np.ndarray) -> Instances:
        assert pixels.dtype == np.uint8
        return self.proposals


def test_windows_stay_with_their_masks(tmp_path):
    coco = load(annotate([(10, 10, 50, 50), (60, 10, 100, 40)], size=(100, 120)), tmp_path)
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((100, 120, 3), np.uint8))
    windows = torch.tensor([[60.0, 10, 100, 40], [10, 10, 50, 50], [0, 0, 5, 5]])
    proposals = Instances((100, 120))
    proposals.proposal_masks = WindowMasks(torch.ones(3, 4, 4), windows, (100, 120))
    proposals.proposal_boxes = Boxes(windows)
    proposals.objectness_logits = torch.tensor([-1.0, 2.0, 1.0])
    (image,) = images_of_model(coco, str(tmp_path), FakePredictor(proposals))
    assert image.windows.tolist() == windows[[1, 2, 0]].tolist()
    np.testing.assert_allclose(image.ious, [[1, 0], [0, 0], [0, 1]], atol=1e-12)
    assert image.masks_given_boxes is None
    wrong = Instances((50, 60))
    wrong.proposal_masks = WindowMasks(torch.ones(3, 4, 4), windows, (50, 60))
    wrong.objectness_logits = proposals.objectness_logits
    with pytest.raises(ValueError, match="image 1: the mask of a proposal has the size"):
        list(images_of_model(coco, str(tmp_path), FakePredictor(wrong)))


def run_tool(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [TOOL.name, *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_the_tool_runs_a_model(tmp_path, make_dataset, monkeypatch, capsys):
    dataset = make_dataset(tmp_path, num_images=2, crowd=True)
    output = tmp_path / "tables.json"
    options = ["MODEL.SHARPMASK.TEST.NUM_PROPOSALS", "200", "INPUT.MIN_SIZE_TEST", "180"]
    arguments = ["--annotations", dataset.annotations, "--image-root", dataset.image_root, "--output", output]
    run_tool(monkeypatch, *arguments, *options)
    written = json.loads(output.read_text())
    assert "Missed objects" in capsys.readouterr().out
    rows = {(r["proposals"], r["objects"], r["cause"]): r for r in written["missed objects"]}
    # The share of found objects is the recall of these proposals.
    predictor = ProposalPredictor(build_config(opts=tuple(options)))
    results = []
    for image_id in (1, 2):
        proposals = predictor(cv2.imread(str(dataset.image_root / f"{image_id}.png")))
        scores = proposals.objectness_logits.tolist()
        rles = proposals.proposal_masks.rle()
        results += [{"image_id": image_id, "score": s, "segmentation": r} for s, r in zip(scores, rles)]
    expected = evaluate_proposal_json(dataset.annotations, results)["segm"]
    for count in (100, 1000):
        assert rows[count, "all", FOUND]["number"] == 5
        assert rows[count, "all", FOUND]["mean"] == pytest.approx(expected[f"AR@{count}"])
        for threshold in IOU_THRESHOLDS:
            recall = expected[f"Recall@{count}-IoU{round(100 * threshold)}"]
            assert rows[count, "all", FOUND][f"{threshold:.2f}"] == pytest.approx(recall)
    assert expected["AR@100"] > 20


def test_the_tool_names_a_missing_image(tmp_path, make_dataset, monkeypatch, capsys):
    dataset = make_dataset(tmp_path, num_images=1)
    (dataset.image_root / "1.png").unlink()
    with pytest.raises(SystemExit) as stopped:
        run_tool(monkeypatch, "--annotations", dataset.annotations, "--image-root", dataset.image_root)
    assert stopped.value.code == 2
    assert "1.png" in capsys.readouterr().err
