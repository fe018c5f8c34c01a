"""The decoder of masks of any windows: its properties, and training with windows that are drawn around objects."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from drawing import draw_example
from sharpmask_d2.modeling.feature_pyramid.decoder import SampledDecoder, jittered_windows
from sharpmask_d2.modeling.feature_pyramid.feature_table import FeatureTable
from sharpmask_d2.modeling.feature_pyramid.labels import enlarged
from sharpmask_d2.modeling.losses import dice_loss, quality_focal_loss
from sharpmask_d2.modeling.segment_generator import Windows
from sharpmask_d2.windows.geometry import pyramid_sizes, square_windows

STRIDES = [4, 8, 16, 32]


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return SampledDecoder(in_channels=6, embed_dim=16, channels=8).eval()


def pyramid(size, seed=0):
    """Returns a map of 6 channels for every stride, and the extents of the image."""
    draws = torch.Generator().manual_seed(seed)
    sizes = pyramid_sizes(size, STRIDES)
    return [torch.randn(1, 6, *s, generator=draws) for s in sizes], torch.tensor([sizes])


@torch.no_grad()
def decode(decoder, features, extents, windows):
    tables = decoder.tables(features, extents, STRIDES)
    return decoder.masks(
        tables, torch.zeros(len(windows), dtype=torch.long), torch.tensor(windows, dtype=torch.float32)
    )


def test_a_mask_moves_with_the_image(decoder):
    features, extents = pyramid((256, 256))
    # The shift is one cell of the coarsest level, which is a whole number of cells of every level.
    moved = [x.roll((32 // s, 32 // s), dims=(2, 3)) for x, s in zip(features, STRIDES)]
    window = [96.3, 80.9, 150.3, 134.9]
    there = decode(decoder, features, extents, [window])
    here = decode(decoder, moved, extents, [[v + 32 for v in window]])
    torch.testing.assert_close(there, here, atol=1e-5, rtol=0)
    assert there.std() > 1e-3


def test_masks_of_windows_do_not_depend_on_their_neighbours(decoder):
    features, extents = pyramid((128, 160))
    windows = [[10.0, 20, 60, 70], [-40, -40, 200, 200], [3, 4, 15, 16], [500, 500, 540, 540]]
    together = decode(decoder, features, extents, windows)
    assert together.shape == (4, 56, 56)
    assert together.isfinite().all()
    for window, mask in zip(windows, together):
        torch.testing.assert_close(decode(decoder, features, extents, [window])[0], mask, atol=1e-5, rtol=0)


def test_the_mask_of_a_window_outside_the_image_does_not_depend_on_the_image(decoder):
    outside = [[1000.0, 1000, 1100, 1100]]
    first, second = (decode(decoder, *pyramid((128, 128), seed), outside) for seed in (0, 1))
    assert torch.equal(first, second)


def test_smaller_windows_are_decoded_from_finer_levels(decoder):
    features, extents = pyramid((128, 128))
    changed = [features[0] + 1, *features[1:]]
    differs = [
        not torch.equal(decode(decoder, features, extents, [w]), decode(decoder, changed, extents, [w]))
        for w in ([40.0, 40, 64, 64], [-300.0, -300, 420, 420])
    ]
    assert differs == [True, False]


def test_training_returns_the_masks_of_every_step(decoder):
    features, extents = pyramid((64, 64))
    tables = decoder.tables(features, extents, STRIDES)
    masks = decoder(tables, torch.zeros(2, dtype=torch.long), torch.tensor([[0.0, 0, 40, 40]] * 2))
    assert [tuple(mask.shape) for mask in masks] == [*[(2, 14, 14)] * 3, (2, 28, 28), (2, 56, 56)]


def test_without_windows_there_are_no_masks(decoder):
    features, extents = pyramid((64, 64))
    tables = decoder.tables(features, extents, STRIDES)
    assert decoder(tables, torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))[-1].shape == (0, 56, 56)


def test_square_windows_are_proportional_to_the_larger_side():
    boxes = torch.tensor([[10.0, 20, 30, 28], [0, 0, 4, 16]])
    expected = torch.tensor([[20 - 20, 24 - 20, 20 + 20, 24 + 20], [2 - 16, 8 - 16, 2 + 16, 8 + 16]]).float()
    torch.testing.assert_close(square_windows(boxes, 0.5), expected)


def test_jittered_windows_stay_within_the_limits_and_every_object_has_equally_many():
    torch.manual_seed(0)
    boxes = torch.tensor([[10.0, 20, 50, 40], [30.0, 5, 42, 60], [0.0, 0, 8, 8]])
    windows, objects = jittered_windows(boxes, count=300, share=0.6, shift=0.1, octaves=0.5)
    assert torch.bincount(objects).tolist() == [100, 100, 100]
    canonical = square_windows(boxes, 0.6)[objects]
    sides, expected = windows[:, 2] - windows[:, 0], canonical[:, 2] - canonical[:, 0]
    torch.testing.assert_close(sides, windows[:, 3] - windows[:, 1])
    octaves = (sides / expected).log2()
    shifts = ((windows[:, :2] + windows[:, 2:]) - (canonical[:, :2] + canonical[:, 2:])) / 2 / sides[:, None]
    for jitter, limit in ((octaves, 0.5), (shifts, 0.1)):
        assert jitter.abs().max() <= limit + 1e-4
        assert jitter.max() > 0.9 * limit
        assert jitter.min() < -0.9 * limit


def test_without_objects_no_windows_are_drawn():
    windows, objects = jittered_windows(torch.zeros(0, 4), count=8, share=0.6, shift=0.1, octaves=0.5)
    assert windows.shape == (0, 4)
    assert objects.shape == (0,)


def test_dice_loss_of_known_masks():
    target = torch.zeros(1, 4, 4)
    target[0, :2] = 1
    right, wrong = (target * 2 - 1) * 30, (1 - target * 2) * 30
    assert dice_loss(right, target) == pytest.approx(0.0, abs=1e-6)
    # The masks have eight cells each, and none in common.
    assert dice_loss(wrong, target) == pytest.approx(1 - 1 / 17, abs=1e-6)
    assert dice_loss(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4)) == 0


def test_quality_focal_loss_equals_its_formula():
    logits = torch.tensor([-2.0, 0.5, 3.0, 1.0])
    targets = torch.tensor([0.0, 0.5, 1.0, -1.0])
    expected = 0.0
    for logit, target in zip(logits[:3].tolist(), targets[:3].tolist()):
        p = 1 / (1 + math.exp(-logit))
        expected -= abs(target - p) ** 2 * (target * math.log(p) + (1 - target) * math.log(1 - p))
    assert quality_focal_loss(logits, targets) == pytest.approx(expected / 1.5, rel=1e-5)
    assert quality_focal_loss(torch.zeros(2), -torch.ones(2)) == 0


def test_small_boxes_are_enlarged_about_their_centres():
    boxes = torch.tensor([[10.0, 20, 14, 22], [0, 0, 30, 8]])
    assert enlarged(boxes, 16.0).tolist() == [[4, 17, 20, 25], [0, 0, 30, 8]]


@pytest.fixture
def cfg(tiny_cfg):
    cfg = tiny_cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "SegmentProposalNetwork"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMaskFPN"
    cfg.MODEL.BACKBONE.NAME = "build_timm_bifpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.TIMM.OUT_FEATURES = ["s4", "s8", "s16", "s32"]
    cfg.MODEL.BIFPN.NUM_CELLS, cfg.MODEL.BIFPN.CHANNELS = 1, 16
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.0] * 3, [128.0] * 3
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.GENERATOR.FROZEN = False
    sharpmask.TEST.NUM_PROPOSALS = 50
    torch.manual_seed(0)
    return cfg


def example(objects):
    """An image of 128 x 128 pixels with rectangles, as Detectron2's mapper returns it."""
    image, instances = draw_example(objects, (128, 128), kind="bitmap")
    return {"image": image * 50 + 127.5, "instances": instances}


def test_gradients_of_the_losses_reach_all_trained_layers(cfg):
    model = build_model(cfg).train()
    inputs = example([(20, 20, 80, 70), (90, 30, 120, 100)])
    with EventStorage():
        losses = model([inputs])
    assert set(losses) == {f"loss_sharpmask_{name}" for name in ("mask", "dice", "side", "score")}
    sum(losses.values()).backward()
    without = {name for name, p in model.proposal_generator.named_parameters() if p.grad is None}
    assert not {name for name in without if not name.startswith("scores.")}, without
    assert model.backbone.finest.weight.grad.abs().sum() > 0


def test_losses_of_an_image_without_objects_have_gradients(cfg):
    model = build_model(cfg).train()
    inputs = example([])
    with EventStorage():
        losses = model([inputs])
    assert losses["loss_sharpmask_mask"] == losses["loss_sharpmask_dice"] == 0
    sum(losses.values()).backward()


def test_canonical_windows_are_enlarged_by_the_factor_of_the_mask_window(cfg):
    generator = build_model(cfg).proposal_generator
    # Windows of 5 cells of 4 pixels are canonical for objects of 16 pixels. Masks are decoded in windows that are 1.2 times as large.
    boxes = torch.tensor([[50.0, 50, 66, 58], [10, 10, 14, 12], [0, 0, 64, 64]])
    windows = generator.canonical_windows(boxes)
    expected = [[58 - 12, 54 - 12, 58 + 12, 54 + 12], [12 - 12, 11 - 12, 12 + 12, 11 + 12], [-16, -16, 80, 80]]
    torch.testing.assert_close(windows, torch.tensor(expected).float())


def test_some_masks_are_refined_and_the_others_are_interpolated(cfg):
    model = build_model(cfg).eval()
    generator = model.proposal_generator
    windows = generator.canonical_windows(torch.tensor([[20.0, 20, 80, 70], [90, 30, 120, 100], [10, 10, 40, 30]]))
    images = torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        pyramid = model.encode([example([(20, 20, 80, 70)])])
        chosen = torch.tensor([True, False, True])
        refined, some = (generator.decode(pyramid, Windows(windows, refined=x)) for x in (None, chosen))
        coarse = generator.decoder(pyramid.tables, images, windows)[0]
    torch.testing.assert_close(some[chosen], refined[chosen], atol=1e-5, rtol=0)
    interpolated = torch.nn.functional.interpolate(coarse[~chosen, None], size=(56, 56), mode="bilinear")[:, 0]
    torch.testing.assert_close(some[~chosen], interpolated, atol=1e-5, rtol=0)
    assert (some[1] - refined[1]).abs().max() > 1e-3


def test_the_number_of_refined_masks_does_not_change_the_number_of_proposals(cfg):
    inputs = example([(20, 20, 80, 70)])
    cfg.MODEL.SHARPMASK.TEST.MASK_THRESHOLD = 0.001
    for num_refined in (0, 7, 1000):
        cfg.MODEL.SHARPMASK.FPN.NUM_REFINED = num_refined
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        with torch.no_grad():
            assert len(model([inputs])[0]["proposals"]) == 50


@pytest.mark.parametrize("size", [7, 14, 28])
def test_windows_are_sampled_on_the_level_whose_cells_have_the_closest_size(size):
    features, extents = pyramid((256, 256))
    table = FeatureTable.from_maps(features, extents, STRIDES)
    for side in (9.0, 30.0, 61.0, 100.0, 170.0, 240.0, 900.0):
        windows = torch.tensor([[20.0, 30.0, 20.0 + side, 30.0 + side]])
        level = min(range(len(STRIDES)), key=lambda i: abs(math.log2(side / size / STRIDES[i])))
        images = torch.zeros(1, dtype=torch.long)
        expected = table.sample(images, torch.tensor([level]), windows, size)
        torch.testing.assert_close(table.sample_windows(images, windows, size), expected)


@torch.no_grad()
def test_coarse_masks_are_linear_functions_of_embeddings_and_cover_the_window(decoder):
    features, extents = pyramid((256, 256))
    tables = decoder.tables(features, extents, STRIDES)
    images = torch.zeros(1, dtype=torch.long)
    windows = torch.tensor([[70.0, 60.0, 161.0, 151.0]])
    sampled = tables.features.sample_windows(images, windows, 7)[0]
    embedding = (decoder.embed.weight @ sampled.permute(1, 2, 0).flatten() + decoder.embed.bias).clamp(min=0)
    rows = (decoder.coarse_mask.weight @ embedding + decoder.coarse_mask.bias).view(1, 1, 14, 14)
    expected = torch.nn.functional.interpolate(rows, size=(56, 56), mode="bilinear", align_corners=False)[0, 0]
    mask = decoder.masks(tables, images, windows, refined=False)[0]
    torch.testing.assert_close(mask, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_skip_features_are_aligned_with_the_cells_of_the_mask(decoder):
    """All weights are zero except those that copy the first channel, which is a ramp along the rows of the image."""
    for parameter in decoder.parameters():
        parameter.zero_()
    for path in (decoder.horizontal_coarse, decoder.horizontal_fine):
        path[0].weight[0, 0] = path[2].weight[0, 0] = 1
    decoder.to_mask.weight[0, 0, 1, 1] = 1
    sizes = pyramid_sizes((256, 256), STRIDES)
    ramps = [(torch.arange(columns) + 0.5) * s for s, (_, columns) in zip(STRIDES, sizes)]
    features = [ramp.expand(1, 6, rows, columns).clone() / 100 for ramp, (rows, columns) in zip(ramps, sizes)]
    x0, y0, side = 70.0, 60.0, 91.0
    tables = decoder.tables(features, torch.tensor([sizes]), STRIDES)
    windows = torch.tensor([[x0, y0, x0 + side, y0 + side]])
    mask = decoder.masks(tables, torch.zeros(1, dtype=torch.long), windows)[0]
    ramp = ((x0 + (torch.arange(28) + 0.5) * side / 28) / 100)[None, None].expand(1, 28, 28)
    expected = torch.nn.functional.interpolate(ramp[None], size=(56, 56), mode="nearest")[0, 0]
    torch.testing.assert_close(mask, expected, atol=1e-5, rtol=0)


def test_untrained_scores_are_low(cfg):
    model = build_model(cfg).eval()
    with torch.no_grad():
        pyramid = model.encode([example([(20, 20, 80, 70)])])
    assert pyramid.scores.sigmoid().mean() < 0.03
