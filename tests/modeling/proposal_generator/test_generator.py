"""SharpMask in a detector: frozen or trained together with it, with its own trunk or on the features of the detector."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import BitMasks, ImageList, Instances
from detectron2.utils.events import EventStorage
from drawing import draw_example, gradient, to_small_detector
from sharpmask_d2 import model_zoo
from sharpmask_d2.modeling.image_pyramid.levels import Level, grid_windows, pyramid_levels
from sharpmask_d2.modeling.proposal_generator import sharpmask as sharpmask_generator
from sharpmask_d2.windows.targets import mask_targets, sample_windows
from torch import nn

RULE = {"positive_shift": 8.0, "positive_octaves": 0.25, "negative_shift": 24.0, "negative_octaves": 2.5}
PACKAGED = "sharpmask_d2://lite0.pth"
STRIDES = {"f2": 2, "f4": 4, "f8": 8, "f16": 16}
# x0, y0, x1, y1. At scale 1, windows of 64 pixels are canonical for a side of 37 pixels.
OBJECTS = [(0, 10, 36, 44), (50, 40, 86, 80), (90, 8, 122, 44)]


class ToyBackbone(Backbone):
    """Convolutions without overlap and without bias: a feature depends on its own pixels only, and black pixels give features of zero."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 2, stride=2, bias=False) for i in range(4))

    @property
    def size_divisibility(self):
        return 16

    def output_shape(self):
        return {name: ShapeSpec(channels=8, stride=stride) for name, stride in STRIDES.items()}

    def forward(self, x):
        outputs = {}
        for name, conv in zip(STRIDES, self.convs):
            x = outputs[name] = conv(x).relu()
        return outputs


@BACKBONE_REGISTRY.register()
def build_toy_trunk(cfg, input_shape):
    return ToyBackbone()


@pytest.fixture
def cfg(tiny_cfg):
    """The config of a trained generator with windows of 64 pixels."""
    cfg = tiny_cfg.clone()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMask"
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.GENERATOR.FROZEN = False
    sharpmask.WINDOW_SIZE = 64
    sharpmask.LABELS.POSITIVE_SHIFT = RULE["positive_shift"]
    sharpmask.LABELS.NEGATIVE_SHIFT = RULE["negative_shift"]
    torch.manual_seed(0)
    return cfg


@pytest.fixture
def toy_cfg(cfg):
    """The config of a trained generator on the features of the toy backbone, at one scale and with black borders."""
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.TRUNK.NAME = "build_toy_trunk"
    sharpmask.IN_FEATURE = "f16"
    sharpmask.REFINEMENT.SKIP_FEATURES = ["f16", "f8", "f4", "f2"]
    sharpmask.TEST.SCALES = [0.0]
    sharpmask.PIXEL_MEAN = cfg.MODEL.PIXEL_MEAN = [127.5] * 3
    sharpmask.PIXEL_STD = cfg.MODEL.PIXEL_STD = [50.0] * 3
    return cfg


@pytest.fixture(autouse=True)
def storage():
    with EventStorage() as storage:
        yield storage


def build(cfg, input_shape=None):
    return build_proposal_generator(cfg, input_shape or {})


def with_weights(module):
    """Loads the weights of a module into itself, so that the generator counts as having weights."""
    module.load_state_dict(module.state_dict())
    return module


def draw(objects=OBJECTS, size=(96, 128), kind="polygon"):
    return draw_example(objects, size, kind=kind)


def pixels_of(generator, image):
    """The image before the normalisation of the detector, in the channel order of the network."""
    pixels = image * generator.pixel_std + generator.pixel_mean
    return pixels.flip(0) if generator.flip_channels else pixels


def images_of(*images):
    return ImageList.from_tensors(list(images))


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    assert found.image_size == expected.image_size
    torch.testing.assert_close(found.objectness_logits, expected.objectness_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.proposal_boxes.tensor, expected.proposal_boxes.tensor, atol=1.0, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- contract


def test_proposals_are_sorted_nonempty_and_inside_the_image(cfg):
    image, _ = draw()
    generator = build(cfg).eval()
    (proposals,), losses = generator(images_of(image), {})
    assert losses == {}
    assert 0 < len(proposals) <= cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS
    scores, boxes = proposals.objectness_logits, proposals.proposal_boxes.tensor
    assert scores.isfinite().all()
    assert (scores.diff() <= 0).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([128, 96, 128, 96])).all()
    assert len(proposals.proposal_masks) == len(proposals)
    assert not proposals.proposal_masks.logits.requires_grad
    # The score and the window of a proposal belong to one cell.
    pyramid = generator.pyramid
    levels = pyramid.levels((96, 128))
    with torch.no_grad():
        grids = [pyramid.level_grid(pixels_of(generator, image)[None], level).scores for level in levels]
    windows = grid_windows(levels, [tuple(grid.shape[1:]) for grid in grids], 64, 16, "cpu")
    cells = (windows[None] == proposals.proposal_masks.windows[:, None]).all(2).long().argmax(1)
    torch.testing.assert_close(torch.cat([grid.flatten() for grid in grids])[cells], scores)


def test_proposals_of_a_batch_equal_those_of_single_images(cfg):
    generator = build(cfg).eval()
    image, _ = draw()
    small = image[:, 5:75, 10:60]
    together, _ = generator(images_of(image, small), {})
    for x, found in zip((image, small), together):
        (alone,), _ = generator(images_of(x), {})
        assert_same(found, alone)


@pytest.mark.parametrize("frozen", [True, False])
def test_proposals_have_no_masks_in_training(cfg, frozen):
    cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = frozen
    image, gt = draw()
    (proposals,), _ = with_weights(build(cfg)).train()(images_of(image), {}, [gt])
    assert set(proposals.get_fields()) == {"proposal_boxes", "objectness_logits"}
    assert len(proposals)
    assert not proposals.objectness_logits.requires_grad


@pytest.mark.parametrize("reference", [0, 128])
def test_windows_scale_with_the_image_if_there_is_a_reference_side(cfg, reference):
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.GENERATOR.REFERENCE_SIDE = reference
    sharpmask.TEST.NUM_PROPOSALS = 10000
    generator = build(cfg).eval()
    # Every mask is full, so that no window is left out.
    nn.init.constant_(generator.pyramid.network.mask_branch.to_mask.bias, 1e6)
    image, _ = draw()
    sizes = [image, image.repeat_interleave(2, 1).repeat_interleave(2, 2)]
    once, twice = (p.proposal_masks.windows.unique(dim=0) for p in generator(images_of(*sizes), {})[0])
    if reference:
        torch.testing.assert_close(twice, 2 * once)
    else:
        assert len(twice) > 2 * len(once)
        assert torch.equal(twice[0, 2:] - twice[0, :2], once[0, 2:] - once[0, :2])


# ------------------------------------------------------------------------------------------------------------------ frozen


def test_a_frozen_generator_has_no_losses_and_stays_in_evaluation_mode(cfg):
    cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = True
    generator = with_weights(build(cfg))
    assert not generator.pyramid.training
    generator.train()
    assert not any(module.training for module in generator.pyramid.modules())
    assert not any(p.requires_grad for p in generator.parameters())
    image, gt = draw()
    assert generator(images_of(image), {}, [gt])[1] == {}


def test_packaged_weights_give_the_proposals_of_the_packaged_model(tmp_path):
    cfg = model_zoo.get_config("sharpmask_lite0")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SHARPMASK.TEST.SCALES = [0.0]
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
    alone = build_model(cfg).eval()
    DetectionCheckpointer(alone).load(PACKAGED)
    image = (100 + 40 * draw()[0]).clamp(0, 255)
    (expected,) = alone([{"image": image}])
    normalised = (image - torch.tensor([[[100.0]], [[110.0]], [[120.0]]])) / torch.tensor(
        [[[50.0]], [[60.0]], [[70.0]]]
    )
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMask"
    path = tmp_path / "alone.pth"
    torch.save({"model": alone.state_dict()}, path)
    for weights in (PACKAGED, str(path)):
        cfg.MODEL.SHARPMASK.GENERATOR.WEIGHTS = weights
        generator = build(cfg)
        (proposals,), _ = generator(images_of(normalised), {})
        assert_same(proposals, expected["proposals"])


def test_checkpoints_of_a_detector_do_not_contain_a_frozen_generator_with_its_own_weights(cfg, tmp_path):
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "sharpmask.pth")
    to_small_detector(cfg, roi_heads="StandardROIHeads", num_classes=2)
    saved = set(build_model(cfg).state_dict())
    cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = True
    cfg.MODEL.SHARPMASK.GENERATOR.WEIGHTS = str(tmp_path / "sharpmask.pth")
    detector = build_model(cfg)
    assert saved - set(detector.state_dict()) == {name for name in saved if name.startswith("proposal_generator.")}
    assert not detector.load_state_dict(detector.state_dict(), strict=False).missing_keys
    # Detectron2 matches ImageNet weights by the ends of names, which are equal for both trunks.
    weights = {name: value.numpy() for name, value in detector.backbone.state_dict().items()}
    path = tmp_path / "R-18.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "test", "matching_heuristics": True}))
    before = {name: value.clone() for name, value in detector.proposal_generator.named_parameters()}
    nn.init.zeros_(detector.backbone.stem.conv1.weight)
    DetectionCheckpointer(detector).load(str(path))
    assert detector.backbone.stem.conv1.weight.any()
    assert all(torch.equal(before[name], value) for name, value in detector.proposal_generator.named_parameters())


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (PACKAGED, ValueError, r"lite0\.pth does not fit this model: .*pyramid\.network\."),
        ("sharpmask_d2://lite1.pth", FileNotFoundError, r"'lite1\.pth', only bifpn_lite0\.pth, lite0\.pth"),
        ("nowhere.pth", FileNotFoundError, r"nowhere\.pth"),
    ],
)
def test_errors_name_weights_that_do_not_fit_or_do_not_exist(cfg, weights, error, message):
    cfg.MODEL.SHARPMASK.GENERATOR.WEIGHTS = weights
    with pytest.raises(error, match=message):
        build(cfg)


# ---------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("refinement", ["sharpmask", "none"])
def test_gradients_reach_the_trained_layers(cfg, refinement):
    cfg.MODEL.SHARPMASK.REFINEMENT.NAME = refinement
    cfg.MODEL.SHARPMASK.TRUNK.FREEZE_AT = 2
    generator = build(cfg).train()
    image, gt = draw()
    _, losses = generator(images_of(image), {}, [gt])
    assert set(losses) == {"loss_sharpmask_mask", "loss_sharpmask_score"}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    network = generator.pyramid.network
    losses["loss_sharpmask_mask"].backward(retain_graph=True)
    assert gradient(network.mask_branch) > 0
    assert gradient(network.trunk.res4) > 0
    assert gradient(network.head.embed) > 0
    assert gradient(network.head.score) == 0
    losses["loss_sharpmask_score"].backward()
    assert gradient(network.head.score) > 0
    for frozen in (network.trunk.stem, network.trunk.res2):
        assert gradient(frozen) is None
        assert not any(p.requires_grad for p in frozen.parameters())


def test_only_the_refinement_is_trained_in_the_second_stage(cfg):
    cfg.MODEL.SHARPMASK.FREEZE_FEEDFORWARD = True
    generator = build(cfg).train()
    calls = []
    generator.pyramid.network.trunk.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    image, gt = draw()
    _, losses = generator(images_of(image), {}, [gt])
    assert set(losses) == {"loss_sharpmask_mask"}
    # The level without positive windows runs without gradients.
    assert sorted(calls) == [False, True]
    losses["loss_sharpmask_mask"].backward()
    network = generator.pyramid.network
    assert gradient(network.mask_branch) > 0
    assert gradient(network.trunk) is None
    assert gradient(network.head) is None


def test_losses_are_multiplied_by_the_configured_weights(cfg):
    image, gt = draw()
    sums = []
    for mask_weight, score_weight in ((1.0, 1.0), (5.0, 3.0)):
        cfg.MODEL.SHARPMASK.MASK_LOSS_WEIGHT, cfg.MODEL.SHARPMASK.SCORE_LOSS_WEIGHT = mask_weight, score_weight
        torch.manual_seed(0)
        sums.append(build(cfg).train()(images_of(image), {}, [gt])[1])
    for name, factor in (("loss_sharpmask_mask", 5), ("loss_sharpmask_score", 3)):
        torch.testing.assert_close(sums[1][name], factor * sums[0][name])


@pytest.mark.parametrize("kind", ["polygon", "bitmap"])
def test_losses_cover_the_labelled_windows(cfg, monkeypatch, kind):
    generator = build(cfg).train()
    generator.windows_per_image, generator.positive_fraction = 10000, 0.5
    pyramid = generator.pyramid
    pyramid.network.head.eval()
    found = {}
    for name in ("mask_loss", "score_loss"):
        monkeypatch.setattr(
            sharpmask_generator, name, lambda *args, name=name: found.update({name: args}) or args[0].sum()
        )
    image, gt = draw(kind=kind)
    generator(images_of(image), {}, [gt])
    scores, labels, masks, targets = [], [], [], []
    for level in pyramid.levels((96, 128)):
        with torch.no_grad():
            grid = pyramid.level_grid(pixels_of(generator, image)[None], level)
            rows, columns = grid.scores.shape[1:]
            windows = grid_windows([level], [(rows, columns)], 64, 16, "cpu")
            slow = [_slow_label(window.tolist(), OBJECTS) for window in windows]
            for wanted in (1, 0):
                for n in [n for n, (label, _) in enumerate(slow) if label == wanted]:
                    y, x = n // columns, n % columns
                    scores.append(grid.scores[0, y, x])
                    labels.append(float(wanted))
                    if wanted:
                        cell = torch.tensor([0]), torch.tensor([y]), torch.tensor([x])
                        masks.append(pyramid.network.masks(grid, *cell, windows_per_batch=1))
                        targets.append(gt.gt_masks[slow[n][1]].crop_and_resize(windows[n : n + 1], 64))
    assert len(masks) >= 3
    torch.testing.assert_close(found["score_loss"][0], torch.stack(scores), atol=1e-4, rtol=1e-4)
    assert found["score_loss"][1].tolist() == labels
    torch.testing.assert_close(found["mask_loss"][0], torch.cat(masks), atol=1e-3, rtol=1e-3)
    # Beyond the image, Detectron2 repeats the outermost pixels of bitmaps: the masks differ by one column of cells of one window.
    assert (found["mask_loss"][1] != torch.cat(targets)).float().mean() < 0.01


@pytest.mark.parametrize("windows", [0, 1, 10_000])
def test_the_trunk_runs_once_per_level_with_gradients_only_on_levels_with_windows(cfg, windows):
    cfg.MODEL.SHARPMASK.GENERATOR.WINDOWS_PER_IMAGE = windows
    cfg.MODEL.SHARPMASK.TEST.SCALES = [-1.0, 0.0, 0.5]
    generator = build(cfg).train()
    calls = []
    generator.pyramid.network.trunk.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    image, gt = draw()
    _, losses = generator(images_of(image), {}, [gt])
    assert len(calls) == 3
    # Each level has a negative window.
    assert sum(calls) == {0: 0, 1: 1, 10_000: 3}[windows]
    sum(losses.values()).backward()


def test_proposals_in_training_are_those_of_evaluation(cfg):
    generator = build(cfg)
    image, gt = draw()
    # With a single window, one level runs with gradients and the other without.
    generator.windows_per_image = 1
    (training,), _ = generator.train()(images_of(image), {}, [gt])
    assert all(module.training for module in generator.pyramid.network.head.modules())
    (evaluation,), _ = generator.eval()(images_of(image), {})
    assert_same(training, evaluation)


@pytest.mark.parametrize("trunk", ["build_resnet_trunk", "build_toy_trunk"])
@pytest.mark.parametrize("size", [(65, 97), (96, 128), (33, 40)])
def test_grids_have_the_size_that_is_computed_without_running_the_network(cfg, trunk, size):
    cfg.MODEL.SHARPMASK.TRUNK.NAME = trunk
    cfg.MODEL.SHARPMASK.GRID_STRIDE = 8
    cfg.MODEL.SHARPMASK.TEST.SCALES = [-0.7]
    if trunk == "build_toy_trunk":
        cfg.MODEL.SHARPMASK.IN_FEATURE = "f16"
        cfg.MODEL.SHARPMASK.REFINEMENT.SKIP_FEATURES = ["f16", "f8", "f4", "f2"]
    pyramid = build(cfg).pyramid
    network = pyramid.network
    levels = pyramid.levels(size)
    assert len(levels) == 4
    for level in levels:
        with torch.no_grad():
            grid = pyramid.level_grid(torch.zeros(1, 3, *size), level)
        expected = sharpmask_generator.grid_size(level, 64, 16, network.size_divisibility)
        assert tuple(grid.scores.shape[1:]) == expected


@pytest.mark.parametrize("objects", [[], [(0, 0, 3, 3)]])
def test_images_without_training_targets_have_negative_windows_only(cfg, objects, storage):
    image, gt = draw(objects)
    assert gt.has("gt_masks") == bool(objects)
    generator = build(cfg).train()
    (proposals,), losses = generator(images_of(image), {}, [gt])
    assert len(proposals)
    assert losses["loss_sharpmask_mask"] == 0
    assert losses["loss_sharpmask_score"] > 0
    sum(losses.values()).backward()
    assert storage.latest()["sharpmask/num_positives"][0] == 0
    assert gradient(generator.pyramid.network.head) > 0
    assert gradient(generator.pyramid.network.mask_branch) == 0


def test_losses_without_any_window_are_zero_and_have_gradients_of_all_parameters(cfg):
    cfg.MODEL.SHARPMASK.GENERATOR.WINDOWS_PER_IMAGE = 0
    generator = build(cfg).train()
    image, gt = draw()
    _, losses = generator(images_of(image), {}, [gt])
    assert [float(loss.detach()) for loss in losses.values()] == [0, 0]
    assert all(loss.requires_grad for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in generator.parameters() if p.requires_grad)


def test_training_without_masks_is_an_error_that_names_the_keys(cfg):
    generator = build(cfg).train()
    image, gt = draw(kind="none")
    with pytest.raises(ValueError, match=r"MODEL\.MASK_ON.*INPUT\.MASK_FORMAT"):
        generator(images_of(image), {}, [gt])
    with pytest.raises(ValueError, match="ground truth"):
        generator(images_of(image), {})


def test_gradients_reach_all_weights_under_autocast(cfg):
    # The first image has one negative window. Its masks are computed without gradients, before those of the second image with gradients.
    cfg.MODEL.SHARPMASK.GENERATOR.WINDOWS_PER_IMAGE = 1
    cfg.MODEL.SHARPMASK.GENERATOR.POSITIVE_FRACTION = 1.0
    generator = build(cfg).train()
    (empty, nothing), (image, gt) = draw([]), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        proposals, losses = generator(images_of(empty, image), {}, [nothing, gt])
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.objectness_logits.dtype == torch.float32 for p in proposals)
    sum(losses.values()).backward()
    network = generator.pyramid.network
    for name, parameter in network.named_parameters():
        if name.endswith("weight") and "score" not in name:
            assert parameter.grad.abs().sum() > 0, name


def test_training_on_an_image_lowers_the_mask_loss(toy_cfg):
    toy_cfg.MODEL.SHARPMASK.REFINEMENT.SCHEDULE = "a"
    generator = build(toy_cfg).train()
    image, gt = draw()
    images = images_of(image)
    optimizer = torch.optim.Adam((p for p in generator.parameters() if p.requires_grad), lr=3e-3)
    history = []
    for _ in range(30):
        _, losses = generator(images, {}, [gt])
        history.append(losses["loss_sharpmask_mask"].item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert np.mean(history[-3:]) < history[0] / 4


# ------------------------------------------------------------------------------------------- labels, samples and targets


def _slow_label(window, boxes):
    """The label 1, 0 or -1 of one window, and its object, by the rule of the paper. The canonical size is 37 of 64 pixels."""
    side = window[2] - window[0]
    best, negative = (math.inf, -1), True
    for g, (x0, y0, x1, y1) in enumerate(boxes):
        canonical = max(x1 - x0, y1 - y0) * 64 / 37
        dx = abs(window[0] + window[2] - x0 - x1) / 2 * 64 / side
        dy = abs(window[1] + window[3] - y0 - y1) / 2 * 64 / side
        shift, octaves = max(dx, dy), abs(math.log2(side / canonical))
        if shift <= RULE["positive_shift"] and octaves <= RULE["positive_octaves"]:
            best = min(best, (max(shift / RULE["positive_shift"], octaves / RULE["positive_octaves"]), g))
        negative &= shift >= RULE["negative_shift"] or octaves >= RULE["negative_octaves"]
    if best[1] >= 0:
        return 1, best[1]
    return (0 if negative else -1), -1


def test_labels_of_windows_equal_those_of_a_loop():
    levels = pyramid_levels((96, 128), [-1.0, 0.0], [(0, 0), (8, 8)])
    sizes = [(4, 5), (3, 6), (7, 9), (7, 9)]
    windows = grid_windows(levels, sizes, 64, 16, "cpu")
    n = 0
    for level, (rows, columns) in zip(levels, sizes):
        scale = level.image_size[0] / level.size[0]
        for y in range(rows):
            for x in range(columns):
                cx, cy = (16 * x + level.shift[1]) * scale, (16 * y + level.shift[0]) * scale
                half = 32 * scale
                torch.testing.assert_close(windows[n], torch.tensor([cx - half, cy - half, cx + half, cy + half]))
                n += 1
    assert n == len(windows)
    boxes = torch.tensor(OBJECTS, dtype=torch.float32)
    positives, negatives, objects = sample_windows(
        windows, boxes, 64, label_rule=RULE, num_windows=10000, positive_fraction=1.0
    )
    slow = [_slow_label(window.tolist(), OBJECTS) for window in windows]
    assert positives.tolist() == [i for i, (label, _) in enumerate(slow) if label == 1]
    assert negatives.tolist() == [i for i, (label, _) in enumerate(slow) if label == 0]
    assert objects.tolist() == [g for label, g in slow if label == 1]
    assert set(objects.tolist()) == {0, 1, 2}


def test_numbers_of_sampled_windows_respect_the_limits():
    windows = grid_windows([Level((96, 128), (96, 128))], [(7, 9)], 64, 16, "cpu")
    boxes = torch.tensor(OBJECTS, dtype=torch.float32)
    chosen = set()
    for number, share in ((10, 0.2), (10, 0.5), (4, 1.0), (1, 0.5), (0, 0.5)):
        torch.manual_seed(number)
        positives, negatives, objects = sample_windows(
            windows, boxes, 64, label_rule=RULE, num_windows=number, positive_fraction=share
        )
        assert len(positives) == len(objects) <= number * share
        assert len(positives) + len(negatives) == number
        assert len({*positives.tolist(), *negatives.tolist()}) == number
        assert (positives.diff() > 0).all()
        assert (negatives.diff() > 0).all()
        chosen.add(tuple(negatives.tolist()))
    assert len(positives) == 0
    again = [
        sample_windows(windows, boxes, 64, label_rule=RULE, num_windows=6, positive_fraction=0.5)[1] for _ in range(5)
    ]
    assert any(not torch.equal(again[0], other) for other in again[1:])


@pytest.mark.parametrize("kind", ["polygon", "bitmap"])
def test_target_masks_are_the_objects_in_the_windows(kind):
    _, gt = draw(kind=kind)
    windows = torch.tensor(
        [
            [50.0, 40.0, 86.0, 80.0],  # the box of the second object
            [-32.5, -7.0, 31.5, 57.0],  # half outside the image, on the first object, which touches the border
            [80.0, -10.0, 144.0, 54.0],
            [36.0, 28.0, 100.0, 92.0],
            [-60.0, -40.0, 140.0, 160.0],  # several pixels per cell
        ]
    )
    objects = torch.tensor([1, 0, 2, 1, 0])
    size = 32
    targets = mask_targets(gt.gt_masks, objects, windows, size)
    assert targets.dtype == torch.bool
    assert targets.shape == (5, size, size)
    for target, window, g in zip(targets, windows.tolist(), objects.tolist()):
        box = OBJECTS[g]
        cell = (window[2] - window[0]) / size, (window[3] - window[1]) / size
        for i in range(size):
            for j in range(size):
                x, y = window[0] + (j + 0.5) * cell[0], window[1] + (i + 0.5) * cell[1]
                # Distance of the centre of the cell from the border of the rectangle, in cells; positive inside.
                depth = min(
                    (x - box[0]) / cell[0], (box[2] - x) / cell[0], (y - box[1]) / cell[1], (box[3] - y) / cell[1]
                )
                # Cells at the border may have either target, because bitmaps and the polygons of pycocotools consist of whole pixels.
                if abs(depth) > 0.6:
                    assert bool(target[i, j]) == (depth > 0), (window, i, j)


def test_target_masks_of_bitmaps_are_empty_outside_the_image():
    masks = BitMasks(torch.ones(1, 20, 20, dtype=torch.bool))
    # The cells are a tenth of a pixel wide and lie outside the image, some of them at its border.
    target = mask_targets(masks, torch.tensor([0]), torch.tensor([[-2.0, 5.0, 0.0, 7.0]]), 20)
    assert not target.any()
    inside = mask_targets(masks, torch.tensor([0]), torch.tensor([[0.0, 5.0, 2.0, 7.0]]), 20)
    assert inside.all()


# ------------------------------------------------------------------------------------------------------- shared backbone


def _share(cfg):
    """Builds a generator on the features of a detector's backbone."""
    cfg.MODEL.SHARPMASK.GENERATOR.SHARED_BACKBONE = True
    return build(cfg, ToyBackbone().output_shape())


def test_proposals_of_shared_features_equal_those_of_a_trunk(toy_cfg):
    toy_cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 1000
    own = build(toy_cfg).eval()
    shared = _share(toy_cfg).eval()
    backbone = own.pyramid.network.trunk
    shared.load_state_dict({k: v for k, v in own.state_dict().items() if ".trunk." not in k})
    image, _ = draw()
    # Proposals must not depend on the other image or on the padding of the batch.
    for sizes in ([image, image[:, :60, :85]], [image[:, :60, :85], image]):
        images = ImageList.from_tensors(sizes, 16)
        for found, expected in zip(shared(images, backbone(images.tensor))[0], own(images, {})[0]):
            assert_same(found, expected)
            torch.testing.assert_close(found.proposal_masks.windows, expected.proposal_masks.windows)
            assert (found.proposal_masks.areas() - expected.proposal_masks.areas()).abs().max() <= 2


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_the_backbone_unless_the_generator_is_frozen(toy_cfg, frozen):
    toy_cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = frozen
    generator, backbone = with_weights(_share(toy_cfg)).train(), ToyBackbone()
    assert not list(generator.pyramid.network.trunk.parameters())
    image, gt = draw()
    images = images_of(image)
    _, losses = generator(images, backbone(images.tensor), [gt])
    if frozen:
        assert losses == {}
        return
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in backbone.parameters())


def test_no_gradients_reach_the_backbone_in_the_second_stage(toy_cfg):
    toy_cfg.MODEL.SHARPMASK.FREEZE_FEEDFORWARD = True
    generator, backbone = _share(toy_cfg).train(), ToyBackbone()
    image, gt = draw()
    images = images_of(image)
    _, losses = generator(images, backbone(images.tensor), [gt])
    sum(losses.values()).backward()
    assert gradient(generator.pyramid.network.mask_branch) > 0
    assert gradient(backbone) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("IN_FEATURE", "f32", r"IN_FEATURE: .*\['f32'\].*'f16': 16"),
        ("REFINEMENT.SKIP_FEATURES", ["f16", "p3"], r"SKIP_FEATURES: .*\['p3'\].*'f8': 8"),
        ("REFINEMENT.SKIP_FEATURES", ["f16", "f4"], "SKIP_FEATURES: f4 has stride 4"),
        ("IN_FEATURE", "f8", r"SKIP_FEATURES: \['f16'\] are coarser"),
        ("WINDOW_SIZE", 80, "WINDOW_SIZE is 80: .* 32"),
        ("TEST.SCALES", [-1.0, 0.0], r"TEST.SCALES is \[-1.0, 0.0\]: .* \[0.0\]"),
        ("GRID_STRIDE", 8, "GRID_STRIDE is 8: .*f16 of stride 16"),
        ("GENERATOR.REFERENCE_SIDE", 640, "REFERENCE_SIDE is 640: .* 0"),
    ],
)
def test_errors_name_the_key_that_does_not_fit_a_shared_backbone(toy_cfg, key, value, message):
    toy_cfg.merge_from_list([f"MODEL.SHARPMASK.{key}", value])
    with pytest.raises(ValueError, match=message):
        _share(toy_cfg)


# -------------------------------------------------------------------------------------------------------------- detectors


def _detector(cfg, *, fpn=False):
    """Builds a GeneralizedRCNN of Detectron2 with StandardROIHeads."""
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone" if fpn else "build_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    if fpn:
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4"] if fpn else ["res4"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 4
    return build_model(cfg)


def _share_fpn(cfg):
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.GENERATOR.SHARED_BACKBONE = True
    sharpmask.IN_FEATURE = "p4"
    sharpmask.REFINEMENT.SKIP_FEATURES = ["p4", "p3", "p2"]
    sharpmask.TEST.SCALES = [0.0]


@pytest.mark.parametrize("setup", ["frozen", "trained", "shared"])
def test_a_detector_of_detectron2_trains_and_detects(cfg, setup):
    cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = setup == "frozen"
    if setup == "shared":
        _share_fpn(cfg)
    model = with_weights(_detector(cfg, fpn=setup == "shared")).train()
    (image, gt), (other, nothing) = draw(), draw([], (80, 100))
    inputs = [{"image": 128 + 40 * x, "instances": y} for x, y in ((image, gt), (other, nothing))]
    losses = model(inputs)
    assert any(name.startswith("loss_sharpmask") for name in losses) == (setup != "frozen")
    assert {"loss_cls", "loss_box_reg", "loss_mask"} <= set(losses)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    own = [p.grad for p in model.proposal_generator.parameters()]
    assert all(g is None for g in own) == (setup == "frozen")
    with torch.no_grad():
        outputs = model.eval()([{"image": x["image"]} for x in inputs])
    assert all(isinstance(output["instances"], Instances) for output in outputs)


@pytest.mark.parametrize("name", ["SharpMask", "SharpMaskFPN"])
def test_a_detector_is_not_trained_on_random_proposals(cfg, tmp_path, name):
    """A checkpoint of Mask R-CNN does not contain the parameters of the generator, so that the generator has no weights."""
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = name
    cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = True
    cfg.MODEL.SHARPMASK.FPN.SCORE_CHANNELS = 8
    cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    model = _detector(cfg, fpn=True)
    state = model.state_dict()
    stock = {key: value for key, value in state.items() if not key.startswith("proposal_generator.")}
    torch.save({"model": stock}, tmp_path / "stock.pth")
    torch.save({"model": state}, tmp_path / "whole.pth")
    image, gt = draw()
    inputs = [{"image": 128 + 40 * image, "instances": gt}]
    for load in (lambda: None, lambda: DetectionCheckpointer(model).load(str(tmp_path / "stock.pth"))):
        load()
        with pytest.raises(ValueError, match=r"no weights .* were loaded.*MODEL\.WEIGHTS.*FROZEN False"):
            model.train()(inputs)
        with torch.no_grad():
            assert len(model.eval()(inputs)) == 1
    DetectionCheckpointer(model).load(str(tmp_path / "whole.pth"))
    assert "loss_cls" in model.train()(inputs)
    assert "loss_cls" in copy.deepcopy(model)(inputs)


def test_a_generator_with_its_own_checkpoint_has_weights(cfg, tmp_path):
    alone = cfg.clone()
    alone.MODEL.META_ARCHITECTURE = "SharpMaskProposalNetwork"
    torch.save({"model": build_model(alone).state_dict()}, tmp_path / "sharpmask.pth")
    cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = True
    cfg.MODEL.SHARPMASK.GENERATOR.WEIGHTS = str(tmp_path / "sharpmask.pth")
    image, gt = draw()
    assert build(cfg).train()(images_of(image), {}, [gt])[1] == {}
    cfg.MODEL.SHARPMASK.GENERATOR.WEIGHTS = ""
    with pytest.raises(ValueError, match=r"name its checkpoint in MODEL\.SHARPMASK\.GENERATOR\.WEIGHTS.*FROZEN False"):
        build(cfg).train()(images_of(image), {}, [gt])


@pytest.mark.parametrize("key", ["POSITIVE_SHIFT", "POSITIVE_OCTAVES"])
def test_limits_that_no_cell_meets_are_an_error(cfg, key):
    cfg.MODEL.SHARPMASK.LABELS[key] = 0
    with pytest.raises(ValueError, match=rf"LABELS\.{key} is 0: it must be above 0"):
        build(cfg)


@pytest.mark.parametrize("objects", [OBJECTS, []])
def test_a_detector_handles_images_without_proposals(cfg, objects):
    model = _detector(cfg)
    # Every mask is empty.
    nn.init.constant_(model.proposal_generator.pyramid.network.mask_branch.to_mask.bias, -1e6)
    image, gt = draw(objects)
    inputs = [{"image": 128 + 40 * image, "instances": gt}]
    losses = model.train()(inputs)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        (proposals,), _ = model.eval().proposal_generator(images, {})
        assert len(proposals) == len(proposals.proposal_masks) == 0
        assert proposals.proposal_boxes.tensor.shape == (0, 4)
        assert len(model(inputs)[0]["instances"]) == 0
