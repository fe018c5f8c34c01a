"""Detections that keep the masks of their proposals, through Detectron2's own heads, postprocessing and evaluation."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances, ROIMasks
from detectron2.utils.events import EventStorage
from drawing import compressed_rle as encode
from precomputed import SIZE, to_detector
from pycocotools import mask as mask_util
from sharpmask_d2.checkpoint import StrictCheckpointer
from sharpmask_d2.data import ProposalMapper, register_datasets
from sharpmask_d2.data.proposal_mapper import sample_masks
from sharpmask_d2.modeling import ProposalMaskTTA
from sharpmask_d2.modeling.roi_heads import MaskKeepingOutputLayers, ProposalROIMasks, without_masks

OURS = {"StandardROIHeads": "ProposalMaskROIHeads", "Res5ROIHeads": "ProposalMaskRes5ROIHeads"}


def draw_ellipses(count: int, rng) -> list:
    """Bitmaps of ellipses inside an image of `SIZE`."""
    masks = []
    for _ in range(count):
        bitmap = np.zeros(SIZE, np.uint8)
        centre = [int(rng.integers(20, side - 20)) for side in SIZE[::-1]]
        masks.append(cv2.ellipse(bitmap, centre, rng.integers(5, 30, 2).tolist(), 30, 0, 360, 1, -1) > 0)
    return masks


def build(cfg, *, fixed: bool = True):
    """A detector in evaluation. If `fixed`, its scores are random and its boxes are those of the proposals, so that each detection can be
    traced to its proposal."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if fixed:
        model.roi_heads.box_predictor.forward = _predict_proposals
    return model


def _predict_proposals(features: torch.Tensor) -> tuple:
    scores = torch.randn(len(features), 3, generator=torch.Generator().manual_seed(0))
    return scores, torch.zeros(len(features), 8)


def precomputed(cfg, roi_heads: str = "ProposalMaskROIHeads"):
    cfg = to_detector(cfg, roi_heads)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    cfg.MODEL.LOAD_PROPOSALS = True
    return cfg


@pytest.fixture
def record(make_dataset, tmp_path):
    """A dataset dict with 12 proposals, and their bitmaps in the same order."""
    data = make_dataset(tmp_path / "data", num_images=1, size=SIZE)
    masks = data.masks[1] + draw_ellipses(9, np.random.default_rng(0))
    rles = [encode(mask) for mask in masks]
    boxes = np.array([mask_util.toBbox(rle) for rle in rles], dtype=np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "file_name": str(data.image_root / "1.png"),
        "image_id": 1,
        "height": SIZE[0],
        "width": SIZE[1],
        "proposal_boxes": boxes,
        "proposal_objectness_logits": np.linspace(2, -2, len(boxes)).astype(np.float32),
        "proposal_bbox_mode": 0,
        "proposal_masks": {
            "size": list(SIZE),
            "counts": "\n".join(r["counts"] for r in rles).encode(),
            "order": np.arange(len(rles)),
        },
    }, masks


def source(box, boxes) -> int:
    """Index of the box that a detection has."""
    distances = np.abs(np.asarray(boxes) - np.asarray(box)).max(axis=1)
    assert distances.min() < 0.01
    return int(distances.argmin())


@pytest.mark.parametrize("roi_heads", list(OURS.values()))
@pytest.mark.parametrize(("scale", "flip"), [(1, False), (2, False), (2, True)])
def test_detections_have_the_masks_of_their_precomputed_proposals(tiny_cfg, record, roi_heads, scale, flip):
    record, bitmaps = record
    cfg = precomputed(tiny_cfg, roi_heads)
    model = build(cfg)
    augmentations = [T.Resize((scale * SIZE[0], scale * SIZE[1])), T.RandomFlip(prob=float(flip))]
    inputs = ProposalMapper(cfg, False, augmentations=augmentations)(record)
    with torch.no_grad():
        found = model([inputs])[0]["instances"]
    assert found.pred_masks.shape == (len(found), *SIZE)
    assert found.pred_masks.dtype == torch.bool
    boxes = record["proposal_boxes"].copy()
    if flip:
        boxes[:, [0, 2]] = SIZE[1] - boxes[:, [2, 0]]
    exact = sample_masks([encode(mask) for mask in bitmaps], SIZE).paste().numpy()
    sources = [source(box, boxes) for box in found.pred_boxes.tensor.numpy()]
    # Suppression removes some proposals, and the scores change the order of the others.
    assert 3 < len(set(sources)) <= 12
    assert sources != sorted(sources)
    for number, mask in zip(sources, found.pred_masks.numpy()):
        bitmap, expected = bitmaps[number], exact[number]
        if flip:
            assert (mask[:, ::-1] != expected).mean() < 1e-3
            bitmap = bitmap[:, ::-1]
        else:
            np.testing.assert_array_equal(mask, expected)
        assert (mask & bitmap).sum() / (mask | bitmap).sum() > 0.9


@pytest.mark.parametrize("roi_heads", list(OURS.values()))
def test_detections_have_the_masks_of_online_proposals(tiny_cfg, roi_heads):
    model = build(online(tiny_cfg, roi_heads))
    proposed = []
    model.proposal_generator.register_forward_hook(lambda module, args, out: proposed.extend(out[0]))
    images = [torch.rand(3, 100, 140, generator=torch.Generator().manual_seed(i)) * 255 for i in range(2)]
    # The second image was enlarged for the detector.
    inputs = [{"image": images[0]}, {"image": images[1], "height": 50, "width": 70}]
    with torch.no_grad():
        outputs = model(inputs)
    for output, proposals, size in zip(outputs, proposed, [(100, 140), (50, 70)]):
        found = output["instances"]
        assert len({tuple(box) for box in found.pred_boxes.tensor.tolist()}) > 3
        assert found.pred_masks.shape[1:] == size
        pasted = proposals.proposal_masks.scale(size[1] / 140, size[0] / 100, size).paste().numpy()
        boxes = proposals.proposal_boxes.tensor.numpy() * (size[0] / 100)
        for box, mask in zip(found.pred_boxes.tensor.numpy(), found.pred_masks.numpy()):
            # Several windows can have the same tight box.
            same = np.abs(boxes - box).max(axis=1) < 0.01
            assert any((pasted[number] == mask).all() for number in np.flatnonzero(same))


def test_predictions_that_are_not_finite_do_not_shift_the_masks(record):
    _, bitmaps = record
    masks = sample_masks([encode(mask) for mask in bitmaps[:5]], SIZE)
    proposals = Instances(SIZE, proposal_boxes=Boxes(masks.boxes().tensor), proposal_masks=masks)
    layers = MaskKeepingOutputLayers(
        ShapeSpec(channels=4),
        box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
        num_classes=1,
        cls_agnostic_bbox_reg=True,
        test_nms_thresh=1.0,
    )
    logits = torch.tensor([[3.0, 0], [float("nan"), 0], [5.0, 0], [1.0, 0], [4.0, 0]])
    (found,), (indices,) = layers.inference((logits, torch.zeros(5, 4)), [proposals])
    assert indices.tolist() == [2, 4, 0, 3]
    pasted = found.pred_masks.to_bitmasks(None, *SIZE).tensor
    assert torch.equal(pasted, masks.paste(torch.tensor([2, 4, 0, 3])))


@pytest.mark.parametrize("roi_heads", list(OURS.values()))
def test_without_detections_or_proposals_there_are_no_masks(tiny_cfg, record, roi_heads):
    cfg = precomputed(tiny_cfg, roi_heads)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1.1
    mapper = ProposalMapper(cfg, False)
    empty = dict(record[0], proposal_boxes=np.zeros((0, 4), np.float32), proposal_objectness_logits=np.zeros(0))
    empty["proposal_masks"] = {"size": None, "counts": b"", "order": np.zeros(0, int)}
    with torch.no_grad():
        for output in build(cfg)([mapper(record[0]), mapper(empty)]):
            assert output["instances"].pred_masks.shape == (0, *SIZE)


def test_proposals_without_masks_give_detections_without(tiny_cfg, record):
    cfg = precomputed(tiny_cfg)
    inputs = ProposalMapper(cfg, False, masks=False)(record[0])
    with torch.no_grad():
        (output,) = build(cfg)([inputs])
    assert len(output["instances"]) > 0
    assert not output["instances"].has("pred_masks")


@pytest.mark.parametrize("roi_heads", list(OURS.values()))
def test_proposals_with_masks_can_be_trained_on(tiny_cfg, record, roi_heads):
    cfg = precomputed(tiny_cfg, roi_heads)
    record = dict(record[0])
    record["annotations"] = [{"bbox": [10, 10, 60, 70], "bbox_mode": 0, "category_id": 1}]
    inputs = ProposalMapper(cfg, True, masks=True, augmentations=[])(record)
    assert inputs["proposals"].has("proposal_masks")
    with EventStorage():
        losses = build(cfg).train()([inputs])
    assert all(loss.isfinite() for loss in losses.values())
    bare = without_masks([inputs["proposals"]])[0]
    assert set(bare.get_fields()) == {"proposal_boxes", "objectness_logits"}
    assert inputs["proposals"].has("proposal_masks")


@pytest.mark.parametrize("stock", list(OURS))
@pytest.mark.parametrize("masks", ["head", "none", "bad", "head without masks"])
def test_the_config_selects_the_masks(tiny_cfg, record, stock, masks):
    cfg = precomputed(tiny_cfg, OURS[stock])
    inputs = ProposalMapper(cfg, False)(record[0])
    cfg.MODEL.MASK_ON = masks != "head without masks"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.SHARPMASK.DETECTION_MASKS = masks.split()[0]
    if masks == "bad" or not cfg.MODEL.MASK_ON:
        with pytest.raises(ValueError, match=r"MODEL\.SHARPMASK\.DETECTION_MASKS is"):
            build_model(cfg)
        return
    ours = build(cfg)
    with torch.no_grad():
        found = ours([inputs])[0]["instances"]
    assert len(found) > 0
    if masks == "none":
        assert not found.has("pred_masks")
        assert not any("mask_head" in name for name, _ in ours.named_parameters())
        return
    cfg.MODEL.ROI_HEADS.NAME = stock
    detectron2 = build(cfg)
    detectron2.load_state_dict(ours.state_dict())
    with torch.no_grad():
        expected = detectron2([inputs])[0]["instances"]
    assert torch.equal(found.pred_masks, expected.pred_masks)


@pytest.mark.parametrize("stock", list(OURS))
def test_checkpoints_of_stock_detectors_give_the_same_detections(tiny_cfg, record, stock, tmp_path):
    cfg = precomputed(tiny_cfg, stock)
    theirs = build(cfg, fixed=False)
    DetectionCheckpointer(theirs, str(tmp_path)).save("stock")
    cfg.MODEL.ROI_HEADS.NAME = OURS[stock]
    torch.manual_seed(1)
    ours = build_model(cfg).eval()
    incompatible = ours.load_state_dict(torch.load(tmp_path / "stock.pth", weights_only=False)["model"], strict=True)
    assert not incompatible.missing_keys
    ours = build_model(cfg).eval()
    StrictCheckpointer(ours).load(str(tmp_path / "stock.pth"))
    inputs = ProposalMapper(cfg, False)(record[0])
    with torch.no_grad():
        expected, found = (model([inputs])[0]["instances"] for model in (theirs, ours))
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert found.has("pred_masks")
    assert not expected.has("pred_masks")


@pytest.fixture
def drawn(make_dataset, tmp_path):
    data = make_dataset(tmp_path / "evaluated", num_images=2, size=SIZE)
    register_datasets([("evaluated", str(data.annotations), str(data.image_root))])
    yield data
    DatasetCatalog.remove("evaluated")
    MetadataCatalog.remove("evaluated")


def test_coco_evaluation_of_perfect_detections_is_perfect(drawn, tiny_cfg):
    model = build(precomputed(tiny_cfg))
    # The heads predict the true class of each proposal, and its unchanged box.
    model.roi_heads.box_predictor.forward = lambda x: (classes[: len(x)], torch.zeros(len(x), 8))
    # Detectron2 numbers the categories when it reads the dataset.
    DatasetCatalog.get("evaluated")
    evaluator = COCOEvaluator("evaluated", output_dir=None)
    evaluator.reset()
    for image_id, masks in drawn.masks.items():
        windows = sample_masks([encode(mask) for mask in masks], SIZE).scale(2, 2, (240, 320))
        proposals = Instances((240, 320), proposal_boxes=Boxes(windows.boxes().tensor), proposal_masks=windows)
        # The categories 3 and 7 alternate, and are the classes 0 and 1.
        classes = torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])[torch.arange(len(masks)) % 2]
        inputs = {"image": torch.zeros(3, 240, 320), "height": 120, "width": 160, "image_id": image_id}
        with torch.no_grad():
            evaluator.process([inputs], model([{**inputs, "proposals": proposals}]))
    results = evaluator.evaluate()
    assert results["bbox"]["AP50"] == pytest.approx(100)
    assert results["segm"]["AP50"] == pytest.approx(100)
    assert results["segm"]["AP"] > 90


def test_proposal_masks_have_the_interface_of_roi_masks(record):
    _, bitmaps = record
    masks = sample_masks([encode(mask) for mask in bitmaps], SIZE)
    found = Instances(SIZE, pred_boxes=Boxes(masks.boxes().tensor))
    found.pred_masks = ProposalROIMasks(masks)
    assert isinstance(found.pred_masks, ROIMasks)
    chosen = found.to("cpu")[torch.tensor([5, 2])]
    assert len(chosen.pred_masks) == 2
    assert "num_masks=2" in repr(chosen.pred_masks)
    assert torch.equal(chosen.pred_masks.to_bitmasks(None, *SIZE).tensor, masks.paste(torch.tensor([5, 2])))


def augmented(cfg, *, flip: bool):
    """Add test-time augmentation at two sizes to a config, in place. The image has 50 x 70 pixels."""
    cfg.TEST.AUG.MIN_SIZES = (50, 75)
    cfg.TEST.AUG.FLIP = flip
    cfg.TEST.DETECTIONS_PER_IMAGE = 30
    return cfg


def online(cfg, roi_heads: str):
    """Turn `tiny_cfg`, in place, into a detector with a SharpMask generator."""
    cfg = to_detector(cfg, roi_heads)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMask"
    # Windows of 64 and 45 pixels, so that no image is enlarged.
    cfg.MODEL.SHARPMASK.WINDOW_SIZE = 64
    cfg.MODEL.SHARPMASK.TEST.SCALES = [0.0, 0.5]
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.8
    if roi_heads == "MultiPathROIHeads":
        cfg.MODEL.MULTIPATH.LEVELS = [["res4"]] * 4
        cfg.MODEL.MULTIPATH.REGRESSOR_LEVELS = ["res4"]
        cfg.MODEL.MULTIPATH.MIX_CHANNELS = 8
    return cfg


@pytest.mark.parametrize(
    ("roi_heads", "mask_on"),
    [("ProposalMaskROIHeads", True), ("ProposalMaskRes5ROIHeads", False), ("MultiPathROIHeads", False)],
)
def test_detectron2s_test_time_augmentation_raises_instead_of_losing_masks(tiny_cfg, roi_heads, mask_on):
    cfg = augmented(online(tiny_cfg, roi_heads), flip=True)
    cfg.MODEL.MASK_ON = mask_on
    model = build(cfg, fixed=False)
    inputs = {"image": torch.zeros(3, 50, 70, dtype=torch.uint8), "height": 25, "width": 35}
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"MODEL\.SHARPMASK\.DETECTION_MASKS is 'proposal'.*ProposalMaskTTA"),
    ):
        GeneralizedRCNNWithTTA(cfg, model)([inputs])


def test_detectron2s_test_time_augmentation_runs_without_masks(tiny_cfg):
    cfg = augmented(online(tiny_cfg, "ProposalMaskROIHeads"), flip=False)
    cfg.MODEL.SHARPMASK.DETECTION_MASKS = "none"
    inputs = {"image": torch.zeros(3, 50, 70, dtype=torch.uint8), "height": 25, "width": 35}
    with torch.no_grad():
        (output,) = GeneralizedRCNNWithTTA(cfg, build(cfg, fixed=False))([inputs])
    assert len(output["instances"]) > 0
    assert not output["instances"].has("pred_masks")


@pytest.mark.parametrize(
    ("roi_heads", "flip"),
    [("ProposalMaskROIHeads", True), ("ProposalMaskRes5ROIHeads", False), ("MultiPathROIHeads", True)],
)
def test_augmented_detections_have_the_masks_of_their_proposals(tiny_cfg, roi_heads, flip):
    cfg = augmented(online(tiny_cfg, roi_heads), flip=flip)
    fixed = roi_heads != "MultiPathROIHeads"
    model = build(cfg, fixed=fixed)
    proposed = []
    model.proposal_generator.register_forward_hook(lambda module, args, out: proposed.extend(out[0]))
    image = (torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0)) * 255).byte()
    with torch.no_grad():
        (output,) = ProposalMaskTTA(cfg, model)([{"image": image, "height": 25, "width": 35}])
        boxes_only = cfg.clone()
        boxes_only.MODEL.SHARPMASK.DETECTION_MASKS = "none"
        stock = build(boxes_only, fixed=fixed)
        stock.load_state_dict(model.state_dict())
        (expected,) = GeneralizedRCNNWithTTA(boxes_only, stock)([{"image": image, "height": 25, "width": 35}])
    found = output["instances"]
    # The boxes equal those of Detectron2.
    torch.testing.assert_close(found.pred_boxes.tensor, expected["instances"].pred_boxes.tensor)
    torch.testing.assert_close(found.scores, expected["instances"].scores)
    assert found.pred_masks.shape == (len(found), 25, 35)
    # Bitmaps of all proposals in the frame of the original image.
    pasted = []
    for number, proposals in enumerate(proposed[: 4 if flip else 2]):
        height, width = proposals.image_size
        masks = proposals.proposal_masks
        masks = masks.hflip() if flip and number % 2 else masks
        pasted.append(masks.scale(35 / width, 25 / height, (25, 35)).paste())
    sources = set()
    for mask in found.pred_masks:
        equal = [number for number, masks in enumerate(pasted) if (masks == mask).all(dim=(1, 2)).any()]
        assert equal
        sources.update(equal)
    # Detections come from both sizes, and from flipped images.
    assert len(sources) > (2 if flip else 1)


def test_detectors_with_a_mask_head_are_augmented_as_in_detectron2(tiny_cfg):
    cfg = augmented(online(tiny_cfg, "ProposalMaskROIHeads"), flip=True)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.SHARPMASK.DETECTION_MASKS = "head"
    model = build(cfg, fixed=False)
    inputs = {"image": torch.zeros(3, 50, 70, dtype=torch.uint8), "height": 25, "width": 35}
    with torch.no_grad():
        found, expected = (
            tta(cfg, model)([inputs])[0]["instances"] for tta in (ProposalMaskTTA, GeneralizedRCNNWithTTA)
        )
    assert len(found) > 0
    assert torch.equal(found.pred_masks, expected.pred_masks)
