"""SharpMask on a feature pyramid against slow definitions, on cut-out windows, in training, alone and inside detectors."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import draw_example, gradient
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks, pairwise_iou
from detectron2.utils.events import EventStorage
from sharpmask_d2.modeling.backbone.detector import TrunkAndPyramid
from sharpmask_d2.modeling.feature_pyramid.feature_table import FeatureTable
from sharpmask_d2.modeling.feature_pyramid.grid import spread
from sharpmask_d2.structures import rescale_proposals
from sharpmask_d2.structures.mask_stability import mask_stability
from sharpmask_d2.windows.geometry import pyramid_sizes
from sharpmask_d2.windows.targets import balance_windows
from torch import nn

RULE = {"positive_shift": 16.0, "positive_octaves": 0.25, "negative_shift": 32.0, "negative_octaves": 1.0}
# Shift and octaves within which windows learn a mask.
NEAR = 24.0, 0.5
# Pixels of the patch, and those of an object that fits it.
WINDOW, CANONICAL = 160, 92
# The larger side of an object that fits its window, in sides of the window.
SHARE = CANONICAL / WINDOW
STRIDES = {"f4": 4, "f8": 8, "f16": 16, "f32": 32}
KINDS = [5, 7]
LOSSES = {"loss_sharpmask_mask", "loss_sharpmask_score", "loss_sharpmask_quality"}
# x0, y0, x1, y1: canonical in windows of 40 (5 cells of stride 8), 56, 80 and 112 pixels are sides of 23, 32, 46 and 64.
OBJECTS = [(8, 10, 31, 33), (60, 6, 92, 30), (20, 60, 66, 100), (80, 40, 130, 104)]


def randomise(module, *, biased=True):
    """Weights, by a fixed seed, under which what differs in the input differs in the output."""
    draws = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter.data, std=1.4 / math.sqrt(parameter[0].numel()), generator=draws)
        elif biased and name.endswith("bias"):
            nn.init.normal_(parameter.data, std=0.2, generator=draws)
    return module


class PatchBackbone(Backbone):
    """Convolutions without overlap and without bias: nothing looks beyond its cell, and nothing is made of nothing."""

    def __init__(self, channels=6):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels if i else 3, channels, 2 if i else 4, stride=2 if i else 4, bias=False)
            for i in range(len(STRIDES))
        )
        self.channels = channels
        randomise(self)

    @property
    def size_divisibility(self):
        return 32

    def output_shape(self):
        return {name: ShapeSpec(channels=self.channels, stride=stride) for name, stride in STRIDES.items()}

    def forward(self, x):
        outputs = {}
        for name, conv in zip(STRIDES, self.convs):
            x = outputs[name] = nn.functional.leaky_relu(conv(x), 0.3)
        return outputs


@BACKBONE_REGISTRY.register()
def build_patch_backbone(cfg, input_shape):
    return PatchBackbone()


class OverlappingTrunk(Backbone):
    """A trunk that looks beyond its cells."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(6 if i else 3, 6, 5, stride=4 if i == 0 else 2, padding=2) for i in range(4)
        )

    def output_shape(self):
        return {name: ShapeSpec(channels=6, stride=stride) for name, stride in STRIDES.items()}

    def forward(self, x):
        outputs = {}
        for name, conv in zip(STRIDES, self.convs):
            x = outputs[name] = conv(x).relu()
        return outputs


@pytest.fixture
def cfg(tiny_cfg):
    """The network alone on the backbone without overlap."""
    cfg = tiny_cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "SegmentProposalNetwork"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMaskFPN"
    cfg.MODEL.BACKBONE.NAME = "build_patch_backbone"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.PIXEL_MEAN = [127.5] * 3
    cfg.MODEL.PIXEL_STD = [50.0] * 3
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.GENERATOR.FROZEN = False
    sharpmask.LABELS.NEGATIVE_SHIFT = RULE["negative_shift"]
    sharpmask.LABELS.NEGATIVE_OCTAVES = RULE["negative_octaves"]
    sharpmask.FPN.IN_FEATURES = list(STRIDES)
    sharpmask.FPN.EXTRA_LEVELS = 1
    sharpmask.FPN.SCORE_CHANNELS = 8
    sharpmask.FPN.WINDOW_NMS_THRESH = 1.0
    sharpmask.FPN.SCALE_PRIOR = 0.0
    sharpmask.FPN.QUALITY = True
    sharpmask.FPN.OBJECT_SHARE = SHARE
    sharpmask.FPN.MASK_SHIFT, sharpmask.FPN.MASK_OCTAVES = NEAR
    torch.manual_seed(0)
    return cfg


@pytest.fixture(autouse=True)
def storage():
    with EventStorage() as storage:
        yield storage


def with_fpn(cfg):
    """Detectron2's feature pyramid on ResNet-18 in the place of the backbone, in place."""
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 0
    return cfg


def build(cfg):
    """A generator on the backbone without overlap, its weights random and biases among them."""
    return randomise(build_proposal_generator(cfg, PatchBackbone().output_shape()))


def draw(objects=OBJECTS, size=(112, 144), kind="polygon", seed=0):
    return draw_example(objects, size, kind=kind, seed=seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images_of(*images):
    return ImageList.from_tensors(list(images), PatchBackbone().size_divisibility)


def slow_cells(size, strides):
    """How many cells of each level have a part of the image, counted one by one: [(rows, columns), ...]."""
    return [tuple(sum(1 for n in range(side) if n * stride < side) for side in size) for stride in strides]


def slow_places(grids, strides, kinds=KINDS):
    """In the order of `Pyramid.scores`: level, kind, y, x and the window in pixels."""
    for level, (rows, columns) in enumerate(grids):
        for kind, cells in enumerate(kinds):
            for y in range(rows):
                for x in range(columns):
                    cx, cy = (x + x + 1) * strides[level] / 2, (y + y + 1) * strides[level] / 2
                    half = cells * strides[level] / 2
                    yield level, kind, y, x, [cx - half, cy - half, cx + half, cy + half]


def propose_these(generator, pyramid, image_sizes, places):
    """Proposals of some places alone, given for each image, whatever their scores; every mask is full, so that none is left out.

    Returns:
        for each image, window -> (objectness, mask logits).
    """
    scores = torch.full_like(pyramid.scores, -math.inf)
    for number, chosen in enumerate(places):
        scores[number, chosen] = pyramid.scores[number, chosen]
    generator.num_proposals, generator.mask_threshold = max(len(chosen) for chosen in places), -1e6
    with torch.no_grad():
        proposals = generator.propose(pyramid._replace(scores=scores), image_sizes)
    return [
        {
            tuple(window): (score, mask)
            for window, score, mask in zip(
                p.proposal_masks.windows.tolist(), p.objectness_logits, p.proposal_masks.logits
            )
        }
        for p in proposals
    ]


def logit(p):
    return math.log(p) - math.log1p(-p)


# ---------------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 1), (1, 1)), ((64, 65), (8, 9)), ((63, 129), (8, 17)), ((7, 8), (1, 1))]
)
def test_sizes_of_levels_count_cells_that_are_covered_in_part(size, expected):
    assert pyramid_sizes(size, [8]) == [expected]
    strides = [4, 8, 16, 32, 64, 128]
    assert pyramid_sizes(size, strides) == slow_cells(size, strides)


def test_every_place_among_the_scores_is_the_window_that_loops_find(cfg):
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 2
    generator, backbone = build(cfg).eval(), PatchBackbone()
    strides = [4, 8, 16, 32, 64, 128]
    assert generator.strides == strides
    sizes = [(90, 141), (61, 40)]
    images = images_of(*(noise(3, *size) for size in sizes))
    with torch.no_grad():
        pyramid = generator.pyramid(images.image_sizes, backbone(images.tensor))
    # The map is of the padded batch: 96 x 160.
    assert pyramid.sizes == [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    slow = list(slow_places(pyramid.sizes, strides))
    assert pyramid.scores.shape == (2, len(slow))
    cells = generator.geometry.cells(torch.arange(len(slow)), pyramid.sizes)
    assert [tuple(row) for row in torch.stack(cells, dim=1).tolist()] == [place[:4] for place in slow]
    assert generator.geometry.windows(cells).dtype == torch.float32
    assert generator.geometry.windows(cells).tolist() == [place[4] for place in slow]
    octaves = [math.log2((x1 - x0) / 20) for *_, (x0, _, x1, _) in slow]
    torch.testing.assert_close(generator.geometry.octaves(pyramid.sizes), torch.tensor(octaves))
    # In any order, too.
    order = torch.randperm(len(slow), generator=torch.Generator().manual_seed(0))
    shuffled = generator.geometry.cells(order, pyramid.sizes)
    assert all(torch.equal(a, b[order]) for a, b in zip(shuffled, cells))
    for number, size in enumerate(sizes):
        own = slow_cells(size, strides)
        assert pyramid.extents[number].tolist() == [list(x) for x in own]
        inside = [y < own[level][0] and x < own[level][1] for level, _, y, x, _ in slow]
        assert pyramid.scores[number].isfinite().tolist() == inside
        assert 0 < sum(inside) < len(inside)


def test_levels_beyond_the_backbone_are_means_of_the_image_s_cells(cfg):
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 2
    # 5 x 7 cells of stride 32; the second image has 3 x 6 of them, and beyond it is not nothing.
    sizes = [(160, 224), (90, 170)]
    features = {name: x.detach() for name, x in PatchBackbone()(noise(2, 3, 160, 224)).items()}
    with torch.no_grad():
        levels = build(cfg).pyramid(sizes, features).features
    assert [tuple(x.shape[2:]) for x in levels[3:]] == [(5, 7), (3, 4), (2, 2)]
    for image, size in enumerate(sizes):
        cells = slow_cells(size, [32, 64, 128])
        before = levels[3][image]
        for level, (rows, columns), finer in zip(levels[4:], cells[1:], cells):
            for y, x in itertools.product(range(rows), range(columns)):
                inside = [
                    before[:, i, j]
                    for i, j in itertools.product((2 * y, 2 * y + 1), (2 * x, 2 * x + 1))
                    if i < finer[0] and j < finer[1]
                ]
                torch.testing.assert_close(level[image, :, y, x], torch.stack(inside).mean(0))
            before = level[image]


# ----------------------------------------------------------------------------------------------------------- feature table


STRIDES_OF_TABLE = [4, 8, 16]
EXTENTS = torch.tensor([[[10, 12], [5, 6], [3, 3]], [[6, 12], [3, 6], [2, 3]], [[10, 3], [5, 2], [3, 1]]])


def table_maps(channels=3):
    return [noise(3, channels, *size, seed=i) for i, size in enumerate([(10, 12), (5, 6), (3, 3)])]


def slow_cell(maps, image, level, y, x):
    rows, columns = EXTENTS[image, level].tolist()
    if 0 <= y < rows and 0 <= x < columns:
        return maps[level][image, :, y, x], True
    return torch.zeros(maps[0].shape[1]), False


@pytest.mark.parametrize("cells", [1, 5, 7])
def test_cells_of_windows_against_loops(cells):
    maps = table_maps()
    places = [
        (image, level, y, x)
        for image, level in itertools.product(range(3), range(3))
        for y, x in itertools.product((0, 1, int(EXTENTS[image, level, 0]) - 1), (0, int(EXTENTS[image, level, 1]) - 1))
    ]
    cut, inside = FeatureTable(maps, EXTENTS, STRIDES_OF_TABLE).cut(*torch.tensor(places).T, cells)
    assert cut.shape == (len(places), cells, cells, 3)
    assert inside.dtype == torch.bool
    for n, (image, level, y, x) in enumerate(places):
        for i, j in itertools.product(range(cells), repeat=2):
            expected, within = slow_cell(maps, image, level, y - (cells - 1) // 2 + i, x - (cells - 1) // 2 + j)
            assert torch.equal(cut[n, i, j], expected)
            assert inside[n, i, j].item() == within
    assert inside.any()
    assert cells == 1 or not inside.all()


@pytest.mark.parametrize("size", [1, 4, 9])
def test_samples_of_windows_against_loops(size):
    maps = table_maps()
    draws = np.random.default_rng(0)
    images, levels = draws.integers(0, 3, (2, 30))
    centres, sides = draws.uniform(-8, 48, (30, 2)), draws.uniform(2, 60, (30, 2))
    # Squares and others, of which many lie partly outside and one wholly.
    windows = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    windows[0] = 200, 200, 220, 220
    sampled = FeatureTable(maps, EXTENTS, STRIDES_OF_TABLE).sample(
        torch.tensor(images), torch.tensor(levels), torch.tensor(windows, dtype=torch.float32), size
    )
    assert sampled.shape == (30, 3, size, size)
    expected = torch.zeros(30, 3, size, size)
    for n, (x0, y0, x1, y1) in enumerate(windows):
        image, level = int(images[n]), int(levels[n])
        for i, j in itertools.product(range(size), repeat=2):
            # In cells, whose centres are at halves.
            x = (x0 + (j + 0.5) / size * (x1 - x0)) / STRIDES_OF_TABLE[level]
            y = (y0 + (i + 0.5) / size * (y1 - y0)) / STRIDES_OF_TABLE[level]
            near = itertools.product(*(range(math.floor(v) - 2, math.floor(v) + 3) for v in (y, x)))
            for row, column in near:
                weight = max(0, 1 - abs(x - column - 0.5)) * max(0, 1 - abs(y - row - 0.5))
                if weight:
                    expected[n, :, i, j] += weight * slow_cell(maps, image, level, row, column)[0]
    assert not sampled[0].any()
    torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=1e-4)


def test_a_linear_ramp_is_sampled_where_the_window_says():
    """Maps hold the places of their cells' centres: samples are the places of the samples."""
    maps = []
    for stride, (rows, columns) in zip([4, 8], [(20, 24), (10, 12)]):
        ys, xs = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        maps.append(torch.stack([(xs + 0.5) * stride, (ys + 0.5) * stride])[None])
    table = FeatureTable(maps, torch.tensor([[[20, 24], [10, 12]]]), [4, 8])
    windows = torch.tensor([[10.0, 21.0, 38.0, 63.0], [7.3, 12.9, 89.1, 70.2], [40.0, 40.0, 41.0, 41.0]])
    for level in (0, 1):
        sampled = table.sample(torch.zeros(3, dtype=torch.long), torch.full((3,), level), windows, 7)
        parts = (torch.arange(7) + 0.5) / 7
        for (x0, y0, x1, y1), (found_x, found_y) in zip(windows.tolist(), sampled):
            torch.testing.assert_close(found_x, (x0 + parts * (x1 - x0)).expand(7, 7), atol=1e-3, rtol=0)
            torch.testing.assert_close(found_y, (y0 + parts * (y1 - y0))[:, None].expand(7, 7), atol=1e-3, rtol=0)


def test_gradients_of_what_is_read_go_to_the_cells_it_was_read_from():
    maps = [x.requires_grad_() for x in table_maps()]
    table = FeatureTable(maps, EXTENTS, STRIDES_OF_TABLE)
    cut, _ = table.cut(*torch.tensor([[1, 1, 2, 0]]).T, 5)
    cut.sum().backward()
    assert maps[0].grad is None or not maps[0].grad.any()
    # Rows 0 .. 2 of the three that belong to the image, columns 0 .. 2.
    expected = torch.zeros_like(maps[1])
    expected[1, :, 0:3, 0:3] = 1
    assert torch.equal(maps[1].grad, expected)


# ------------------------------------------------------------------------------------------- what windows are alone they are


@pytest.mark.parametrize("num_refinements", [0, 1, 2])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_window_cut_out_of_the_image_has_the_same_score_quality_and_mask(cfg, kind, num_refinements):
    cfg.MODEL.SHARPMASK.FPN.NUM_REFINEMENTS = num_refinements
    generator, backbone = build(cfg).eval(), PatchBackbone().eval()
    cells, strides = KINDS[kind], [4, 8, 16, 32, 64]
    size = (512, 576)
    image = noise(3, *size)
    # A window of each level; that of 7 cells of 64 pixels just fits.
    chosen = {0: (12, 19), 1: (9, 13), 2: (11, 7), 3: (7, 11), 4: (4, 4)}
    side_of_mask = 14 * 2**num_refinements

    def run(image, places):
        size = tuple(image.shape[1:])
        images = images_of(image)
        with torch.no_grad():
            pyramid = generator.pyramid([size], backbone(images.tensor))
        numbers = {place[:4]: number for number, place in enumerate(slow_places(pyramid.sizes, strides))}
        places = [numbers[place] for place in places]
        return pyramid.scores[0, places], propose_these(generator, pyramid, [size], [places])[0]

    places = [(level, kind, y, x) for level, (y, x) in chosen.items()]
    whole_scores, whole = run(image, places)
    assert len(whole) == len(places)
    assert whole_scores.std() > 0.01
    for (level, _, y, x), whole_score in zip(places, whole_scores):
        half, side = cells // 2, cells * strides[level]
        x0, y0 = (x - half) * strides[level], (y - half) * strides[level]
        piece = image[:, y0 : y0 + side, x0 : x0 + side]
        assert piece.shape == (3, side, side)
        (score,), found = run(piece, [(level, kind, half, half)])
        ((window, (objectness, mask)),) = found.items()
        assert window == (0, 0, side, side)
        expected_objectness, expected_mask = whole[x0, y0, x0 + side, y0 + side]
        torch.testing.assert_close(score, whole_score, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(objectness, expected_objectness, atol=1e-5, rtol=1e-5)
        if num_refinements and not (cells == 7 and level >= num_refinements):
            # Half a cell beyond the window weighs in at its border, where the piece has nothing: the part that no border reaches agrees.
            border = 9 if num_refinements == 2 else 5
            mask, expected_mask = (m[border:-border, border:-border] for m in (mask, expected_mask))
        else:
            # Samples lie on the centres of cells, or there are none.
            assert mask.shape == (side_of_mask, side_of_mask)
        assert expected_mask.std() > 1e-3
        assert (mask - expected_mask).abs().max() < 1e-5 * expected_mask.abs().max()


@pytest.mark.parametrize("num_refinements", [1, 2])
def test_a_window_on_nothing_has_the_whole_mask_that_it_has_alone(cfg, num_refinements):
    """Where nothing is around the window and nothing is made of nothing, masks agree up to their borders."""
    cfg.MODEL.SHARPMASK.FPN.NUM_REFINEMENTS = num_refinements
    generator, backbone = build(cfg).eval(), PatchBackbone().eval()
    for step in generator.decoder.steps:
        for name, parameter in step.horizontal.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
    strides = [4, 8, 16, 32, 64]
    for kind, cells in enumerate(KINDS):
        for level in range(4):
            side = cells * strides[level]
            x0, y0 = 2 * strides[level], strides[level]
            piece = noise(3, side, side, seed=level)
            results = []
            for size, corner in (((320, 320), (y0, x0)), ((side, side), (0, 0))):
                canvas = torch.zeros(3, *(-(-s // 64) * 64 for s in size))
                canvas[:, corner[0] : corner[0] + side, corner[1] : corner[1] + side] = piece
                with torch.no_grad():
                    pyramid = generator.pyramid([size], backbone(canvas[None]))
                numbers = {place[:4]: number for number, place in enumerate(slow_places(pyramid.sizes, strides))}
                y, x = (c // strides[level] + cells // 2 for c in corner)
                (found,) = propose_these(generator, pyramid, [size], [[numbers[level, kind, y, x]]])
                results += found.values()
            assert results[0][1].std() > 1e-3
            torch.testing.assert_close(results[1][1], results[0][1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)


def test_masks_read_the_finer_levels_and_not_their_own(cfg):
    """Module n of a window reads the level n finer than its own, or the finest."""
    generator = build(cfg).eval()
    features = {name: x.detach() for name, x in PatchBackbone()(noise(1, 3, 320, 320)).items()}
    strides = [4, 8, 16, 32, 64]
    for level in range(5):
        changed = []
        for number in range(5):
            with torch.no_grad():
                pyramid = generator.pyramid([(320, 320)], features)
                maps = [x if i != number else x + 1 for i, x in enumerate(pyramid.features)]
                window = torch.tensor([[0.0, 0.0, 1, 1]]) * 5 * strides[level]
                masks = []
                for levels in (pyramid.features, maps):
                    skips = generator.decoder.horizontal(levels, pyramid.extents, generator.strides)
                    masks.append(
                        generator.decoder.masks(
                            torch.ones(1, 16), skips, torch.tensor([0]), torch.tensor([level]), window
                        )
                    )
            if not torch.equal(*masks):
                changed.append(number)
        assert changed == sorted({max(level - 1, 0), max(level - 2, 0)})


# ------------------------------------------------------------------------------------------------------------------ scores


def test_scores_of_cut_windows_are_those_of_the_dense_grid(cfg):
    generator, backbone = build(cfg).eval(), PatchBackbone()
    # The second image is smaller than the batch's map, and what lies beyond it is not nothing.
    sizes = [(96, 128), (50, 41)]
    features = {name: x.detach() for name, x in backbone(noise(2, 3, 96, 128)).items()}
    pyramid = generator.pyramid(sizes, features)
    table = FeatureTable(pyramid.features, pyramid.extents, generator.strides)
    for number in range(2):
        places = pyramid.scores[number].isfinite().nonzero()[:, 0]
        cells = generator.geometry.cells(places, pyramid.sizes)
        for kind, side in enumerate(KINDS):
            of_kind = cells.kinds == kind
            cut, inside = table.cut(
                torch.full((int(of_kind.sum()),), number),
                cells.levels[of_kind],
                cells.ys[of_kind],
                cells.xs[of_kind],
                side,
            )
            with torch.no_grad():
                scores = generator.scores.of_windows(cut, inside, kind)
            expected = pyramid.scores[number, places[of_kind]]
            assert expected.std() > 1e-3
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    # Scores of the smaller image do not depend on what is beyond it.
    for x in features.values():
        assert x[1, :, -1, -1].any()
    alone = generator.pyramid(
        sizes[1:], {name: x[1:, :, :13, :11] if name == "f4" else x[1:] for name, x in features.items()}
    )
    expected = pyramid.scores[1][pyramid.scores[1].isfinite()]
    torch.testing.assert_close(alone.scores[0][alone.scores[0].isfinite()], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("quality", "prior"), [(True, 0.0), (False, 0.0), (True, 0.5)])
def test_objectness_is_the_logit_of_the_product_of_score_and_quality(cfg, quality, prior):
    cfg.MODEL.SHARPMASK.FPN.QUALITY, cfg.MODEL.SHARPMASK.FPN.SCALE_PRIOR = quality, prior
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 200
    # No mask is left out, and windows come in several parts.
    cfg.MODEL.SHARPMASK.TEST.MASK_THRESHOLD = 1e-12
    cfg.MODEL.SHARPMASK.TEST.WINDOWS_PER_BATCH = 16
    generator, backbone = build(cfg).eval(), PatchBackbone()
    features = backbone(2 * noise(1, 3, 96, 128))
    ((proposals,), losses) = generator(images_of(noise(3, 96, 128)), features)
    assert losses == {}
    assert len(proposals) == 200
    found = proposals.objectness_logits.tolist()
    assert found == sorted(found, reverse=True)
    with torch.no_grad():
        pyramid = generator.pyramid([(96, 128)], features)
        places = list(slow_places(pyramid.sizes, generator.strides))
        by_window = {tuple(place[4]): number for number, place in enumerate(places)}
        scores = pyramid.scores[0].double()
        scores += prior * torch.tensor([math.log2((place[4][2] - place[4][0]) / 20) for place in places])
        best = set(scores.topk(200).indices.tolist())
        chosen = [by_window[tuple(window)] for window in proposals.proposal_masks.windows.tolist()]
        assert set(chosen) == best
        # Both kinds by turns, so that nothing holds by their order.
        kinds = [places[number][1] for number in chosen]
        assert sum(a != b for a, b in zip(kinds, kinds[1:])) > 10
        expected = []
        for number in chosen:
            level, kind, y, x, _ = places[number]
            score = scores[number].item()
            if quality:
                half = KINDS[kind] // 2
                around = nn.functional.pad(pyramid.features[level], [half] * 4)
                piece = around[0, :, y : y + KINDS[kind], x : x + KINDS[kind]].permute(1, 2, 0).flatten()
                embedding = generator.decoder.embed[kind](piece).relu()
                predicted = generator.decoder.quality(embedding).double().item()
                score = logit(1 / (1 + math.exp(-score)) / (1 + math.exp(-predicted)))
            expected.append(score)
    assert np.ptp(found) > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- training


def learning_examples():
    """Two images that differ in size and in how their masks are kept."""
    return [draw(), draw([(5, 10, 37, 35), (50, 6, 90, 52)], (64, 96), kind="bitmap", seed=1)]


def slow_label(window, boxes, *, share=SHARE, rule=RULE):
    """Label by the rule, object by object; whether the window learns a mask; and the object near it, None if it is far from all."""
    limits = (
        (rule["positive_shift"], rule["positive_octaves"]),
        NEAR,
        (rule["negative_shift"], rule["negative_octaves"]),
    )
    nearest = [[], [], []]
    side = window[2] - window[0]
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        octaves = abs(math.log2(side * share / max(x1 - x0, y1 - y0)))
        dx, dy = (window[0] + window[2] - x0 - x1) / 2, (window[1] + window[3] - y0 - y1) / 2
        shift = max(abs(dx), abs(dy)) / (side * share) * CANONICAL
        for within, (most_shift, most_octaves) in zip(nearest, limits):
            if shift <= most_shift and octaves <= most_octaves:
                within.append((max(shift / most_shift, octaves / most_octaves), number))
    positive, around, near = nearest
    if not near:
        return 0, False, None
    # Of the strictest rule that holds, the nearest object.
    owner = min(positive or around or near)[1]
    return 1 if positive else -1, bool(around), owner


def test_losses_are_of_the_labelled_windows(cfg):
    """All windows of two images, one by one."""
    generator, backbone = build(cfg).train(), PatchBackbone()
    generator.sampler.windows_per_image, generator.sampler.positive_fraction = 100000, 0.5
    threshold = generator.mask_threshold
    examples = learning_examples()
    images = images_of(*(image for image, _ in examples))
    features = backbone(images.tensor)
    _, losses = generator(images, features, [gt for _, gt in examples])
    assert set(losses) == LOSSES
    with torch.no_grad():
        pyramid = generator.pyramid(images.image_sizes, features)
    places = list(slow_places(pyramid.sizes, generator.strides))
    score_terms, quality_terms, mask_terms, kinds = [], [], [], Counter()
    for number, (_, gt) in enumerate(examples):
        boxes = gt.gt_boxes.tensor.tolist()
        inside = pyramid.scores[number].isfinite().tolist()
        labels = {n: slow_label(place[4], boxes) for n, place in enumerate(places) if inside[n]}
        near = [n for n, (_, _, owner) in labels.items() if owner is not None]
        chosen = [near if i == number else [0] for i in range(2)]
        found = propose_these(generator, pyramid, images.image_sizes, chosen)[number]
        for n, (label, around, owner) in labels.items():
            level, kind, y, x, window = places[n]
            if label >= 0:
                score_terms.append(bce(pyramid.scores[number, n].item(), label))
            if owner is None:
                quality_terms.append((number, level, kind, y, x, 0.0))
                continue
            kinds[label, around] += 1
            mask = found[tuple(window)][1]
            target = slow_target(gt, owner, window, mask.shape[0])
            if around:
                terms = nn.functional.binary_cross_entropy_with_logits(mask, target.float(), reduction="none")
                mask_terms.append(terms.mean().item())
            predicted = mask > threshold
            overlap = (predicted & target).sum().item() / max((predicted | target).sum().item(), 1)
            quality_terms.append((number, level, kind, y, x, overlap))
    # Positive, near enough to learn a mask, and near enough to learn how good it is.
    assert set(kinds) == {(1, True), (-1, True), (-1, False)}
    assert min(kinds.values()) >= 8
    assert losses["loss_sharpmask_score"].item() == pytest.approx(np.mean(score_terms), rel=1e-4)
    weight = cfg.MODEL.SHARPMASK.MASK_LOSS_WEIGHT
    # Cells that an edge halves may fall to either side.
    assert losses["loss_sharpmask_mask"].item() == pytest.approx(weight * np.mean(mask_terms), rel=1e-2)
    table = FeatureTable(pyramid.features, pyramid.extents, generator.strides)
    terms = []
    for kind, side in enumerate(KINDS):
        rows = [row for row in quality_terms if row[2] == kind]
        numbers, levels, _, ys, xs, target = (torch.tensor(x) for x in zip(*rows))
        with torch.no_grad():
            cut, _ = table.cut(numbers, levels, ys, xs, side)
            predicted = generator.decoder.quality(generator.decoder.embed[kind](cut.flatten(1)).relu())[:, 0]
        terms += nn.functional.binary_cross_entropy_with_logits(predicted, target, reduction="none").tolist()
    assert losses["loss_sharpmask_quality"].item() == pytest.approx(np.mean(terms), rel=1e-3)


def bce(value, target):
    return max(value, 0) - value * target + math.log1p(math.exp(-abs(value)))


def slow_target(gt, number, window, side):
    """A rectangle cut to a window: the cells of which at least half is in the rectangle, one by one."""
    x0, y0, x1, y1 = gt.gt_boxes.tensor[number].tolist()
    cell = (window[2] - window[0]) / side
    target = torch.zeros(side, side, dtype=torch.bool)
    for i, j in itertools.product(range(side), repeat=2):
        left, top = window[0] + j * cell, window[1] + i * cell
        width = min(x1, left + cell) - max(x0, left)
        height = min(y1, top + cell) - max(y0, top)
        target[i, j] = width > 0 and height > 0 and width * height >= cell * cell / 2
    return target


def targets_fit(generator, pyramid, sample, examples, *, share=SHARE):
    """Whether labels, the windows near objects, and targets are those that loops find, in the order of the windows."""
    places = list(slow_places(pyramid.sizes, generator.strides))
    windows = [places[n][4] for n in sample.numbers.tolist()]
    boxes = [gt.gt_boxes.tensor.tolist() for _, gt in examples]
    slow = [slow_label(window, boxes[n], share=share) for window, n in zip(windows, sample.images.tolist())]
    assert sample.labels.tolist() == [label for label, _, _ in slow]
    assert sample.around.tolist() == [around for _, around, _ in slow]
    assert sample.near.tolist() == [owner is not None for _, _, owner in slow]
    rows = [n for n, near in enumerate(sample.near.tolist()) if near]
    assert len(rows) == len(sample.targets) > 0
    for n, target in zip(rows, sample.targets):
        expected = slow_target(examples[sample.images[n]][1], slow[n][2], windows[n], target.shape[0])
        # Cells that an edge halves may fall to either side.
        assert (target != expected).sum() <= 0.1 * (target | expected).sum()
    kinds = [places[n][1] for n in sample.numbers.tolist()]
    assert kinds == sorted(kinds)
    assert len(set(zip(sample.images.tolist(), sample.numbers.tolist()))) == len(kinds)


@pytest.mark.parametrize(("most", "share"), [(100000, SHARE), (100000, 0.83), (40, SHARE), (8, SHARE)])
def test_windows_that_pay_are_labelled_and_counted(cfg, most, share):
    cfg.MODEL.SHARPMASK.FPN.OBJECT_SHARE = share
    generator, backbone = build(cfg).train(), PatchBackbone()
    generator.sampler.windows_per_image, generator.sampler.positive_fraction = most, 0.5
    examples = learning_examples()
    images = images_of(*(image for image, _ in examples))
    with torch.no_grad():
        pyramid = generator.pyramid(images.image_sizes, backbone(images.tensor))
    sample = generator.sampler(pyramid.scores, pyramid.sizes, [gt for _, gt in examples], generator.decoder.mask_size)
    targets_fit(generator, pyramid, sample, examples, share=share)
    places = list(slow_places(pyramid.sizes, generator.strides))
    for number, (_, gt) in enumerate(examples):
        boxes = gt.gt_boxes.tensor.tolist()
        scores = pyramid.scores[number].tolist()
        slow = {n: slow_label(place[4], boxes, share=share) for n, place in enumerate(places) if scores[n] > -math.inf}
        own = sample.images == number
        found = set(zip(sample.labels[own].tolist(), sample.around[own].tolist(), sample.near[own].tolist()))
        assert found == {(1, True, True), (-1, True, True), (-1, False, True), (0, False, False)} or most < 100000
        positive = sum(label == 1 for label, _, _ in slow.values())
        around = sum(around for _, around, _ in slow.values())
        # Positive windows go first; others around objects fill up, and half as many are farther away.
        expected = min(positive, most // 2)
        assert (sample.labels[own] == 1).sum() == expected > 0
        assert sample.around[own].sum() == min(around, most // 2)
        assert (sample.labels[own] == 0).sum() == min(sum(x[0] == 0 for x in slow.values()), most - expected)
        # These are the ones of highest score.
        far = sorted((scores[n], n) for n, (_, around, owner) in slow.items() if owner is not None and not around)
        rated = sample.numbers[own & sample.near & ~sample.around].tolist()
        assert set(rated) == {n for _, n in far[-(most // 4) :]}


@pytest.mark.parametrize(("name", "value"), [("SHIFT", 20.0), ("OCTAVES", 0.4)])
def test_windows_that_are_negative_learn_no_mask_however_near(cfg, name, value):
    """A label rule that calls windows negative which FPN.MASK_SHIFT and MASK_OCTAVES call near."""
    cfg.MODEL.SHARPMASK.LABELS[f"NEGATIVE_{name}"] = value
    generator, backbone = build(cfg).train(), PatchBackbone()
    generator.sampler.windows_per_image = 100000
    image, gt = draw()
    images = images_of(image)
    with torch.no_grad():
        pyramid = generator.pyramid(images.image_sizes, backbone(images.tensor))
    sample = generator.sampler(pyramid.scores, pyramid.sizes, [gt], generator.decoder.mask_size)
    far = sample.labels == 0
    assert far.any()
    assert not (sample.near & far).any()
    assert not (sample.around & far).any()
    assert len(set(sample.numbers.tolist())) == len(far)
    assert len(sample.targets) == sample.near.sum() > 0


def test_a_positive_window_learns_the_object_that_made_it_positive(cfg):
    """Though another one, too large for it, is nearer by the wider rule of masks."""
    # A window of 5 cells of stride 16, canonical for 46 pixels.
    window = [32.0, 32.0, 112.0, 112.0]
    # 7 pixels beside its middle, 14 of the patch; and just in its middle, but more than a quarter of an octave too large.
    objects = [(56, 49, 102, 95), (44, 44, 100, 100)]
    assert 0.25 < math.log2(56 / 46) < 14 / NEAR[0] * NEAR[1]
    assert slow_label(window, objects) == (1, True, 0)
    assert slow_label(window, objects[1:]) == (-1, True, 0)
    generator, backbone = build(cfg).train(), PatchBackbone()
    generator.sampler.windows_per_image = 100000
    image, gt = draw(objects, (160, 160))
    images = images_of(image)
    with torch.no_grad():
        pyramid = generator.pyramid(images.image_sizes, backbone(images.tensor))
    sample = generator.sampler(pyramid.scores, pyramid.sizes, [gt], generator.decoder.mask_size)
    targets_fit(generator, pyramid, sample, [(image, gt)])
    windows = generator.geometry.windows(generator.geometry.cells(sample.numbers, pyramid.sizes)).tolist()
    assert sample.labels[windows.index(window)] == 1


def trained_parts(model):
    decoder = model.proposal_generator.decoder
    parts = {
        "reduce": model.proposal_generator.scores.reduce,
        "templates": model.proposal_generator.scores.templates,
        "predictors": model.proposal_generator.scores.predictors,
        "embed": decoder.embed,
        "start": decoder.start,
        "to_mask": decoder.to_mask,
        "quality": decoder.quality,
    }
    for i, step in enumerate(decoder.steps):
        parts[f"vertical {i}"], parts[f"horizontal {i}"] = step.vertical, step.horizontal
    return parts


def inputs_of(*examples):
    return [{"image": 127.5 + 50 * image, "instances": gt} for image, gt in examples]


def test_gradients_of_each_loss_reach_what_it_trains(cfg):
    model = build_model(with_fpn(cfg)).train()
    # Most objects are small for ResNet-18's coarse levels, but every level of the pyramid has a window that pays.
    inputs = inputs_of(draw(), draw([(0, 0, 100, 64), (110, 20, 140, 50)], seed=1))
    decoder, pyramid = model.proposal_generator.decoder, model.backbone
    trunk = {name: getattr(pyramid.bottom_up, name) for name in ("stem", "res2", "res3", "res4", "res5")}
    laterals = {name: m for name, m in pyramid.named_children() if name.startswith("fpn_")}
    assert len(laterals) == 8
    reached = {}
    for name in sorted(LOSSES):
        model.zero_grad()
        losses = model(inputs)
        assert set(losses) == LOSSES
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())
        losses[name].backward()
        reached[name] = {part for part, module in trained_parts(model).items() if gradient(module)}
        assert all(gradient(module) > 0 for module in trunk.values()), name
        outputs = [m for n, m in laterals.items() if n.startswith("fpn_output")]
        assert all(gradient(m) > 0 for n, m in laterals.items() if n.startswith("fpn_lateral")), name
        assert sum(gradient(m) > 0 for m in outputs) >= 3, name
    of_masks = {"start", "to_mask", *(f"{path} {i}" for path in ("vertical", "horizontal") for i in (0, 1))}
    assert reached["loss_sharpmask_mask"] == {"embed", *of_masks}
    assert reached["loss_sharpmask_score"] == {"reduce", "templates", "predictors"}
    assert reached["loss_sharpmask_quality"] == {"embed", "quality"}
    model.zero_grad()
    sum(model(inputs).values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())
    assert all(gradient(module) > 0 for module in laterals.values())


def test_frozen_it_has_no_losses_and_no_gradients(cfg):
    cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = True
    generator, backbone = build(cfg).train(), PatchBackbone()
    generator.load_state_dict(generator.state_dict())
    assert not any(p.requires_grad for p in generator.parameters())
    image, gt = draw()
    images = images_of(image)
    (proposals,), losses = generator(images, backbone(images.tensor), [gt])
    assert losses == {}
    assert len(proposals)
    assert not proposals.objectness_logits.requires_grad
    assert not proposals.proposal_boxes.tensor.requires_grad


@pytest.mark.parametrize("objects", [[], [(0, 0, 3, 3)]])
@pytest.mark.parametrize("num_refinements", [0, 2])
def test_without_positives_the_mask_loss_is_nothing_but_attached(cfg, objects, num_refinements, storage):
    cfg.MODEL.SHARPMASK.FPN.NUM_REFINEMENTS = num_refinements
    generator, backbone = build(cfg).train(), PatchBackbone()
    examples = [draw(objects), draw([], (64, 96))]
    images = images_of(*(image for image, _ in examples))
    _, losses = generator(images, backbone(images.tensor), [gt for _, gt in examples])
    assert set(losses) == LOSSES
    assert losses["loss_sharpmask_mask"] == 0
    assert losses["loss_sharpmask_mask"].requires_grad
    assert losses["loss_sharpmask_score"] > 0
    assert losses["loss_sharpmask_quality"] > 0
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    # DistributedDataParallel waits for all of them.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
    assert gradient(generator.decoder.start) == 0
    assert gradient(generator.scores) > 0
    assert all(p.grad.any() for p in backbone.parameters())
    assert storage.latest()["sharpmask/num_positives"][0] == 0


def test_without_any_window_the_losses_are_zero(cfg):
    cfg.MODEL.SHARPMASK.GENERATOR.WINDOWS_PER_IMAGE = 0
    generator, backbone = build(cfg).train(), PatchBackbone()
    image, gt = draw()
    images = images_of(image)
    _, losses = generator(images, backbone(images.tensor), [gt])
    assert [loss.item() for loss in losses.values()] == [0, 0, 0]
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in generator.parameters())


def test_losses_carry_the_configured_weights(cfg):
    image, gt = draw()
    images = images_of(image)
    features = PatchBackbone()(images.tensor)
    found = []
    for weights in ((1.0, 1.0, 1.0), (5.0, 3.0, 2.0)):
        sharpmask = cfg.MODEL.SHARPMASK
        sharpmask.MASK_LOSS_WEIGHT, sharpmask.SCORE_LOSS_WEIGHT, sharpmask.FPN.QUALITY_LOSS_WEIGHT = weights
        torch.manual_seed(0)
        found.append(build(cfg).train()(images, features, [gt])[1])
    for name, factor in zip(("mask", "score", "quality"), (5, 3, 2)):
        name = f"loss_sharpmask_{name}"
        torch.testing.assert_close(found[1][name], factor * found[0][name])


def test_without_quality_there_is_no_loss_of_it(cfg):
    cfg.MODEL.SHARPMASK.FPN.QUALITY = False
    generator, backbone = build(cfg).train(), PatchBackbone()
    image, gt = draw()
    images = images_of(image)
    _, losses = generator(images, backbone(images.tensor), [gt])
    assert set(losses) == LOSSES - {"loss_sharpmask_quality"}


def test_under_autocast_losses_are_nearly_those_of_full_precision(cfg):
    generator, backbone = build(cfg).train(), PatchBackbone()
    # All windows, so that nothing is drawn.
    generator.sampler.windows_per_image = 100000
    image, gt = draw()
    images = images_of(image)
    losses = generator(images, backbone(images.tensor), [gt])[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (proposals,), found = generator(images, backbone(images.tensor), [gt])
    for name in LOSSES:
        torch.testing.assert_close(found[name], losses[name], atol=0, rtol=0.03)
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in generator.parameters())
    assert all(gradient(module) > 0 for module in (generator.scores, generator.decoder, backbone))
    assert proposals.objectness_logits.dtype == torch.float32


@pytest.mark.parametrize("kind", ["bitmap", "polygon"])
def test_a_few_steps_on_two_images_find_their_objects(cfg, kind):
    cfg.MODEL.SHARPMASK.EMBED_DIM = 32
    cfg.MODEL.SHARPMASK.MASK_LOSS_WEIGHT = 4.0
    cfg.MODEL.SHARPMASK.GENERATOR.WINDOWS_PER_IMAGE = 64
    cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = ["f8", "f16", "f32"]
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 0
    model = build_model(cfg)
    # A disc in one, a rectangle in the other, which are canonical in windows of 112 and 80 pixels.
    examples = [draw([], (112, 128), kind=kind, seed=2), draw([(30, 30, 76, 70)], (96, 112), kind=kind, seed=3)]
    ys, xs = np.mgrid[:112, :128] + 0.5
    disc = torch.tensor((ys - 56) ** 2 + (xs - 72) ** 2 < 32**2)
    image, gt = examples[0]
    image[0, disc] += 2
    gt = Instances((112, 128), gt_boxes=Boxes(torch.tensor([[40.0, 24.0, 104.0, 88.0]])))
    angles = np.arange(48) * (2 * np.pi / 48)
    polygon = np.stack([72 + 32 * np.cos(angles), 56 + 32 * np.sin(angles)], axis=1).ravel()
    gt.gt_masks = BitMasks(disc[None]) if kind == "bitmap" else PolygonMasks([[polygon]])
    examples[0] = image, gt
    rectangle = torch.zeros(96, 112, dtype=torch.bool)
    rectangle[30:70, 30:76] = True
    inputs = inputs_of(*examples)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for _ in range(60):
        losses = model.train()(inputs)
        history.append(sum(losses.values()).item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert np.mean(history[-5:]) < 0.5 * np.mean(history[:2])
    with torch.no_grad():
        outputs = model.eval()([{"image": x["image"]} for x in inputs])
    for output, expected in zip(outputs, (disc, rectangle)):
        found = output["proposals"].proposal_masks.paste(0)[0]
        assert (found & expected).sum() / (found | expected).sum() > 0.7


# ------------------------------------------------------------------------------------------------------------------ batches


def assert_same(found, expected):
    """The same windows with the same scores, boxes and masks, in any order of equals."""
    assert len(found) == len(expected) > 0
    assert found.image_size == expected.image_size
    torch.testing.assert_close(found.objectness_logits, expected.objectness_logits, atol=1e-4, rtol=1e-4)
    rows = [{tuple(w): n for n, w in enumerate(p.proposal_masks.windows.tolist())} for p in (found, expected)]
    assert rows[0].keys() == rows[1].keys()
    order = torch.tensor([rows[0][window] for window in rows[1]])
    found, expected = found[order], expected[torch.tensor(list(rows[1].values()))]
    torch.testing.assert_close(found.objectness_logits, expected.objectness_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.proposal_boxes.tensor, expected.proposal_boxes.tensor, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.proposal_masks.logits, expected.proposal_masks.logits, atol=1e-4, rtol=1e-4)


def test_the_generator_gives_images_of_a_padded_batch_the_proposals_they_have_alone(cfg):
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 200
    generator, backbone = build(cfg).eval(), PatchBackbone().eval()
    singles = [noise(3, *size, seed=i) for i, size in enumerate([(96, 128), (61, 150), (130, 45)])]

    def run(*images):
        images = images_of(*images)
        with torch.no_grad():
            features = backbone(images.tensor)
            return generator(images, features)[0]

    together = run(*singles)
    for image, found in zip(singles, together):
        assert found.image_size == tuple(image.shape[1:])
        assert_same(found, run(image)[0])


def test_the_network_gives_images_of_a_batch_the_proposals_they_have_alone(cfg):
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 100
    model = build_model(with_fpn(cfg)).eval()
    images = [127 + 50 * noise(3, *size, seed=i) for i, size in enumerate([(96, 128), (70, 90), (96, 128)])]
    inputs = [{"image": image} for image in images]
    # The frame of the original image may be another.
    inputs[1].update(height=140, width=270)
    with torch.no_grad():
        together = model(inputs)
        for x, found in zip(inputs, together):
            (expected,) = model([x])
            assert_same(found["proposals"], expected["proposals"])
    assert [x["proposals"].image_size for x in together] == [(96, 128), (140, 270), (96, 128)]
    for x, found in zip(inputs, together):
        proposals = found["proposals"]
        scores, boxes = proposals.objectness_logits, proposals.proposal_boxes.tensor
        assert (scores.diff() <= 0).all()
        height, width = proposals.image_size
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        torch.testing.assert_close(boxes, proposals.proposal_masks.boxes().tensor)
        assert {"image", *(("height", "width") if "height" in x else ())} == set(x)


@pytest.mark.parametrize("size", [(192, 384), (48, 64)])
def test_proposals_in_the_original_image_are_those_of_the_resized_one_in_another_frame(cfg, size):
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 100
    model = build_model(with_fpn(cfg)).eval()
    image = 127 + 50 * noise(3, 96, 128)
    with torch.no_grad():
        plain = model([{"image": image}])[0]["proposals"]
        found = model([{"image": image, "height": size[0], "width": size[1]}])[0]["proposals"]
    expected = rescale_proposals(plain, *size)
    assert found.image_size == size
    assert len(plain) > 50
    by_window = dict(zip(map(tuple, expected.proposal_masks.windows.tolist()), range(len(expected))))
    order = [by_window[tuple(window)] for window in found.proposal_masks.windows.tolist()]
    # Those of a few pixels may have none in one of the frames.
    assert len(set(order)) == len(found) >= 0.95 * len(plain)
    assert torch.equal(found.proposal_boxes.tensor, expected.proposal_boxes.tensor[order])
    assert found.proposal_masks.rle() == expected.proposal_masks[order].rle()
    torch.testing.assert_close(found.objectness_logits, expected.objectness_logits[order])


def test_suppression_leaves_out_boxes_that_overlap(cfg):
    images = images_of(noise(3, 96, 128))
    features = PatchBackbone()(images.tensor)
    generator = build(cfg).eval()
    generator.num_proposals = 50
    (everything,), _ = generator(images, features)
    generator.nms_thresh = 0.3
    (kept,), _ = generator(images, features)
    assert 0 < len(kept) < len(everything)
    assert kept.objectness_logits[0] == everything.objectness_logits[0]
    boxes = kept.proposal_boxes
    overlaps = pairwise_iou(boxes, boxes).fill_diagonal_(0)
    assert overlaps.max() <= 0.3


def test_keys_of_stability_and_of_mask_nms_lower_scores(cfg):
    images = images_of(noise(3, 96, 128))
    features = PatchBackbone()(images.tensor)
    test = cfg.MODEL.SHARPMASK.TEST
    found = {}
    for test.MASK_STABILITY, test.MASK_NMS in itertools.product((False, True), repeat=2):
        torch.manual_seed(0)
        (proposals,), _ = build(cfg).eval()(images, features)
        windows = proposals.proposal_masks.windows.tolist()
        probabilities = proposals.objectness_logits.double().sigmoid().tolist()
        stability = mask_stability(proposals.proposal_masks).tolist()
        found[test.MASK_STABILITY, test.MASK_NMS] = {tuple(w): p for w, p in zip(windows, probabilities)}
    plain, stable = found[False, False], found[True, False]
    assert list(plain) != list(stable)
    factors = dict(zip(map(tuple, windows), stability))
    assert {w: p * factors[w] for w, p in plain.items()} == pytest.approx(stable, rel=1e-3)
    for without, lowered in ((plain, found[False, True]), (stable, found[True, True])):
        assert without.keys() == lowered.keys()
        assert all(lowered[w] <= p * (1 + 1e-5) for w, p in without.items())
        assert any(lowered[w] < 0.9 * p for w, p in without.items())


# ----------------------------------------------------------------------------------------------------------------- sampling


def balance(labels, groups, scores, **options):
    options = {"num_windows": 40, "positive_fraction": 0.25, "hard_fraction": 0.5, **options}
    return balance_windows(torch.tensor(labels), torch.tensor(groups), torch.tensor(scores), **options)


def drawn_windows(positive=30, negative=500, ignored=200):
    draws = np.random.default_rng(0)
    labels = draws.permutation([1] * positive + [0] * negative + [-1] * ignored)
    return labels.tolist(), draws.integers(0, 3, len(labels)).tolist(), draws.normal(size=len(labels)).tolist()


@pytest.mark.parametrize(
    ("positive", "negative", "num_windows", "expected"),
    [
        (30, 500, 40, (10, 30)),
        (4, 500, 40, (4, 36)),
        (30, 12, 40, (10, 12)),
        (0, 500, 40, (0, 40)),
        (30, 0, 40, (10, 0)),
        (0, 0, 40, (0, 0)),
        (30, 500, 0, (0, 0)),
        (3, 5, 1000, (3, 5)),
    ],
)
def test_windows_that_pay_are_as_many_as_asked_for(positive, negative, num_windows, expected):
    torch.manual_seed(0)
    labels, groups, scores = drawn_windows(positive, negative)
    for hard_fraction in (0.0, 0.5, 1.0):
        positives, negatives = balance(labels, groups, scores, num_windows=num_windows, hard_fraction=hard_fraction)
        assert (len(positives), len(negatives)) == expected
        assert all(labels[n] == 1 for n in positives.tolist())
        assert all(labels[n] == 0 for n in negatives.tolist())
        assert len({*positives.tolist(), *negatives.tolist()}) == sum(expected)


def test_hard_negatives_are_those_of_highest_score():
    labels, groups, scores = drawn_windows()
    # Ignored and positive windows score higher than any negative.
    scores = [score + (0 if label == 0 else 100) for label, score in zip(labels, scores)]
    ranked = sorted((n for n, label in enumerate(labels) if label == 0), key=lambda n: -scores[n])
    often = Counter()
    torch.manual_seed(0)
    for _ in range(20):
        _, negatives = balance(labels, groups, scores)
        assert set(ranked[:15]) <= set(negatives.tolist())
        assert len(set(negatives.tolist()) & set(ranked[15:])) == 15
        often.update(negatives.tolist())
    # The rest are drawn anew.
    assert len(often) > 100
    _, negatives = balance(labels, groups, scores, hard_fraction=1.0)
    assert sorted(negatives.tolist()) == sorted(ranked[:30])


def test_negatives_are_drawn_in_equal_shares_of_levels():
    torch.manual_seed(0)
    # There are sixteen times as many windows on a level as on the next coarser but one.
    groups = [0] * 6400 + [1] * 1600 + [2] * 400
    counts, positives_drawn = Counter(), Counter()
    for _ in range(60):
        # Scores are high on the first level, where the hard ones are.
        positives, negatives = balance(
            [0, 0, 0, 1] * 2100,
            groups,
            [5.0 if g == 0 else -5.0 for g in groups],
            num_windows=80,
            hard_fraction=0.25,
        )
        assert (len(positives), len(negatives)) == (20, 60)
        hard = 15
        drawn = Counter(groups[n] for n in negatives.tolist())
        counts.update({0: drawn[0] - hard, 1: drawn[1], 2: drawn[2]})
        positives_drawn.update(positives.tolist())
    # 45 each time, 15 of each level.
    assert sum(counts.values()) == 60 * 45
    assert all(0.29 < count / sum(counts.values()) < 0.375 for count in counts.values())
    assert max(positives_drawn.values()) < 8


def test_a_level_that_runs_out_leaves_its_share_to_the_others():
    torch.manual_seed(0)
    _, negatives = balance([0] * 105, [0] * 100 + [1] * 5, [0.0] * 105, num_windows=60, hard_fraction=0.0)
    assert len(set(negatives.tolist())) == 60
    assert sum(n >= 100 for n in negatives.tolist()) == 5


# ------------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["IN_FEATURES", ["f4", "p9"]], r"IN_FEATURES: the backbone has no \['p9'\], .*'f32'"),
        (["WINDOW_CELLS", [5, 6]], r"WINDOW_CELLS is \[5, 6\]: .*odd"),
        (["IN_FEATURES", ["f4", "f16"]], r"IN_FEATURES: .* strides are \[4, 16, 32\], .*twice"),
        (["IN_FEATURES", ["f8", "f4"]], r"IN_FEATURES: .* strides are \[8, 4, 8\], .*twice"),
        (["IN_FEATURES", ["f4", "wide"]], r"IN_FEATURES: .* channels, \[6, 9\]"),
    ],
)
def test_what_does_not_fit_is_named(cfg, options, message):
    options[0] = f"MODEL.SHARPMASK.FPN.{options[0]}"
    cfg.merge_from_list(options)
    shapes = {**PatchBackbone().output_shape(), "wide": ShapeSpec(channels=9, stride=8)}
    with pytest.raises(ValueError, match=message):
        build_proposal_generator(cfg, shapes)


def test_training_without_masks_is_named(cfg):
    generator, backbone = build(cfg).train(), PatchBackbone()
    image, gt = draw(kind="none")
    images = images_of(image)
    features = backbone(images.tensor)
    with pytest.raises(ValueError, match=r"without gt_masks: set MODEL\.MASK_ON"):
        generator(images, features, [gt])
    with pytest.raises(ValueError, match="needs the ground truth of every image"):
        generator(images, features)
    model = build_model(cfg).train()
    with pytest.raises(ValueError, match=r"without gt_masks: set MODEL\.MASK_ON"):
        model(inputs_of((image, gt)))


@pytest.mark.parametrize("num_refinements", [0, 1, 2])
def test_masks_double_with_every_refinement(cfg, num_refinements):
    cfg.MODEL.SHARPMASK.FPN.NUM_REFINEMENTS = num_refinements
    generator, backbone = build(cfg).eval(), PatchBackbone()
    images = images_of(noise(3, 64, 96))
    (proposals,), _ = generator(images, backbone(images.tensor))
    assert proposals.proposal_masks.logits.shape[1:] == (14 * 2**num_refinements,) * 2
    assert 0 < len(proposals) <= cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS
    assert not proposals.proposal_masks.logits.requires_grad


def test_a_backbone_of_one_level_will_do(cfg):
    cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = ["f16"]
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 0
    generator, backbone = build(cfg).train(), PatchBackbone()
    image, gt = draw()
    images = images_of(image)
    (proposals,), losses = generator(images, backbone(images.tensor), [gt])
    assert len(proposals)
    assert losses["loss_sharpmask_mask"] > 0
    assert all(loss.isfinite() for loss in losses.values())


def test_a_trunk_and_its_pyramid_give_the_features_of_both():
    torch.manual_seed(0)
    trunk = OverlappingTrunk()
    both = TrunkAndPyramid(trunk=trunk, in_features=list(STRIDES), out_channels=5, norm="", fuse_type="sum").eval()
    x = noise(1, 3, 64, 96)
    with torch.no_grad():
        features, expected = both(x), trunk(x)
    assert set(features) == {*STRIDES, "p2", "p3", "p4", "p5"} == set(both.output_shape())
    assert all(torch.equal(features[name], expected[name]) for name in STRIDES)
    for name, shape in both.output_shape().items():
        assert features[name].shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)
    assert both.size_divisibility == 32
    # The pyramid learns and so does the trunk under it, once.
    assert sum(p is q for p in both.parameters() for q in trunk.parameters()) == len(list(trunk.parameters()))
    sum(both(x)[name].sum() for name in ("p2", "p5")).backward()
    assert all(p.grad is not None for p in trunk.parameters())


# ---------------------------------------------------------------------------------------------------------------- detectors


def detector_cfg(cfg, roi_heads):
    """GeneralizedRCNN on a small pyramid, whose proposals SharpMaskFPN makes."""
    with_fpn(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.ROI_HEADS.NAME = roi_heads
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 4
    return cfg


@pytest.mark.parametrize("roi_heads", ["StandardROIHeads", "ProposalMaskROIHeads"])
def test_a_detector_trains_it_along_and_infers(cfg, roi_heads):
    model = build_model(detector_cfg(cfg, roi_heads)).train()
    inputs = inputs_of(draw(), draw([], (80, 100)))
    losses = model(inputs)
    assert LOSSES | {"loss_cls", "loss_box_reg"} <= set(losses)
    assert ("loss_mask" in losses) == (roi_heads == "StandardROIHeads")
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_sharpmask_mask"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.proposal_generator.parameters())
    assert gradient(model.backbone) > 0
    proposed = []
    model.eval().proposal_generator.register_forward_hook(lambda module, args, out: proposed.extend(out[0]))
    with torch.no_grad():
        outputs = model([{"image": x["image"]} for x in inputs])
    assert len(outputs) == 2
    for output, x, proposals in zip(outputs, inputs, proposed):
        found = output["instances"]
        assert found.image_size == tuple(x["image"].shape[1:])
        assert len(found)
        assert found.pred_masks.shape == (len(found), *found.image_size)
        if roi_heads == "ProposalMaskROIHeads":
            # Every mask is one of the proposals', pixel by pixel.
            pasted = {mask.numpy().tobytes() for mask in proposals.proposal_masks.paste()}
            assert {mask.numpy().tobytes() for mask in found.pred_masks} <= pasted


def test_in_training_a_detector_s_proposals_have_no_masks(cfg):
    generator, backbone = build(cfg).train(), PatchBackbone()
    image, gt = draw()
    images = images_of(image)
    (proposals,), _ = generator(images, backbone(images.tensor), [gt])
    assert set(proposals.get_fields()) == {"proposal_boxes", "objectness_logits"}
    (evaluation,), _ = generator.eval()(images, backbone(images.tensor))
    torch.testing.assert_close(proposals.objectness_logits, evaluation.objectness_logits)
    assert evaluation.has("proposal_masks")


def test_a_detector_survives_images_without_proposals(cfg):
    model = build_model(detector_cfg(cfg, "StandardROIHeads"))
    # Every mask is empty.
    nn.init.constant_(model.proposal_generator.decoder.to_mask.bias, -1e6)
    inputs = inputs_of(draw())
    losses = model.train()(inputs)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        assert len(model.eval()([{"image": inputs[0]["image"]}])[0]["instances"]) == 0


# ------------------------------------------------------------------------------------------------------- order of windows


@pytest.mark.parametrize("thresh", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("count", [3, 8, 25, 100])
def test_windows_beside_a_better_one_step_back(thresh, steps, count):
    generator = torch.Generator().manual_seed(4)
    corners = torch.rand(40, 2, generator=generator) * 20
    # Alike in size, and where there are steps of 1.5 some pairs differ too much to overlap by 0.6, but none by 0.3.
    sides = steps ** (torch.arange(40) % 3)[:, None] * (10 + torch.rand(40, 2, generator=generator))
    windows = torch.cat([corners, corners + sides], dim=1)
    overlaps = pairwise_iou(Boxes(windows), Boxes(windows))
    stay = []
    for i in range(40):
        if all(overlaps[i, j] <= thresh for j in stay):
            stay.append(i)
    expected = stay + [i for i in range(40) if i not in stay]
    assert spread(windows, torch.linspace(1, 0, 40), thresh, count).tolist() == expected[:count]
    assert (len(stay) == 40) == (thresh == 1.0)
    assert len(spread(windows[:0], torch.zeros(0), thresh, count)) == 0


def test_proposals_are_spread_before_masks_are_made(cfg):
    images = images_of(noise(3, 96, 128))
    features = PatchBackbone()(images.tensor)
    generator = build(cfg).eval()
    # Every mask is full: none is left out.
    generator.num_proposals, generator.mask_threshold, generator.window_nms_thresh = 40, -1e6, 0.5
    with torch.no_grad():
        pyramid = generator.pyramid(images.image_sizes, features)
        (proposals,) = generator.propose(pyramid, images.image_sizes)
    # Four times as many windows as proposals are looked at.
    scores, best = pyramid.scores[0].topk(160)
    windows = generator.geometry.windows(generator.geometry.cells(best, pyramid.sizes))
    first = spread(windows, scores, 0.5, 40)
    assert first.tolist() != list(range(40))
    found = {tuple(window) for window in proposals.proposal_masks.windows.tolist()}
    assert found == {tuple(window) for window in windows[first].tolist()}
