"""IoU given the true box: decoders with known masks, and the packaged model."""

import json

import cv2
import numpy as np
import pytest
import torch
from sharpmask_d2.cli.analyze import analyze_proposals
from sharpmask_d2.data.coco import load_annotations
from sharpmask_d2.evaluation.analysis.image_proposals import ImageProposals, image_objects
from sharpmask_d2.evaluation.analysis.masks_given_boxes import MasksGivenBoxes, decode_boxes, iou_in_box
from sharpmask_d2.inference.configuration import build_config
from sharpmask_d2.inference.given_boxes import box_decoder
from sharpmask_d2.inference.predictor import ProposalPredictor
from sharpmask_d2.structures import WindowMasks

SMALL = ("MODEL.SHARPMASK.TEST.NUM_PROPOSALS", "20", "INPUT.MIN_SIZE_TEST", "96")


def rate(dataset, decode) -> dict:
    """Rows of the table for a decoder."""
    coco = load_annotations(dataset.annotations)
    analysis = MasksGivenBoxes()
    for image_id, record in coco.imgs.items():
        objects = image_objects(coco, image_id)
        pixels = cv2.imread(str(dataset.image_root / record["file_name"]))
        given = decode_boxes(decode, pixels, objects.boxes)
        analysis.add(ImageProposals(image_id, objects, [], np.zeros((0, len(objects.boxes))), masks_given_boxes=given))
    (table,) = analysis.tables()
    return {row[""]: row for row in table.records()}


def reference_iou(mask, truth, box) -> float:
    common = union = 0
    for y, x in np.ndindex(*truth.shape):
        inside = box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]
        common += mask[y, x] and inside and truth[y, x]
        union += (mask[y, x] and inside) or truth[y, x]
    return common / union if union else 0.0


def test_iou_in_box_equals_a_pixelwise_reference():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask, truth = rng.random((2, 7, 9)) < 0.5
        # Quarters of pixels, so that some sides pass through the centres of pixels.
        box = np.sort(rng.integers(-4, 40, (2, 2)) / 4, axis=0).ravel()
        assert iou_in_box(mask, truth, box) == pytest.approx(reference_iou(mask, truth, box))
    assert iou_in_box(np.zeros((3, 3), bool), np.zeros((3, 3), bool), np.array([0.0, 0, 3, 3])) == 0


def expected_fill(dataset) -> list:
    """Share of the tight box that each object fills."""
    fill = []
    for masks in dataset.masks.values():
        for mask in masks:
            ys, xs = np.nonzero(mask)
            fill.append(mask.sum() / ((np.ptp(ys) + 1) * (np.ptp(xs) + 1)))
    return fill


def test_decoders_with_known_masks(tmp_path, make_dataset):
    dataset = make_dataset(tmp_path, num_images=3, crowd=True, empty=True)
    by_boxes = {}
    for masks in dataset.masks.values():
        for mask in masks:
            ys, xs = np.nonzero(mask)
            by_boxes[float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)] = mask
    fill = expected_fill(dataset)
    assert len(by_boxes) == 8  # without the crowd

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
    # Sizes are those of the annotation's area, and both bounds belong to a range.
    areas = np.array([mask.sum() for masks in dataset.masks.values() for mask in masks])
    medium = (areas >= 32**2) & (areas <= 96**2)
    assert medium.any()
    assert rows["filled box"]["medium"] == pytest.approx(100 * np.mean(np.array(fill)[medium]))
    assert np.isnan(rows["filled box"]["large"])


def test_masks_of_a_wrong_number_or_size_are_refused():
    image, boxes = np.zeros((20, 30, 3), np.uint8), np.array([[0.0, 0, 5, 5], [3, 3, 9, 9]])
    with pytest.raises(ValueError, match=r"returned 1 masks of sizes .* for 2 boxes in an image of size \(20, 30\)"):
        decode_boxes(lambda image, boxes: np.zeros((1, 20, 30), bool), image, boxes)
    with pytest.raises(ValueError, match=r"masks of sizes \[\(30, 20\)\]"):
        decode_boxes(lambda image, boxes: np.zeros((2, 30, 20), bool), image, boxes)
    assert decode_boxes(None, image, np.zeros((0, 4))) == []


def test_the_packaged_model_decodes_the_masks_of_true_boxes(tmp_path, make_dataset):
    """The image is resized for the model, so that boxes and masks pass between two frames."""
    dataset = make_dataset(tmp_path, num_images=2, size=(100, 161))
    decode = box_decoder(ProposalPredictor(build_config("sharpmask_bifpn_lite0", opts=("INPUT.MIN_SIZE_TEST", "200"))))
    rows = rate(dataset, decode)
    assert rows["mask given the box"]["all"] > 85
    assert rows["filled box"]["all"] < 80


def test_the_table_is_printed_for_models_that_decode_any_window(tmp_path, make_dataset, capsys):
    dataset = make_dataset(tmp_path, num_images=1, objects_per_image=2, size=(96, 128))
    output = tmp_path / "tables.json"
    files = {"annotations": dataset.annotations, "image_root": dataset.image_root, "output": output}
    analyze_proposals(**files, model="sharpmask_bifpn_lite0", opts=SMALL)
    row, filled = json.loads(output.read_text())["given boxes"]
    assert "IoU given the true box" in capsys.readouterr().out
    assert filled["all"] == pytest.approx(100 * np.mean(expected_fill(dataset)))
    assert row["all"] > filled["all"]


def test_image_pyramids_decode_no_given_boxes():
    assert box_decoder(ProposalPredictor(build_config("sharpmask_lite0"))) is None
