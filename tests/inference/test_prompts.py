"""Prompts: boxes and points in drawn images, by the packaged model and by a small model with random weights."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from sharpmask_d2 import model_zoo

# isort: split

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from sharpmask_d2.errors import UserError
from sharpmask_d2.inference import ProposalPredictor, SharpMaskPredictor
from sharpmask_d2.inference.configuration import build_config
from sharpmask_d2.inference.point_windows import box_iou, candidate_windows, choose_distinct, grid_boxes
from sharpmask_d2.inference.predictor import prepare_image

SIZE = (96, 128)


@pytest.fixture(scope="module")
def proposals():
    """The packaged model without resizing."""
    return ProposalPredictor(build_config(opts=("INPUT.MIN_SIZE_TEST", "96", "MODEL.DEVICE", "cpu")))


@pytest.fixture(scope="module")
def drawing(make_dataset, tmp_path_factory):
    """An image of three objects, and their masks."""
    dataset = make_dataset(tmp_path_factory.mktemp("drawing"), num_images=1, size=SIZE)
    return cv2.imread(str(dataset.image_root / "1.png")), dataset.masks[1]


@pytest.fixture
def predictor(proposals, drawing):
    predictor = SharpMaskPredictor(proposals)
    predictor.set_image(drawing[0])
    return predictor


@pytest.fixture(scope="module")
def small_cfg():
    """The packaged backbone with a narrow decoder of random weights."""
    cfg = model_zoo.get_config(model_zoo.DEFAULT)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    cfg.INPUT.MIN_SIZE_TEST = 96
    cfg.MODEL.SHARPMASK.EMBED_DIM = cfg.MODEL.SHARPMASK.REFINEMENT.CHANNELS = 8
    torch.manual_seed(0)
    return cfg


def tight_box(mask) -> list:
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def middle(mask) -> list:
    ys, xs = np.nonzero(mask)
    return [int(xs.mean()), int(ys.mean())]


def iou(mask, other) -> float:
    return (mask & other).sum() / (mask | other).sum()


def test_a_prompt_by_the_window_of_a_proposal_gives_its_mask(proposals, drawing):
    found = proposals(drawing[0])[:10].proposal_masks
    predictor = SharpMaskPredictor(proposals, crop_to_boxes=False)
    predictor.set_image(drawing[0])
    # The objects that fill these windows canonically.
    centres, sides = (found.windows[:, :2] + found.windows[:, 2:]) / 2, found.windows[:, 2:] - found.windows[:, :2]
    half = sides * proposals.model.proposal_generator.mask_share / 2
    masks, _, logits = predictor.predict(boxes=torch.cat([centres - half, centres + half], dim=1).numpy())
    np.testing.assert_allclose(logits[:, 0], found.logits.numpy(), atol=1e-3)
    assert np.array_equal(masks[:, 0], found.to_numpy())


@torch.no_grad()
def test_boxes_give_the_masks_of_a_mask_head_with_equal_weights(drawing):
    """The mask head of a detector on the packaged backbone, whose image is resized as well."""
    image, truth = drawing
    size = ("INPUT.MIN_SIZE_TEST", "144", "MODEL.DEVICE", "cpu")
    # Detectron2 pastes the masks of detections with this threshold.
    cfg = build_config(opts=(*size, "MODEL.SHARPMASK.TEST.MASK_THRESHOLD", "0.5"))
    proposals = ProposalPredictor(cfg)
    predictor = SharpMaskPredictor(proposals, crop_to_boxes=False)
    predictor.set_image(image)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = "GeneralizedRCNN", True
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = list(cfg.MODEL.SHARPMASK.FPN.IN_FEATURES)
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    cfg.MODEL.ROI_MASK_HEAD.NAME, cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "SharpMaskHead", ""
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True
    detector = build_model(cfg).eval()
    DetectionCheckpointer(detector).load(cfg.MODEL.WEIGHTS)
    detector.roi_heads.mask_head.decoder.load_state_dict(detector.proposal_generator.decoder.state_dict())

    boxes = torch.tensor([*map(tight_box, truth), [-20, 30, 60, 140], [100, 60, 104, 63]], dtype=torch.float32)
    masks, _, _ = predictor.predict(boxes=boxes.numpy())
    inputs = prepare_image(image, proposals.resize, cfg)
    found = Instances((144, 192), pred_boxes=Boxes(1.5 * boxes), scores=torch.ones(len(boxes)))
    found.pred_classes = torch.zeros(len(boxes), dtype=torch.long)
    detected = detector.inference([inputs], [found])[0]["instances"].pred_masks.numpy()
    assert detected.shape == (5, *SIZE)
    # The prepared model of a predictor rounds differently, which shows in pixels next to the threshold.
    assert [(one == other).mean() > 0.999 for one, other in zip(masks[:, 0], detected)] == [True] * 5
    assert all(iou(one, other) > 0.9 for one, other in zip(masks[:, 0], detected))
    for mask, other in zip(detected, truth):
        assert iou(mask, other) > 0.7


def test_boxes_of_drawn_objects_give_their_masks(predictor, drawing):
    boxes = [tight_box(mask) for mask in drawing[1]]
    masks, scores, logits = predictor.predict(boxes=boxes)
    assert masks.shape == (3, 1, *SIZE)
    assert masks.dtype == bool
    assert scores.shape == (3, 1)
    assert logits.shape == (3, 1, 56, 56)
    for mask, truth, (x0, y0, x1, y1) in zip(masks[:, 0], drawing[1], boxes):
        assert iou(mask, truth) > 0.85
        outside = mask.copy()
        outside[y0:y1, x0:x1] = False
        assert not outside.any()
    one, score, _ = predictor.predict(box=np.array(boxes[1]))
    assert np.array_equal(one, masks[1])
    assert score == scores[1]


def test_a_click_on_a_drawn_object_gives_its_mask(predictor, drawing):
    points = [[middle(mask)] for mask in drawing[1]]
    masks, scores, _ = predictor.predict(points)
    assert masks.shape == (3, 3, *SIZE)
    assert (np.diff(scores) <= 0).all()
    for found, truth, ((x, y),) in zip(masks, drawing[1], points):
        assert found[0, y, x]
        assert max(iou(mask, truth) for mask in found) > 0.8
        assert iou(found[0], truth) > 0.6
    # The same point alone, under the names of Segment Anything.
    alone, best, _ = predictor.predict(point_coords=np.array(points[0]), point_labels=[1], multimask_output=False)
    assert alone.shape == (1, *SIZE)
    assert best[0] == pytest.approx(scores[0, 0], abs=1e-4)


def test_points_on_the_background_exclude_masks(predictor, drawing):
    """Two objects are inside of a mask only if neither is clicked as background."""
    first, second = (middle(mask) for mask in drawing[1][:2])
    (mask,), _, _ = predictor.predict([first, second], [1, 0], multimask_output=False)
    assert mask[first[1], first[0]]
    assert not mask[second[1], second[0]]
    # A point labelled -1 fills up the rows of a batch, wherever it lies.
    masks, scores, _ = predictor.predict([[first, second], [first, [-5, -5]]], [[1, 0], [1, -1]])
    alone, _, _ = predictor.predict([first])
    assert np.array_equal(masks[1], alone)
    # A mask that holds all points of which one is wrong has a low score.
    _, wrong, _ = predictor.predict([first, first], [1, 0])
    assert wrong.max() < scores[1].max() / 2


def test_points_choose_among_the_windows_of_a_box(predictor, drawing):
    box, point = tight_box(drawing[1][0]), middle(drawing[1][0])
    masks, scores, _ = predictor.predict([point], [1], box)
    assert masks.shape == (1, *SIZE)
    assert iou(masks[0], drawing[1][0]) > 0.8
    _, wrong, _ = predictor.predict([point], [0], box)
    assert wrong[0] < scores[0] / 2


def test_logits_of_pixels_are_above_the_threshold_in_the_mask(predictor, drawing):
    box = tight_box(drawing[1][0])
    masks, _, _ = predictor.predict(boxes=box)
    logits, _, _ = predictor.predict(boxes=box, return_logits=True)
    threshold = predictor.predict_masks(boxes=box).masks.threshold
    # Rounding may decide where a logit is next to the threshold.
    assert ((logits > threshold) == masks).mean() > 0.999
    assert np.isneginf(logits[0, 0, 0]) or not masks[0, 0, 0]


@pytest.mark.parametrize("point", [[0, 0], [128, 96], [127, 0], [0.5, 95.9]])
def test_points_on_the_border(predictor, point):
    masks, scores, _ = predictor.predict([point])
    assert masks.shape == (3, *SIZE)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_odd_boxes_have_masks_or_none(predictor):
    boxes = [[300, 300, 400, 400], [-60, -60, -10, -10], [10, 10, 10, 10], [20, 10, 20, 60], [-50, -50, 300, 300]]
    masks, scores, logits = predictor.predict(boxes=boxes)
    assert not masks[:4].any()
    assert ((scores >= 0) & (scores <= 1)).all()
    assert np.isfinite(logits).all()
    masks, scores, _ = predictor.predict(boxes=np.zeros((0, 4)))
    assert masks.shape == (0, 1, *SIZE)
    assert scores.shape == (0, 1)


def test_ten_thousand_boxes(small_cfg):
    predictor = SharpMaskPredictor(small_cfg)
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    corners = np.sort(np.random.default_rng(1).uniform(-20, 150, (10_000, 2, 2)), axis=1)
    boxes = corners.reshape(-1, 4)
    found = predictor.predict_masks(boxes=boxes)
    assert len(found.masks) == 10_000
    assert found.scores.shape == (10_000, 1)
    some = [3, 5_000, 9_999]
    few = predictor.predict_masks(boxes=boxes[some])
    torch.testing.assert_close(found.masks[torch.tensor(some)].logits, few.masks.logits, atol=1e-4, rtol=1e-4)


def test_images_are_resized_and_channels_are_swapped(drawing):
    predictor = SharpMaskPredictor(build_config(opts=("INPUT.MIN_SIZE_TEST", "144", "MODEL.DEVICE", "cpu")))
    image, truth = drawing
    predictor.set_image(image)
    boxes = [tight_box(mask) for mask in truth]
    masks, scores, _ = predictor.predict(boxes=boxes)
    assert masks.shape[2:] == SIZE
    assert np.mean([iou(mask, other) for mask, other in zip(masks[:, 0], truth)]) > 0.85
    predictor.set_image(image[:, :, ::-1], image_format="RGB")
    assert np.array_equal(predictor.predict(boxes=boxes)[1], scores)


def test_threads_with_instances_that_share_a_model(proposals):
    images = [np.random.default_rng(i).integers(0, 256, (*SIZE, 3), dtype=np.uint8) for i in range(4)]

    def segment(image):
        predictor = SharpMaskPredictor(proposals)
        predictor.set_image(image)
        return predictor.predict(points=[[60, 50]])[2]

    expected = [segment(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(segment, images), expected):
            np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "prompt is empty"),
        ({"point_labels": [1]}, "without points"),
        ({"points": [[1, 2]], "point_coords": [[1, 2]]}, "two names"),
        ({"points": [[1, 2, 3]]}, r"shape \(1, 3\)"),
        ({"points": [[1, 2], [3]]}, "not an array of numbers"),
        ({"points": [[200, 2]]}, r"\[200.0, 2.0\] lies outside of the image of 128 x 96"),
        ({"points": [[float("nan"), 2]]}, "not finite"),
        ({"points": [[1, 2]], "point_labels": [2]}, "1 for the object"),
        ({"points": [[1, 2]], "point_labels": [1, 1]}, "one label per point"),
        ({"points": [[1, 2]], "point_labels": [0]}, "no point with the label 1"),
        ({"boxes": [1, 2, 3]}, r"shape \(3,\)"),
        ({"boxes": [[0, 0, 5, 5], [9, 0, 3, 5]]}, "box 1 is .* x0 <= x1"),
        ({"boxes": [[0, 0, 5, 5], [0, 0, 3, 5]], "points": [[1, 2]]}, "points of 1 prompts but 2 boxes"),
    ],
)
def test_wrong_prompts_end_in_one_line(predictor, prompt, message):
    with pytest.raises(UserError, match=message) as error:
        predictor.predict(**prompt)
    assert "\n" not in str(error.value)


def test_what_cannot_be_prompted_is_refused(proposals, drawing):
    predictor = SharpMaskPredictor(proposals)
    with pytest.raises(UserError, match="set_image"):
        predictor.predict(points=[[1, 1]])
    with pytest.raises(UserError, match="BGR"):
        predictor.set_image(drawing[0], image_format="GBR")
    predictor.set_image(drawing[0])
    predictor.reset_image()
    with pytest.raises(UserError, match="set_image"):
        predictor.predict_grid()
    with pytest.raises(UserError, match="image pyramid"):
        SharpMaskPredictor(model_zoo.get_config("sharpmask_lite0"))


def test_candidates_are_the_best_windows_around_all_points():
    centres = torch.cartesian_prod(torch.arange(0.0, 100, 10), torch.arange(0.0, 100, 10))
    windows = torch.cat([torch.cat([centres - half, centres + half], dim=1) for half in (10, 40)])
    scores = torch.randn(200, generator=torch.Generator().manual_seed(0))
    scores[55] = -torch.inf
    points, labels = torch.tensor([[[42.0, 53.0], [52.0, 48.0], [0, 0]]]), torch.tensor([[1, 1, 0]])
    (chosen,) = candidate_windows(windows, scores, [100, 100], points, labels, share=0.5)
    assert 55 not in chosen
    large = [i for i in chosen.tolist() if i >= 100]
    holds = [
        i
        for i in range(100, 200)
        if all((windows[i, :2] + 20 < p).all() and (p < windows[i, 2:] - 20).all() for p in points[0, :2])
    ]
    assert large == sorted(holds, key=lambda i: -scores[i])[: len(large)]


def test_candidates_that_resemble_a_chosen_one_come_last():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 11], [30, 30, 40, 40], [50, 50, 60, 60]]])
    quality = torch.tensor([[0.9, 0.8, 0.1, 0.0]])
    assert choose_distinct(quality, boxes, 4, 0.7).tolist() == [[0, 2, 1, 3]]


def test_boxes_of_grids():
    logits = torch.full((2, 4, 4), -1.0)
    logits[0, 1, 2:] = 1
    boxes = grid_boxes(logits, torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8]]), 0.0)
    assert boxes.tolist() == [[4, 2, 8, 4], [0, 0, 0, 0]]
    assert box_iou(boxes, boxes).tolist() == [1, 0]
