"""IoU given the true box: decoders whose answer is known, and the canonical windows that a model is asked for."""

import json

import cv2
import numpy as np
import pytest
import torch
from sharpmask_d2.cli.analyze import analyze_proposals, box_decoder
from sharpmask_d2.data.coco import load_annotations
from sharpmask_d2.evaluation.given_boxes import GivenBoxes, decode_boxes, iou_in_box
from sharpmask_d2.evaluation.proposed_image import ProposedImage, image_objects
from sharpmask_d2.inference.predictor import ProposalPredictor
from sharpmask_d2.inference.propose import build_config
from sharpmask_d2.modeling.proposal_generator import SharpMaskFPN
from sharpmask_d2.structures import WindowMasks

SMALL = ("MODEL.SHARPMASK.TEST.NUM_PROPOSALS", "20", "INPUT.MIN_SIZE_TEST", "96")


RANDOM_WEIGHTS = ("MODEL.WEIGHTS", "")


def rate(dataset, decode) -> dict:
    """The rows of the table for a decoder."""
    coco = load_annotations(dataset.annotations)
    analysis = GivenBoxes()
    for image_id, record in coco.imgs.items():
        objects = image_objects(coco, image_id)
        pixels = cv2.imread(str(dataset.image_root / record["file_name"]))
        given = decode_boxes(decode, pixels, objects.boxes)
        analysis.add(ProposedImage(image_id, objects, [], np.zeros((0, len(objects.boxes))), given_boxes=given))
    (table,) = analysis.tables()
    return {row[""]: row for row in table.records()}


def slow_iou(mask, truth, box) -> float:
    common = union = 0
    for y, x in np.ndindex(*truth.shape):
        inside = box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]
        common += mask[y, x] and inside and truth[y, x]
        union += (mask[y, x] and inside) or truth[y, x]
    return common / union if union else 0.0


def test_iou_in_box_is_that_of_a_slow_version():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask, truth = rng.random((2, 7, 9)) < 0.5
        corners = np.sort(
            rng.integers(-4, 40, (2, 2)) / 4, axis=0
        )  # halves, on which pixels have their centres, among them
        box = corners.ravel()
        assert iou_in_box(mask, truth, box) == pytest.approx(slow_iou(mask, truth, box))
    assert iou_in_box(np.zeros((3, 3), bool), np.zeros((3, 3), bool), np.array([0.0, 0, 3, 3])) == 0


def expected_fill(dataset) -> list:
    """Share of its tight box that each object fills."""
    fill = []
    for masks in dataset.masks.values():
        for mask in masks:
            ys, xs = np.nonzero(mask)
            fill.append(mask.sum() / ((np.ptp(ys) + 1) * (np.ptp(xs) + 1)))
    return fill


def test_decoders_whose_answer_is_known(tmp_path, make_dataset):
    dataset = make_dataset(tmp_path, num_images=3, crowd=True, empty=True)
    by_boxes = {}
    for masks in dataset.masks.values():
        for mask in masks:
            ys, xs = np.nonzero(mask)
            by_boxes[float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)] = mask
    fill = expected_fill(dataset)
    assert len(by_boxes) == 8  # the crowd is none of them

    def full_windows(image, boxes):
        sides = boxes[:, 2:] - boxes[:, :2]
        windows = np.concatenate([boxes[:, :2] - sides, boxes[:, 2:] + sides], axis=1)
        return WindowMasks(torch.ones(len(boxes), 4, 4), torch.from_numpy(windows), image.shape[:2])

    def true_masks(image, boxes):
        return np.stack([by_boxes[tuple(box)] for box in boxes])

    def true_and_all_around(image, boxes):
        masks = true_masks(image, boxes)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int)):
            outside = np.ones_like(mask)
            outside[y0:y1, x0:x1] = False
            mask |= outside
        return torch.from_numpy(masks)

    def nothing(image, boxes):
        return torch.zeros(len(boxes), *image.shape[:2], dtype=torch.bool)

    for decode, mean in (
        (full_windows, 100 * np.mean(fill)),
        (true_masks, 100),
        (true_and_all_around, 100),
        (nothing, 0),
    ):
        rows = rate(dataset, decode)
        assert rows["mask given the box"]["all"] == pytest.approx(mean)
        assert rows["filled box"]["all"] == pytest.approx(100 * np.mean(fill))
    # By size, as everywhere: by the area of the annotation, both ends included.
    areas = np.array([mask.sum() for masks in dataset.masks.values() for mask in masks])
    medium = (areas >= 32**2) & (areas <= 96**2)
    assert medium.any()
    assert rows["filled box"]["medium"] == pytest.approx(100 * np.mean(np.array(fill)[medium]))
    assert np.isnan(rows["filled box"]["large"])


def test_answers_that_do_not_fit_are_refused():
    image, boxes = np.zeros((20, 30, 3), np.uint8), np.array([[0.0, 0, 5, 5], [3, 3, 9, 9]])
    with pytest.raises(ValueError, match=r"2 boxes in an image of size \(20, 30\) gave 1 masks"):
        decode_boxes(lambda image, boxes: np.zeros((1, 20, 30), bool), image, boxes)
    with pytest.raises(ValueError, match=r"masks of sizes \[\(30, 20\)\]"):
        decode_boxes(lambda image, boxes: np.zeros((2, 30, 20), bool), image, boxes)
    assert decode_boxes(None, image, np.zeros((0, 4))) == []


@pytest.fixture
def left_halves(monkeypatch):
    """SharpMaskFPN makes masks of any window: its left half; and the windows that were asked for."""
    asked = []

    def decode(self, pyramid, images, windows, *, tables=None, num_refined=None):
        assert len(pyramid.scores) == 1
        assert images.tolist() == [0] * len(windows)
        asked.append(windows)
        logits = windows.new_full((len(windows), 8, 8), -100.0)
        logits[:, :, :4] = 100
        return logits

    monkeypatch.setattr(SharpMaskFPN, "decode", decode)
    return asked


@pytest.mark.parametrize("mask_window", [1.0, 1.6])
def test_a_model_is_asked_for_canonical_windows(left_halves, mask_window):
    opts = (*RANDOM_WEIGHTS, "INPUT.MIN_SIZE_TEST", "200", "MODEL.SHARPMASK.FPN.MASK_WINDOW", str(mask_window))
    predictor = ProposalPredictor(build_config(opts=opts))
    image = np.random.default_rng(0).integers(0, 255, (100, 161, 3), dtype=np.uint8)
    boxes = np.array([[20.0, 10, 60, 40], [100, 50, 120, 90]])
    masks = box_decoder(predictor)(image, boxes)
    # The image is seen at 200 x 322: larger sides of 80 each, which are 0.8 of the scored window's side.
    half = 80 / 0.8 * mask_window / 2
    centres = torch.tensor([[80.0, 50], [220, 140]])
    torch.testing.assert_close(left_halves[0], torch.cat([centres - half, centres + half], dim=1))
    # The windows are centred on the boxes, so that the left half of a window is the left half of its box.
    assert masks.image_size == (100, 161)
    assert masks.threshold == predictor.model.proposal_generator.mask_threshold
    for mask, (x0, y0, x1, y1) in zip(masks.paste(), boxes.astype(int)):
        inside = mask[y0:y1, x0:x1]
        middle = (x1 - x0) // 2
        assert inside[:, : middle - 1].all()
        assert not inside[:, middle + 1 :].any()


def test_the_table_is_printed_for_models_that_make_such_masks(tmp_path, make_dataset, left_halves, capsys):
    dataset = make_dataset(tmp_path, num_images=1, objects_per_image=2, size=(96, 128))
    output = tmp_path / "tables.json"
    files = {"annotations": dataset.annotations, "image_root": dataset.image_root, "output": output}
    analyze_proposals(**files, opts=(*SMALL, *RANDOM_WEIGHTS))
    (row, filled) = json.loads(output.read_text())["given boxes"]
    assert "IoU given the true box" in capsys.readouterr().out
    assert filled["all"] == pytest.approx(100 * np.mean(expected_fill(dataset)))
    assert 0.3 * filled["all"] < row["all"] < 0.8 * filled["all"]
    # Models that only make masks of windows of their own.
    analyze_proposals(**files, model="sharpmask_lite0", opts=SMALL)
    assert "given boxes" not in json.loads(output.read_text())
