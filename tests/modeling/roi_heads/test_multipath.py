"""RoI heads of MultiPath: each part against a slow reference; with all parts disabled against Detectron2's own heads."""

import math

import pytest
import sharpmask_d2
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, build_roi_heads
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from sharpmask_d2.modeling.roi_heads import (
    IntegralOutputLayers,
    SkipPooler,
    foveal_boxes,
    labels_at_thresholds,
    normalize_regions,
    vote_boxes,
)
from sharpmask_d2.structures import WindowMasks
from torchvision.ops import roi_align

SIZE = (96, 128)
SHAPES = {
    "conv3": ShapeSpec(channels=6, stride=4),
    "conv4": ShapeSpec(channels=10, stride=8),
    "conv5": ShapeSpec(channels=12, stride=16),
}
CLASSES = 3
THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
OFF = {
    "FOVEAL_FACTORS": [1.0],
    "LEVELS": [["conv3", "conv4", "conv5"]],
    "SKIP": False,
    "DROPOUT": 0.0,
    "OWN_REGRESSOR_TOWER": False,
    "IOU_THRESHOLDS": [0.5],
}


def _cfg(name="MultiPathROIHeads", **multipath):
    cfg = get_cfg()
    sharpmask_d2.add_sharpmask_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NAME = name
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["conv5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 80
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.MULTIPATH.MIX_CHANNELS = 8
    for key, value in multipath.items():
        assert key in cfg.MODEL.MULTIPATH
        setattr(cfg.MODEL.MULTIPATH, key, value)
    return cfg


def _heads(name="MultiPathROIHeads", seed=0, **multipath):
    torch.manual_seed(seed)
    return build_roi_heads(_cfg(name, **multipath), SHAPES)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _features(images=2, seed=1):
    random = _generator(seed)
    return {
        name: torch.randn(images, s.channels, SIZE[0] // s.stride, SIZE[1] // s.stride, generator=random)
        for name, s in SHAPES.items()
    }


def _boxes(count, seed=2):
    """Boxes in the image with sides of 8 to 56 pixels."""
    random = torch.rand(count, 4, generator=_generator(seed))
    sides = 8 + 48 * random[:, 2:]
    corners = random[:, :2] * (torch.tensor([float(SIZE[1]), float(SIZE[0])]) - sides)
    return torch.cat([corners, corners + sides], dim=1)


def _proposals(boxes):
    return Instances(SIZE, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes)))


def _targets(boxes):
    return Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.arange(len(boxes)) % CLASSES)


def _near(boxes, seed=3, count=12, by=0.1):
    """`count` jittered copies of each box, whose IoUs with the box lie around the thresholds."""
    copies = boxes.repeat(count, 1)
    sides = (copies[:, 2:] - copies[:, :2]).repeat(1, 2)
    return copies + by * sides * torch.randn(copies.shape, generator=_generator(seed)).clamp(-2, 2)


def _scenes():
    """Proposals and ground truth of two images."""
    truths = [_boxes(4, seed=5), _boxes(3, seed=6)]
    return [_proposals(torch.cat([_near(t), _boxes(20, seed=7)])) for t in truths], [_targets(t) for t in truths]


def _sampled(heads, seed=8):
    proposals, targets = _scenes()
    torch.manual_seed(seed)
    with EventStorage():
        return heads.label_and_sample_proposals(proposals, targets)


def _reference_iou(a, b):
    sides = [max(float(min(a[i + 2], b[i + 2]) - max(a[i], b[i])), 0.0) for i in (0, 1)]
    areas = [float((c[2] - c[0]) * (c[3] - c[1])) for c in (a, b)]
    inside = sides[0] * sides[1]
    return inside / (sum(areas) - inside) if inside > 0 else 0.0


# ---------------------------------------------------------------------- foveal regions


def test_foveal_boxes_equal_those_of_the_paper():
    boxes = torch.cat([_boxes(5), torch.tensor([[0.0, 0.0, 128.0, 96.0], [7.0, 8.0, 7.0, 8.0]])])
    start = {1.0: 0.0, 1.5: 0.25, 2.0: 0.5, 4.0: 1.5}
    for factor, part in start.items():
        expected = []
        for x0, y0, x1, y1 in boxes.double().tolist():
            w, h = x1 - x0, y1 - y0
            x, y = x0 - part * w, y0 - part * h
            expected.append([x, y, x + factor * w, y + factor * h])
        torch.testing.assert_close(foveal_boxes(boxes, factor), torch.tensor(expected), rtol=1e-5, atol=1e-4)
    assert torch.equal(foveal_boxes(boxes, 1.0), boxes)
    assert foveal_boxes(boxes[:0], 2.0).shape == (0, 4)


def test_crops_use_the_levels_of_the_paper():
    heads, features = _heads().eval(), _features()
    reads = {"conv3": [0, 4], "conv4": [0, 1, 2, 4], "conv5": [0, 1, 2, 3, 4]}
    boxes = [Boxes(_boxes(3)), Boxes(_boxes(2))]

    def crops(maps):
        return heads.box_pooler([maps[name] for name in heads.box_in_features], boxes)

    before = crops(features)
    assert len(before) == 5
    for name, expected in reads.items():
        after = crops({**features, name: features[name].flip(1)})
        assert [i for i in range(5) if not torch.allclose(before[i], after[i])] == expected


def test_each_crop_has_its_own_size_and_tower():
    heads, features = _heads().eval(), _features(images=1)
    boxes = _boxes(4)
    crops = heads.box_pooler([features[name] for name in heads.box_in_features], [Boxes(boxes)])
    for crop, pooler, factor in zip(crops, heads.box_pooler.poolers, [1, 1.5, 2, 4, 1.5]):
        torch.testing.assert_close(crop, pooler(features, [Boxes(foveal_boxes(boxes, factor))]))
    class_features, box_features = heads.box_head(crops)
    for i, (tower, crop) in enumerate(zip(heads.box_head.towers, crops)):
        torch.testing.assert_close(class_features[:, 16 * i : 16 * (i + 1)], tower(crop))
    torch.testing.assert_close(box_features, heads.box_head.regressor_tower(crops[4]))
    assert heads.box_predictor.cls_score.weight.shape == (6 * (CLASSES + 1), 4 * 16)
    assert heads.box_predictor.bbox_pred.weight.shape == (4 * CLASSES, 16)


# ---------------------------------------------------------------------- skip connections


def test_skip_pooler_equals_a_slow_reference():
    levels, scale = ["conv3", "conv5", "conv4"], 30.0
    torch.manual_seed(0)
    pooler = SkipPooler(
        SHAPES, levels=levels, resolution=5, sampling_ratio=2, pooler_type="ROIAlignV2", mix_channels=7, scale=scale
    )
    features, boxes = _features(), [_boxes(3), foveal_boxes(_boxes(4, seed=9), 4.0)]
    weight, bias = pooler.mix.weight[:, :, 0, 0], pooler.mix.bias
    expected = []
    for image in range(2):
        for box in boxes[image]:
            parts = []
            for name in levels:
                part = roi_align(
                    features[name][image : image + 1], [box[None]], 5, 1 / SHAPES[name].stride, 2, aligned=True
                )[0]
                norm = math.sqrt(sum(float(v) ** 2 for v in part.flatten()))
                parts.append(part / norm * scale)
            expected.append(torch.einsum("mc,chw->mhw", weight, torch.cat(parts)) + bias[:, None, None])
    out = pooler(features, [Boxes(b) for b in boxes])
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert pooler.output_shape == ShapeSpec(channels=7, height=5, width=5)


def test_without_skip_the_last_level_is_pooled_unchanged():
    pooler = SkipPooler(
        SHAPES, levels=["conv3", "conv4"], resolution=5, sampling_ratio=0, pooler_type="ROIAlignV2", mix_channels=None
    )
    features, boxes = _features(images=1), _boxes(3)
    expected = roi_align(features["conv4"], [boxes], 5, 1 / 8, 0, aligned=True)
    assert torch.equal(pooler(features, [Boxes(boxes)]), expected)
    assert not list(pooler.parameters())
    assert pooler.output_shape == ShapeSpec(channels=10, height=5, width=5)


def test_a_single_level_is_normalised_and_mixed():
    crop = _heads().box_pooler.poolers[3]
    assert crop.levels == ["conv5"]
    features, boxes = _features(images=1), [Boxes(_boxes(3))]
    scaled = {name: 10 * value for name, value in features.items()}
    out = crop(features, boxes)
    torch.testing.assert_close(crop(scaled, boxes), out)
    # The default scale is 1000.
    bias = crop.mix.bias[:, None, None]
    doubled = _heads(SKIP_SCALE=2000.0).box_pooler.poolers[3]
    torch.testing.assert_close(doubled(features, boxes) - bias, 2 * (out - bias), rtol=1e-4, atol=1e-4)


def test_normalisation_of_zeros_and_of_large_half_precision_values():
    pooled = torch.stack([torch.zeros(4, 3, 3), torch.full((4, 3, 3), 6e4)]).half().requires_grad_()
    out = normalize_regions(pooled)
    out.sum().backward()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.flatten(1).norm(dim=1), torch.tensor([0.0, 1.0]))
    assert pooled.grad.abs().max() <= 1


# ---------------------------------------------------------------------- integral loss


def test_labels_at_thresholds():
    random = _generator(0)
    ious = torch.cat([torch.rand(40, generator=random), torch.tensor(THRESHOLDS), torch.tensor([0.9, 1.0])])
    classes = torch.randint(-1, CLASSES + 1, ious.shape, generator=random)
    classes[-2], classes[-1] = CLASSES, -1
    labels = labels_at_thresholds(classes, ious, THRESHOLDS, CLASSES)
    assert labels.shape == (6, len(ious))
    for u, threshold in enumerate(torch.tensor(THRESHOLDS)):
        for r, (label, iou) in enumerate(zip(classes, ious)):
            expected = label if label == -1 or iou >= threshold else CLASSES
            assert labels[u, r] == expected


def _predictors(thresholds):
    """Our predictor and Detectron2's for features of length 9, with equal weights in the first classifier and the regressor."""
    shape, kwargs = (
        ShapeSpec(channels=9),
        {
            "box2box_transform": Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
            "num_classes": CLASSES,
            "loss_weight": {"loss_cls": 0.7, "loss_box_reg": 3.0},
        },
    )
    torch.manual_seed(0)
    ours = IntegralOutputLayers(shape, shape, iou_thresholds=thresholds, **kwargs)
    theirs = FastRCNNOutputLayers(shape, **kwargs)
    with torch.no_grad():
        ours.cls_score.weight.normal_()
        ours.bbox_pred.weight.normal_(std=0.1)
        theirs.cls_score.weight.copy_(ours.cls_score.weight[: CLASSES + 1])
        theirs.bbox_pred.weight.copy_(ours.bbox_pred.weight)
    return ours, theirs


def test_with_one_threshold_losses_equal_those_of_detectron2():
    ours, theirs = _predictors([0.5])
    proposals = _sampled(_heads(**OFF))
    features = torch.randn(sum(map(len, proposals)), 9, generator=_generator(1))
    with EventStorage() as storage:
        expected = theirs.losses(theirs(features), proposals)
        logged = {name: value[0] for name, value in storage.latest().items()}
    with EventStorage() as storage:
        losses = ours.losses(ours((features, features)), proposals)
        assert {name: value[0] for name, value in storage.latest().items()} == logged
    assert losses.keys() == expected.keys()
    for name in expected:
        assert torch.equal(losses[name], expected[name])
        assert expected[name] > 0
    assert "fast_rcnn/cls_accuracy" in logged
    probabilities = ours.predict_probs(ours((features, features)), proposals)
    for mine, other in zip(probabilities, theirs.predict_probs(theirs(features), proposals)):
        assert torch.equal(mine, other)


def test_integral_loss_is_the_mean_over_labels_matched_at_each_threshold():
    ours, theirs = _predictors(THRESHOLDS)
    proposals = _sampled(_heads())
    _, targets = _scenes()
    # An image without ground truth has no gt_boxes.
    proposals.append(_proposals(_boxes(5)))
    proposals[-1].gt_classes = torch.full((5,), CLASSES)
    targets.append(_targets(_boxes(0)))
    features = torch.randn(sum(map(len, proposals)), 9, generator=_generator(1))
    scores, deltas = ours((features, features))
    per_head, foreground = [], []
    for u, threshold in enumerate(THRESHOLDS):
        labels = []
        for proposed, target in zip(proposals, targets):
            for box in proposed.proposal_boxes.tensor:
                ious = [_reference_iou(box, truth) for truth in target.gt_boxes.tensor]
                best = max(range(len(ious)), key=ious.__getitem__) if ious else None
                reached = best is not None and ious[best] >= threshold
                labels.append(int(target.gt_classes[best]) if reached else CLASSES)
        foreground.append(sum(label < CLASSES for label in labels))
        logits = scores[:, u * (CLASSES + 1) : (u + 1) * (CLASSES + 1)]
        per_head.append(F.cross_entropy(logits, torch.tensor(labels)))
    # The labels differ between all thresholds.
    assert foreground == sorted(set(foreground), reverse=True)
    with EventStorage():
        losses = ours.losses((scores, deltas), proposals)
        expected_box = theirs.losses((scores[:, : CLASSES + 1], deltas), proposals)["loss_box_reg"]
    torch.testing.assert_close(losses["loss_cls"], 0.7 * sum(per_head) / 6)
    assert torch.equal(losses["loss_box_reg"], expected_box)


def test_ignored_rois_do_not_contribute_to_the_loss():
    ours, _ = _predictors(THRESHOLDS)
    proposals = _sampled(_heads())[:1]
    features = torch.randn(len(proposals[0]), 9, generator=_generator(1))
    kept = torch.arange(len(proposals[0])) % 3 > 0
    with EventStorage():
        expected = ours.losses(ours((features[kept], features[kept])), [proposals[0][kept]])["loss_cls"]
        proposals[0].gt_classes[~kept] = -1
        torch.testing.assert_close(ours.losses(ours((features, features)), proposals)["loss_cls"], expected)


def test_probabilities_are_averaged_over_the_classifiers():
    ours, _ = _predictors(THRESHOLDS)
    features = torch.randn(7, 9, generator=_generator(1))
    scores = ours((features, features))[0]
    found = ours.predict_probs((scores, None), [_proposals(_boxes(n)) for n in (3, 0, 4)])
    assert [len(p) for p in found] == [3, 0, 4]
    expected = sum(part.softmax(1) for part in scores.split(CLASSES + 1, dim=1)) / 6
    torch.testing.assert_close(torch.cat(found), expected)


def test_initialisation():
    predictor = build_roi_heads(_cfg(), SHAPES).box_predictor
    assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.15)
    assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.25)
    assert not predictor.cls_score.bias.any()
    assert not predictor.bbox_pred.bias.any()


# ---------------------------------------------------------------------- all parts disabled


def _off_and_standard():
    ours, theirs = _heads(**OFF), _heads("StandardROIHeads", seed=1)
    with torch.no_grad():
        theirs.box_predictor.cls_score.weight.normal_()
        theirs.box_predictor.bbox_pred.weight.normal_(std=0.1)
    weights = {}
    for name, value in theirs.state_dict().items():
        weights[name.replace("box_head.", "box_head.towers.0.")] = value
    ours.load_state_dict(weights)
    return ours, theirs


def test_with_all_parts_disabled_losses_equal_those_of_standard_roi_heads():
    losses, gradients = [], []
    for heads in _off_and_standard():
        features = {name: value.requires_grad_() for name, value in _features().items()}
        proposals, targets = _scenes()
        torch.manual_seed(4)
        with EventStorage():
            sampled, loss = heads(None, features, proposals, targets)
        assert sum(len(p) for p in sampled) > 60
        sum(loss.values()).backward()
        losses.append(loss)
        gradients.append(features["conv5"].grad)
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        assert torch.equal(losses[0][name], losses[1][name])
    assert torch.equal(*gradients)


def test_with_all_parts_disabled_detections_equal_those_of_standard_roi_heads():
    found = []
    for heads in _off_and_standard():
        with torch.no_grad():
            found.append(heads.eval()(None, _features(), _scenes()[0])[0])
    for ours, theirs in zip(*found):
        assert len(ours) > 10
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        assert ours.get_fields().keys() == theirs.get_fields().keys()


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ({"SKIP": False}, "mix"),
        ({"OWN_REGRESSOR_TOWER": False}, "regressor_tower"),
        ({"FOVEAL_FACTORS": [1.0], "LEVELS": [["conv3", "conv4", "conv5"]]}, "towers.1"),
    ],
)
def test_each_part_can_be_disabled_alone(part, names):
    assert any(names in name for name, _ in _heads().named_parameters())
    heads = _heads(**part)
    assert not any(names in name for name, _ in heads.named_parameters())
    with EventStorage():
        sum(heads(None, _features(), *_scenes())[1].values()).backward()
    assert all(p.grad is not None for p in heads.parameters())


# ---------------------------------------------------------------------- box voting


def _reference_votes(kept, kept_classes, boxes, scores, classes, iou):
    voted = []
    for box, label in zip(kept, kept_classes):
        total, weight = torch.zeros(4), 0.0
        for other, score, other_label in zip(boxes, scores, classes):
            if label == other_label and _reference_iou(box, other) >= iou:
                total, weight = total + score * other, weight + float(score)
        voted.append(total / weight if weight else box)
    return torch.stack(voted)


def test_voting_equals_a_slow_reference():
    boxes = torch.cat([_near(_boxes(4)), torch.tensor([[5.0, 5.0, 5.0, 9.0]])])
    random = _generator(0)
    # Copies of the same box have both classes.
    scores, classes = torch.rand(len(boxes), generator=random), torch.arange(len(boxes)) // 4 % 2
    # The last box has no area, so that it does not even overlap itself.
    kept = torch.tensor([0, 1, 9, 14, len(boxes) - 1])
    args = boxes[kept], classes[kept], boxes, scores, classes, 0.5
    voted = vote_boxes(*args)
    torch.testing.assert_close(voted, _reference_votes(*args))
    assert not torch.allclose(voted[:4], boxes[kept][:4], atol=0.1)
    assert torch.equal(voted[4], boxes[-1])
    assert vote_boxes(boxes[:0], classes[:0], *args[2:]).shape == (0, 4)
    assert vote_boxes(*(a[:0] for a in args[:5]), 0.5).shape == (0, 4)


def _random_heads(**multipath):
    """Heads with random predictions, which differ between RoIs."""
    heads = _heads(**{"DROPOUT": 0.0, **multipath}).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        heads.box_predictor.cls_score.weight.normal_(std=0.1)
        heads.box_predictor.bbox_pred.weight.normal_(std=0.1)
    return heads


@torch.no_grad()
@pytest.mark.parametrize("agnostic", [False, True])
def test_boxes_removed_by_suppression_contribute_to_the_mean(agnostic):
    cfg = _cfg(BOX_VOTING=0.6, DROPOUT=0.0)
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic
    torch.manual_seed(0)
    heads = build_roi_heads(cfg, SHAPES).eval()
    heads.box_predictor.cls_score.weight.normal_(std=0.1)
    heads.box_predictor.bbox_pred.weight.normal_(std=0.1)
    heads.box_predictor.test_score_thresh = 0.2
    features, proposals = _features(), _scenes()[0]
    predictions = _predict(heads, features, proposals)
    voted = heads(None, features, proposals)[0]
    boxes, scores = (
        f(predictions, proposals) for f in (heads.box_predictor.predict_boxes, heads.box_predictor.predict_probs)
    )
    kept = heads.box_predictor.inference(predictions, proposals)[0]
    moved = 0
    for image in range(2):
        voters = [[], [], []]
        for r in range(len(proposals[image])):
            for label in range(CLASSES):
                if scores[image][r, label] > 0.2:
                    place = 0 if agnostic else label
                    box = boxes[image][r, 4 * place : 4 * place + 4]
                    clipped = torch.minimum(box.clamp(min=0), torch.tensor([SIZE[1], SIZE[0]] * 2))
                    for values, value in zip(voters, (clipped, scores[image][r, label], torch.tensor(label))):
                        values.append(value)
        before, after = kept[image], voted[image]
        expected = _reference_votes(before.pred_boxes.tensor, before.pred_classes, *map(torch.stack, voters), 0.6)
        torch.testing.assert_close(after.pred_boxes.tensor, expected)
        assert torch.equal(after.scores, before.scores)
        moved += int((after.pred_boxes.tensor - before.pred_boxes.tensor).abs().amax(1).gt(0.1).sum())
    assert moved > 5


# ---------------------------------------------------------------------- iterative localisation


def _predict(heads, features, proposals):
    maps = [features[name] for name in heads.box_in_features]
    return heads.box_predictor(heads.box_head(heads.box_pooler(maps, [p.proposal_boxes for p in proposals])))


@torch.no_grad()
def test_one_iteration_equals_plain_inference():
    heads, features, proposals = _random_heads(), _features(), _scenes()[0]
    expected = heads.box_predictor.inference(_predict(heads, features, proposals), proposals)[0]
    for found, plain in zip(heads(None, features, proposals)[0], expected):
        assert len(found) > 5
        assert torch.equal(found.pred_boxes.tensor, plain.pred_boxes.tensor)
        assert torch.equal(found.scores, plain.scores)


@torch.no_grad()
@pytest.mark.parametrize("agnostic", [False, True])
def test_each_iteration_starts_from_the_best_boxes_of_the_one_before(agnostic):
    cfg = _cfg(ITERATIONS=3)
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic
    torch.manual_seed(0)
    heads = build_roi_heads(cfg, SHAPES).eval()
    heads.box_predictor.cls_score.weight.normal_(std=0.1)
    heads.box_predictor.bbox_pred.weight.normal_(std=0.1)
    features, proposals = _features(), _scenes()[0]
    rois, all_boxes, all_scores = proposals, [[], []], [[], []]
    for _ in range(3):
        predictions = _predict(heads, features, rois)
        boxes = heads.box_predictor.predict_boxes(predictions, rois)
        scores = heads.box_predictor.predict_probs(predictions, rois)
        following = []
        for image in range(2):
            all_boxes[image].append(boxes[image])
            all_scores[image].append(scores[image])
            chosen = []
            for box, score in zip(boxes[image], scores[image]):
                label = 0 if agnostic else max(range(CLASSES), key=lambda k: float(score[k]))
                x0, y0, x1, y1 = box[4 * label : 4 * label + 4].tolist()
                chosen.append([min(max(v, 0), side) for v, side in zip((x0, y0, x1, y1), (128, 96, 128, 96))])
            following.append(_proposals(torch.tensor(chosen)))
        rois = following
    expected, _ = fast_rcnn_inference(
        [torch.cat(b) for b in all_boxes], [torch.cat(s) for s in all_scores], [SIZE] * 2, 0.05, 0.5, 100
    )
    for found, pooled in zip(heads(None, features, proposals)[0], expected):
        torch.testing.assert_close(found.pred_boxes.tensor, pooled.pred_boxes.tensor)
        torch.testing.assert_close(found.scores, pooled.scores)


# ---------------------------------------------------------------------- masks of the proposals


def _masked_proposals(seed):
    """Pairs of proposals, one pixel apart, on a grid of 25 pixels; all masks differ."""
    ys, xs = torch.meshgrid(torch.arange(3) * 25.0 + 5, torch.arange(4) * 25.0 + 5, indexing="ij")
    corners = torch.stack([xs.flatten(), ys.flatten()], dim=1).repeat(2, 1)
    corners[12:, 1] += 1
    corners = corners[torch.randperm(24, generator=_generator(seed))]
    boxes = torch.cat([corners, corners + 20], dim=1)
    proposals = _proposals(boxes)
    logits = torch.randn(24, 5, 5, generator=_generator(seed + 1))
    proposals.proposal_masks = WindowMasks(logits, boxes, SIZE)
    return proposals


@torch.no_grad()
@pytest.mark.parametrize("iterations", [1, 3])
def test_detections_have_the_masks_of_their_proposals(iterations):
    found = {}
    for voting in (0.0, 0.5):
        heads = _random_heads(ITERATIONS=iterations, BOX_VOTING=voting)
        heads.box_predictor.test_topk_per_image = 20
        # Every box moves right by 2 pixels and keeps its size.
        heads.box_predictor.bbox_pred.weight.zero_()
        heads.box_predictor.bbox_pred.bias.copy_(torch.tensor([1.0, 0, 0, 0]).repeat(CLASSES))
        proposals = [_masked_proposals(1), _masked_proposals(5)]
        found[voting] = heads(None, _features(), proposals)[0]
    moves = set()
    for proposed, detected, voted in zip(proposals, found[0.0], found[0.5]):
        assert len(detected) == 20
        pasted = proposed.proposal_masks.paste()
        assert len({tuple(m.flatten().tolist()) for m in pasted}) == 24
        masks = detected.pred_masks.to_bitmasks(None, *SIZE).tensor
        for box, mask in zip(detected.pred_boxes.tensor, masks):
            shift = box - proposed.proposal_boxes.tensor
            same = (shift[:, 1].abs() < 0.1) & (shift[:, 0] > 1) & (shift[:, 0] < 7)
            source = same.nonzero().item()
            moves.add(round(float(shift[source, 0])))
            assert torch.equal(mask, pasted[source])
        # Box voting moves boxes, not masks.
        assert not torch.allclose(voted.pred_boxes.tensor, detected.pred_boxes.tensor, atol=0.1)
        assert torch.equal(voted.pred_masks.to_bitmasks(None, *SIZE).tensor, masks)
    assert moves == {2 * (i + 1) for i in range(iterations)}


@torch.no_grad()
def test_predictions_that_are_not_finite_do_not_shift_the_masks():
    heads, proposals = _heads(**OFF).eval(), _masked_proposals(1)[torch.arange(5)]
    heads.box_predictor.test_nms_thresh, heads.box_predictor.test_score_thresh = 1.0, 0.3
    logits = torch.zeros(5, CLASSES + 1)
    logits[:, 1] = torch.tensor([3.0, math.nan, 5.0, 1.0, 4.0])
    heads.box_predictor.forward = lambda features: (logits, torch.zeros(5, 4 * CLASSES))
    (found,) = heads(None, _features(images=1), [proposals])[0]
    masks = found.pred_masks.to_bitmasks(None, *SIZE).tensor
    assert torch.equal(masks, proposals.proposal_masks.paste()[[2, 4, 0, 3]])


@pytest.mark.parametrize("source", ["proposal", "head", "none"])
def test_the_config_selects_the_masks(source):
    cfg = _cfg(BOX_VOTING=0.5, ITERATIONS=2)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.SHARPMASK.DETECTION_MASKS = source
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 4
    torch.manual_seed(0)
    heads = build_roi_heads(cfg, SHAPES)
    proposals, targets = [_masked_proposals(1)], [_targets(_boxes(3))]
    targets[0].gt_masks = BitMasks(torch.zeros(3, *SIZE, dtype=torch.bool))
    features = _features(images=1)
    with EventStorage():
        losses = heads(None, features, proposals, targets)[1]
    assert ("loss_mask" in losses) == (source == "head")
    heads.eval()
    with torch.no_grad():
        (detected,) = heads(None, features, proposals)[0]
    kinds = {"proposal": "ProposalROIMasks", "head": "Tensor", "none": "NoneType"}
    assert type(detected.get_fields().get("pred_masks")).__name__ == kinds[source]
    if source != "head":
        assert heads.forward_with_given_boxes(features, [detected])[0] is detected


# ---------------------------------------------------------------------- RoIs at and outside the image border


EDGES = torch.tensor(
    [
        [0.0, 0.0, 128.0, 96.0],
        [-300.0, -300.0, -200.0, -250.0],
        [500.0, 10.0, 510.0, 20.0],
        [120.0, 90.0, 128.0, 96.0],
        [-20.0, 30.0, 10.0, 60.0],
        [50.0, 50.0, 50.01, 50.01],
        [50.0, 50.0, 50.0, 50.0],
        [127.0, 95.0, 127.5, 96.0],
    ]
)


@pytest.mark.parametrize("pooler", ["ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("counts", [(8, 8), (8, 0), (0, 0)])
def test_rois_outside_the_image_and_without_area_train_and_detect(counts, pooler):
    cfg = _cfg(ITERATIONS=2, BOX_VOTING=0.5)
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = pooler
    torch.manual_seed(0)
    heads, features = build_roi_heads(cfg, SHAPES), _features()
    proposals = [_proposals(EDGES[:n]) for n in counts]
    # The second image has no ground truth, so that without proposals it has no RoIs.
    targets = [_targets(_boxes(2) if counts[0] else _boxes(0)), _targets(_boxes(0))]
    with EventStorage():
        sampled, losses = heads(None, features, proposals, targets)
    assert [len(p) for p in sampled] == [counts[0] + len(targets[0]), counts[1]]
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    assert all(p.grad.isfinite().all() for p in heads.parameters())
    with torch.no_grad():
        found = heads.eval()(None, features, proposals)[0]
    for count, detected in zip(counts, found):
        assert (len(detected) > 0) == (count > 0)
        assert detected.pred_boxes.tensor.isfinite().all()
        assert detected.scores.isfinite().all()


@torch.no_grad()
def test_a_diverged_network_detects_nothing():
    heads = _heads(ITERATIONS=2, BOX_VOTING=0.5).eval()
    heads.box_predictor.bbox_pred.bias.fill_(math.nan)
    assert [len(found) for found in heads(None, _features(), _scenes()[0])[0]] == [0, 0]


# ---------------------------------------------------------------------- training


def test_gradients_reach_every_part():
    heads = _heads(DROPOUT=0.0)
    with torch.no_grad():
        heads.box_predictor.bbox_pred.weight.normal_(std=0.1)
    features = {name: value.requires_grad_() for name, value in _features().items()}
    with EventStorage():
        losses = heads(None, features, *_scenes())[1]
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    for name, value in features.items():
        assert value.grad.abs().sum() > 0, name
    names = {name.rsplit(".", 2)[0] for name, _ in heads.named_parameters()}
    assert {f"box_pooler.poolers.{i}" for i in range(5)} < names
    assert {f"box_head.towers.{i}" for i in range(4)} | {"box_head.regressor_tower", "box_predictor"} < names


def test_dropout_acts_in_training_only_and_keeps_parameter_names():
    heads, plain = _heads(DROPOUT=0.5), _heads(DROPOUT=0.0)
    assert heads.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(heads.state_dict())
    crop = torch.randn(200, 8, 7, 7, generator=_generator(0))
    for tower, without in zip([*heads.box_head.towers, heads.box_head.regressor_tower], plain.box_head.towers):
        assert not torch.allclose(tower(crop), without(crop))
        assert sum(isinstance(module, torch.nn.Dropout) for module in tower.modules()) == 2
        tower.eval()
        torch.testing.assert_close(tower(crop), without(crop))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_agrees_with_float32(device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    heads = _heads(ITERATIONS=2, BOX_VOTING=0.5).to(device)
    features = {name: value.to(device, dtype) for name, value in _features().items()}
    proposals, targets = ([instances.to(device) for instances in part] for part in _scenes())
    with EventStorage(), torch.autocast(device, dtype):
        losses = heads(None, features, proposals, targets)[1]
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in heads.parameters())
    heads.eval()
    with torch.no_grad():
        plain = _predict(heads, {name: value.float() for name, value in features.items()}, proposals)[0]
        with torch.autocast(device, dtype):
            half = _predict(heads, features, proposals)[0]
            found = heads(None, features, proposals)[0]
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), plain, rtol=0.05, atol=0.05)
    assert all(f.scores.dtype == f.pred_boxes.tensor.dtype == torch.float32 for f in found)
    assert all(len(f) > 0 for f in found)


# ---------------------------------------------------------------------- configuration and whole detectors


@pytest.mark.parametrize(
    ("multipath", "message"),
    [
        ({"FOVEAL_FACTORS": [1.0]}, "LEVELS has 4 lists for 1"),
        ({"FOVEAL_FACTORS": [], "LEVELS": []}, "LEVELS"),
        ({"REGRESSOR_LEVELS": ["conv2"]}, "conv2"),
        ({"REGRESSOR_LEVELS": []}, "cannot be pooled"),
        ({"IOU_THRESHOLDS": []}, "ascending order"),
        ({"IOU_THRESHOLDS": [0.6, 0.5]}, "ascending order"),
        ({"IOU_THRESHOLDS": [0.4, 0.5]}, "labelled as background"),
        ({"ITERATIONS": 0}, "ITERATIONS"),
        ({"BOX_VOTING": 1.5}, "BOX_VOTING"),
    ],
)
def test_config_errors_name_the_key(multipath, message):
    with pytest.raises(ValueError, match=message):
        _heads(**multipath)


def test_dropout_needs_fully_connected_layers():
    cfg = _cfg()
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 0, 1
    with pytest.raises(ValueError, match="DROPOUT"):
        build_roi_heads(cfg, SHAPES)


def test_box_heads_without_fully_connected_layers():
    cfg = _cfg(DROPOUT=0.0)
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 0, 1, 4
    heads = build_roi_heads(cfg, SHAPES)
    assert heads.box_predictor.cls_score.in_features == 4 * 4 * 49
    with EventStorage():
        assert sum(heads(None, _features(), *_scenes())[1].values()).isfinite()


def test_a_detector_on_vgg_trains_and_detects():
    cfg = _cfg(DROPOUT=0.5)
    cfg.MODEL.BACKBONE.NAME = "build_vgg_backbone"
    cfg.MODEL.VGG.VARIANT = "A"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    cfg.MODEL.LOAD_PROPOSALS = True
    torch.manual_seed(0)
    model = build_model(cfg)
    inputs = []
    for proposed, target in zip(*_scenes()):
        image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=_generator(0))
        inputs.append({"image": image, "height": 48, "width": 64, "proposals": proposed, "instances": target})
    # Proposals of the second image have no masks.
    first = inputs[0]["proposals"]
    first.proposal_masks = WindowMasks(torch.randn(len(first), 5, 5), first.proposal_boxes.tensor, SIZE)
    with EventStorage():
        losses = model(inputs)
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.roi_heads.parameters())
    assert model.backbone.features[-2].weight.grad.abs().sum() > 0
    found = model.eval()(inputs)
    assert found[0]["instances"].image_size == (48, 64)
    assert len(found[0]["instances"]) > 0
    assert found[0]["instances"].pred_masks.shape[1:] == (48, 64)
    assert not found[1]["instances"].has("pred_masks")
