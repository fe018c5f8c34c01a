"""IoU given one click: decoders with known masks, and the packaged model."""

import json

import cv2
import numpy as np
import pytest
import torch
from sharpmask_d2.cli.analyze import analyze_proposals
from sharpmask_d2.data.coco import load_annotations
from sharpmask_d2.evaluation.analysis.image_proposals import ImageProposals, image_objects
from sharpmask_d2.evaluation.analysis.masks_given_clicks import MasksGivenClicks, decode_clicks, innermost_point
from sharpmask_d2.inference import ProposalPredictor
from sharpmask_d2.inference.configuration import build_config
from sharpmask_d2.inference.given_boxes import click_decoder
from sharpmask_d2.structures import WindowMasks


def test_the_innermost_point_is_far_from_the_background_and_the_border():
    mask = np.zeros((20, 30), bool)
    mask[:9, 4:25] = True
    mask[3:, 20:23] = True
    x, y = innermost_point(mask)
    assert y == 4.5
    assert 8 <= x <= 21
    mask[:] = False
    mask[19, 29] = True
    assert innermost_point(mask).tolist() == [29.5, 19.5]


def test_decoders_with_known_masks(tmp_path, make_dataset):
    dataset = make_dataset(tmp_path, num_images=2, crowd=True, empty=True)
    coco = load_annotations(dataset.annotations)

    def squares(image, points):
        """Squares of 4, 8 and 12 pixels around each point."""
        half = torch.tensor([2.0, 4.0, 6.0]).repeat(len(points))[:, None]
        centres = torch.from_numpy(points).repeat_interleave(3, dim=0).float().floor()
        windows = torch.cat([centres - half, centres + half], dim=1)
        return WindowMasks(torch.ones(len(windows), 2, 2), windows, image.shape[:2])

    analysis, expected = MasksGivenClicks(), []
    for image_id, record in coco.imgs.items():
        objects = image_objects(coco, image_id)
        pixels = cv2.imread(str(dataset.image_root / record["file_name"]))
        given = decode_clicks(squares, pixels, objects.truth.regions)
        analysis.add(ImageProposals(image_id, objects, [], np.zeros((0, 0)), masks_given_clicks=given))
        # All squares lie within their objects, which are larger.
        expected += [[side**2 / mask.sum() for side in (4, 12)] for mask in dataset.masks[image_id]]
    (table,) = analysis.tables()
    first, best = table.records()
    assert [first["all"], best["all"]] == pytest.approx(list(100 * np.mean(expected, axis=0)))
    with pytest.raises(ValueError, match="1 masks for 3 clicks"):
        decode_clicks(
            lambda image, points: squares(image, points)[:1], pixels, objects.truth.regions or given_three(coco)
        )


def given_three(coco) -> list:
    return image_objects(coco, 2).truth.regions


def test_the_table_is_printed_for_models_that_decode_any_window(tmp_path, make_dataset, capsys):
    dataset = make_dataset(tmp_path, num_images=1, objects_per_image=2, size=(96, 128))
    output = tmp_path / "tables.json"
    opts = ("MODEL.SHARPMASK.TEST.NUM_PROPOSALS", "20", "INPUT.MIN_SIZE_TEST", "96")
    analyze_proposals(annotations=dataset.annotations, image_root=dataset.image_root, output=output, opts=opts)
    first, best = json.loads(output.read_text())["given clicks"]
    assert "IoU given one click" in capsys.readouterr().out
    assert best["all"] >= first["all"] > 40


def test_image_pyramids_take_no_clicks():
    assert click_decoder(ProposalPredictor(build_config("sharpmask_lite0"))) is None
