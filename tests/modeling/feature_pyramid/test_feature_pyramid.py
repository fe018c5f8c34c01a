"""SharpMask on a feature pyramid: compared with slow definitions, on windows cut out of the image, in training, and in detectors."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import itertools
import math

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks, pairwise_iou
from detectron2.utils.events import EventStorage
from drawing import draw_example, gradient
from sharpmask_d2.modeling.backbone.detector import TrunkAndPyramid
from sharpmask_d2.modeling.feature_pyramid.feature_table import FeatureTable
from sharpmask_d2.modeling.feature_pyramid.grid import spread
from sharpmask_d2.modeling.segment_generator import Windows
from sharpmask_d2.structures import rescale_proposals
from sharpmask_d2.structures.mask_stability import mask_stability
from sharpmask_d2.windows.geometry import pyramid_sizes
from torch import nn

# Larger side of an object as a share of the side of its canonical window.
SHARE = 0.8
# Shift, as a share of the side of the window, and octaves from which the target of a score is 0.
NEGATIVE = 32 / 115, 1.0
STRIDES = {"f4": 4, "f8": 8, "f16": 16, "f32": 32}
KINDS = [5, 7]
LOSSES = {f"loss_sharpmask_{name}" for name in ("mask", "dice", "side", "score")}
# x0, y0, x1, y1. Windows of 28 pixels (7 cells of stride 4), 40, 56 and 80 pixels are canonical for sides of 22, 32, 45 and 64 pixels.
OBJECTS = [(8, 10, 31, 33), (60, 6, 92, 30), (20, 60, 66, 100), (80, 40, 130, 104)]


def randomise(module, *, biased=True):
    """Draws weights with a fixed seed that are large enough for different inputs to give different outputs."""
    draws = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter.data, std=1.4 / math.sqrt(parameter[0].numel()), generator=draws)
        elif biased and name.endswith("bias"):
            nn.init.normal_(parameter.data, std=0.2, generator=draws)
    return module


class PatchBackbone(Backbone):
    """Convolutions without overlap and without bias: a feature depends on its own pixels only, and black pixels give features of zero."""

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
    """A trunk whose features also depend on pixels outside their cells."""

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
    """The config of a stand-alone network on the backbone without overlap."""
    cfg = tiny_cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "SegmentProposalNetwork"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMaskFPN"
    cfg.MODEL.BACKBONE.NAME = "build_patch_backbone"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.PIXEL_MEAN = [127.5] * 3
    cfg.MODEL.PIXEL_STD = [50.0] * 3
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.GENERATOR.FROZEN = False
    sharpmask.FPN.IN_FEATURES = list(STRIDES)
    sharpmask.FPN.EXTRA_LEVELS = 1
    sharpmask.FPN.SCORE_CHANNELS = 8
    sharpmask.FPN.WINDOW_NMS_THRESH = 1.0
    # Masks are decoded in the windows whose scores were computed.
    sharpmask.FPN.MASK_WINDOW = 1.0
    torch.manual_seed(0)
    return cfg


@pytest.fixture(autouse=True)
def storage():
    with EventStorage() as storage:
        yield storage


def with_fpn(cfg):
    """Replaces the backbone by Detectron2's feature pyramid on ResNet-18, in place."""
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
    """Builds a generator on the backbone without overlap, with random weights and biases."""
    return randomise(build_proposal_generator(cfg, PatchBackbone().output_shape()))


def draw(objects=OBJECTS, size=(112, 144), kind="polygon", seed=0):
    return draw_example(objects, size, kind=kind, seed=seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images_of(*images):
    return ImageList.from_tensors(list(images), PatchBackbone().size_divisibility)


def slow_cells(size, strides):
    """Counts, one by one, the cells of each level that lie at least partly in the image: [(rows, columns), ...]."""
    return [tuple(sum(1 for n in range(side) if n * stride < side) for side in size) for stride in strides]


def slow_places(grids, strides, kinds=KINDS):
    """Yields level, kind, y, x and the window in pixels of every window, in the order of `PyramidFeatures.scores`."""
    for level, (rows, columns) in enumerate(grids):
        for kind, cells in enumerate(kinds):
            for y in range(rows):
                for x in range(columns):
                    cx, cy = (x + x + 1) * strides[level] / 2, (y + y + 1) * strides[level] / 2
                    half = cells * strides[level] / 2
                    yield level, kind, y, x, [cx - half, cy - half, cx + half, cy + half]


def propose_these(generator, pyramid, image_sizes, places):
    """Computes the proposals of given windows of each image, regardless of their scores. Every mask is full, so that no window is left out.

    Returns:
        For each image, a dict of window -> (objectness logit, mask logits).
    """
    scores = torch.full_like(pyramid.scores, -math.inf)
    for number, chosen in enumerate(places):
        scores[number, chosen] = pyramid.scores[number, chosen]
    generator.num_proposals, generator.mask_threshold = max(len(chosen) for chosen in places), -1e6
    with torch.no_grad():
        proposals = generator.propose(pyramid._replace(scores=scores))
    return [
        {
            tuple(window): (score, mask)
            for window, score, mask in zip(
                p.proposal_masks.windows.tolist(), p.objectness_logits, p.proposal_masks.logits
            )
        }
        for p in proposals
    ]


# ---------------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 1), (1, 1)), ((64, 65), (8, 9)), ((63, 129), (8, 17)), ((7, 8), (1, 1))]
)
def test_sizes_of_levels_count_cells_that_lie_partly_in_the_image(size, expected):
    assert pyramid_sizes(size, [8]) == [expected]
    strides = [4, 8, 16, 32, 64, 128]
    assert pyramid_sizes(size, strides) == slow_cells(size, strides)


def test_every_score_belongs_to_the_window_that_loops_find(cfg):
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 2
    generator, backbone = build(cfg).eval(), PatchBackbone()
    strides = [4, 8, 16, 32, 64, 128]
    assert generator.strides == strides
    sizes = [(90, 141), (61, 40)]
    images = images_of(*(noise(3, *size) for size in sizes))
    with torch.no_grad():
        pyramid = generator.encode(images.image_sizes, backbone(images.tensor))
    # The maps cover the padded batch of 96 x 160 pixels.
    assert pyramid.sizes == [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    slow = list(slow_places(pyramid.sizes, strides))
    assert pyramid.scores.shape == (2, len(slow))
    cells = generator.geometry.cells(torch.arange(len(slow)), pyramid.sizes)
    assert [tuple(row) for row in torch.stack(cells, dim=1).tolist()] == [place[:4] for place in slow]
    assert generator.geometry.windows(cells).dtype == torch.float32
    assert generator.geometry.windows(cells).tolist() == [place[4] for place in slow]
    # The numbers of the windows may have any order.
    order = torch.randperm(len(slow), generator=torch.Generator().manual_seed(0))
    shuffled = generator.geometry.cells(order, pyramid.sizes)
    assert all(torch.equal(a, b[order]) for a, b in zip(shuffled, cells))
    for number, size in enumerate(sizes):
        own = slow_cells(size, strides)
        assert pyramid.tables.features.extents[number].tolist() == [list(x) for x in own]
        inside = [y < own[level][0] and x < own[level][1] for level, _, y, x, _ in slow]
        assert pyramid.scores[number].isfinite().tolist() == inside
        assert 0 < sum(inside) < len(inside)


def test_coarser_levels_are_means_of_the_cells_that_lie_in_the_image(cfg):
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 2
    # There are 5 x 7 cells of stride 32. The second image has 3 x 6 of them, and the features outside it are not zero.
    sizes = [(160, 224), (90, 170)]
    features = {name: x.detach() for name, x in PatchBackbone()(noise(2, 3, 160, 224)).items()}
    with torch.no_grad():
        levels = build(cfg).encode(sizes, features).levels
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


@pytest.mark.parametrize("size", [1, 4, 9])
def test_samples_of_windows_equal_those_of_loops(size):
    maps = table_maps()
    draws = np.random.default_rng(0)
    images, levels = draws.integers(0, 3, (2, 30))
    centres, sides = draws.uniform(-8, 48, (30, 2)), draws.uniform(2, 60, (30, 2))
    # Many windows lie partly outside the image, and one lies wholly outside.
    windows = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    windows[0] = 200, 200, 220, 220
    sampled = FeatureTable.from_maps(maps, EXTENTS, STRIDES_OF_TABLE).sample(
        torch.tensor(images), torch.tensor(levels), torch.tensor(windows, dtype=torch.float32), size
    )
    assert sampled.shape == (30, 3, size, size)
    expected = torch.zeros(30, 3, size, size)
    for n, (x0, y0, x1, y1) in enumerate(windows):
        image, level = int(images[n]), int(levels[n])
        for i, j in itertools.product(range(size), repeat=2):
            # The unit is a cell of the level, and centres of cells lie at halves.
            x = (x0 + (j + 0.5) / size * (x1 - x0)) / STRIDES_OF_TABLE[level]
            y = (y0 + (i + 0.5) / size * (y1 - y0)) / STRIDES_OF_TABLE[level]
            near = itertools.product(*(range(math.floor(v) - 2, math.floor(v) + 3) for v in (y, x)))
            for row, column in near:
                weight = max(0, 1 - abs(x - column - 0.5)) * max(0, 1 - abs(y - row - 0.5))
                if weight:
                    expected[n, :, i, j] += weight * slow_cell(maps, image, level, row, column)[0]
    assert not sampled[0].any()
    torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=1e-4)


def test_samples_of_a_linear_ramp_are_their_positions_in_the_window():
    """The features are the coordinates of the centres of their cells, so that samples are the coordinates at which they are taken."""
    maps = []
    for stride, (rows, columns) in zip([4, 8], [(20, 24), (10, 12)]):
        ys, xs = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        maps.append(torch.stack([(xs + 0.5) * stride, (ys + 0.5) * stride])[None])
    table = FeatureTable.from_maps(maps, torch.tensor([[[20, 24], [10, 12]]]), [4, 8])
    windows = torch.tensor([[10.0, 21.0, 38.0, 63.0], [7.3, 12.9, 89.1, 70.2], [40.0, 40.0, 41.0, 41.0]])
    for level in (0, 1):
        sampled = table.sample(torch.zeros(3, dtype=torch.long), torch.full((3,), level), windows, 7)
        parts = (torch.arange(7) + 0.5) / 7
        for (x0, y0, x1, y1), (found_x, found_y) in zip(windows.tolist(), sampled):
            torch.testing.assert_close(found_x, (x0 + parts * (x1 - x0)).expand(7, 7), atol=1e-3, rtol=0)
            torch.testing.assert_close(found_y, (y0 + parts * (y1 - y0))[:, None].expand(7, 7), atol=1e-3, rtol=0)


def test_gradients_of_samples_reach_the_cells_that_they_are_taken_from():
    maps = [x.requires_grad_() for x in table_maps()]
    table = FeatureTable.from_maps(maps, EXTENTS, STRIDES_OF_TABLE)
    # Samples lie at the centres of cells, in columns -2 to 2 and rows 0 to 4. Three of either belong to the image.
    window = torch.tensor([[-16.0, 0.0, 24.0, 40.0]])
    table.sample(torch.tensor([1]), torch.tensor([1]), window, 5).sum().backward()
    assert maps[0].grad is None or not maps[0].grad.any()
    expected = torch.zeros_like(maps[1])
    expected[1, :, 0:3, 0:3] = 1
    torch.testing.assert_close(maps[1].grad, expected)


# --------------------------------------------------------------------------------------- windows that are cut out of the image


@pytest.mark.parametrize("kind", [0, 1])
def test_a_window_that_is_cut_out_of_the_image_keeps_its_score(cfg, kind):
    generator, backbone = build(cfg).eval(), PatchBackbone().eval()
    cells, strides = KINDS[kind], [4, 8, 16, 32, 64]
    image = noise(3, 512, 576)
    # One window of each level. The window of 7 cells of 64 pixels just fits into the image.
    chosen = {0: (12, 19), 1: (9, 13), 2: (11, 7), 3: (7, 11), 4: (4, 4)}

    def scores(image, places):
        images = images_of(image)
        with torch.no_grad():
            pyramid = generator.encode([tuple(image.shape[1:])], backbone(images.tensor))
        numbers = {place[:4]: number for number, place in enumerate(slow_places(pyramid.sizes, strides))}
        return pyramid.scores[0, [numbers[place] for place in places]]

    whole = scores(image, [(level, kind, y, x) for level, (y, x) in chosen.items()])
    assert whole.std() > 0.01
    for (level, (y, x)), expected in zip(chosen.items(), whole):
        half, side = cells // 2, cells * strides[level]
        x0, y0 = (x - half) * strides[level], (y - half) * strides[level]
        piece = image[:, y0 : y0 + side, x0 : x0 + side]
        assert piece.shape == (3, side, side)
        (score,) = scores(piece, [(level, kind, half, half)])
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)


def test_a_window_that_is_cut_out_of_a_black_image_keeps_its_mask(cfg):
    """All features outside the window are zero, in the black image as well as outside the image that is the window."""
    generator, backbone = build(cfg).eval(), PatchBackbone().eval()
    for path in (generator.decoder.horizontal_coarse, generator.decoder.horizontal_fine):
        for name, parameter in path.named_parameters():
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
                    pyramid = generator.encode([size], backbone(canvas[None]))
                numbers = {place[:4]: number for number, place in enumerate(slow_places(pyramid.sizes, strides))}
                y, x = (c // strides[level] + cells // 2 for c in corner)
                (found,) = propose_these(generator, pyramid, [size], [[numbers[level, kind, y, x]]])
                results += found.values()
            assert results[0][1].std() > 1e-3
            torch.testing.assert_close(results[1][1], results[0][1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ scores


def test_scores_depend_on_the_cells_of_their_windows_only(cfg):
    generator, backbone = build(cfg).eval(), PatchBackbone()
    # The second image is smaller than the maps of the batch, and the features outside it are not zero.
    sizes = [(96, 128), (50, 41)]
    features = {name: x.detach() for name, x in backbone(noise(2, 3, 96, 128)).items()}
    heads = generator.scores
    with torch.no_grad():
        pyramid = generator.encode(sizes, features)
        places = list(slow_places(pyramid.sizes, generator.strides))
        for number in range(2):
            inside = pyramid.scores[number].isfinite().nonzero()[:, 0]
            chosen = inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(2))[:60]].tolist()
            expected = []
            for n in chosen:
                level, kind, y, x, _ = places[n]
                rows, columns = pyramid.tables.features.extents[number, level].tolist()
                match, half = heads.templates[kind], KINDS[kind] // 2
                total = match.bias.clone()
                for i, j in itertools.product(range(-half, half + 1), repeat=2):
                    if 0 <= y + i < rows and 0 <= x + j < columns:
                        cell = heads.reduce(pyramid.levels[level][number, :, y + i, x + j, None, None])[:, 0, 0].relu()
                        total += match.weight[:, 0, i + half, j + half] * cell
                expected.append(heads.predictors[kind](total.relu()[:, None, None])[0, 0, 0])
            expected = torch.stack(expected)
            assert expected.std() > 1e-3
            torch.testing.assert_close(pyramid.scores[number, chosen], expected, atol=1e-5, rtol=1e-5)
    # Scores of the smaller image do not depend on the features outside it.
    for x in features.values():
        assert x[1, :, -1, -1].any()
    alone = generator.encode(
        sizes[1:], {name: x[1:, :, :13, :11] if name == "f4" else x[1:] for name, x in features.items()}
    )
    expected = pyramid.scores[1][pyramid.scores[1].isfinite()]
    torch.testing.assert_close(alone.scores[0][alone.scores[0].isfinite()], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask_window", [1.0, 1.5])
def test_proposals_are_the_windows_of_highest_score(cfg, mask_window):
    cfg.MODEL.SHARPMASK.FPN.MASK_WINDOW = mask_window
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 200
    # No mask is empty, and windows are decoded in several batches.
    cfg.MODEL.SHARPMASK.TEST.MASK_THRESHOLD = 1e-12
    cfg.MODEL.SHARPMASK.TEST.WINDOWS_PER_BATCH = 16
    generator, backbone = build(cfg).eval(), PatchBackbone()
    features = backbone(2 * noise(1, 3, 96, 128))
    ((proposals,), losses) = generator(images_of(noise(3, 96, 128)), features)
    assert losses == {}
    assert len(proposals) == 200
    found = proposals.objectness_logits
    with torch.no_grad():
        pyramid = generator.encode([(96, 128)], features)
    expected, best = pyramid.scores[0].sort(descending=True)
    assert np.ptp(found.tolist()) > 0.5
    torch.testing.assert_close(found, expected[:200])
    places = list(slow_places(pyramid.sizes, generator.strides))
    windows = torch.tensor([places[n][4] for n in best[:200].tolist()])
    centres, sides = (windows[:, :2] + windows[:, 2:]) / 2, (windows[:, 2:] - windows[:, :2]) * mask_window
    torch.testing.assert_close(
        proposals.proposal_masks.windows, torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    )
    # The two kinds of windows are mixed, so that an order by kind would be noticed.
    kinds = [places[n][1] for n in best[:200].tolist()]
    assert sum(a != b for a, b in zip(kinds, kinds[1:])) > 10


# ---------------------------------------------------------------------------------------------------------------- training


def learning_examples():
    """Two images of different sizes, one with polygons and one with bitmaps."""
    return [draw(), draw([(5, 10, 37, 35), (50, 6, 90, 52)], (64, 96), kind="bitmap", seed=1)]


def slow_target_of_score(window, boxes):
    """The target for the nearest object: 1 up to a quarter of the distance from which it is 0, and linear in between."""
    side, target = window[2] - window[0], 0.0
    for x0, y0, x1, y1 in boxes:
        octaves = abs(math.log2(side * SHARE / max(x1 - x0, y1 - y0)))
        dx, dy = (window[0] + window[2] - x0 - x1) / 2, (window[1] + window[3] - y0 - y1) / 2
        distance = max(max(abs(dx), abs(dy)) / side / NEGATIVE[0], octaves / NEGATIVE[1])
        target = max(target, min(1.0, (1 - distance) / 0.75))
    return target


# With these windows no edge of an object halves a cell, whose target could be either.
@pytest.mark.parametrize("mask_window", [1.03, 1.07])
def test_losses_cover_all_scores_and_the_masks_of_windows_around_the_objects(cfg, mask_window):
    fpn = cfg.MODEL.SHARPMASK.FPN
    fpn.MASK_WINDOW = mask_window
    # Without jitter all windows are canonical windows. Objects have equally many, because 8 is a multiple of their number.
    fpn.MASK_JITTER_SHIFT = fpn.MASK_JITTER_OCTAVES = 0.0
    fpn.MASK_WINDOWS_PER_IMAGE = 8
    generator, backbone = build(cfg).train(), PatchBackbone()
    examples = learning_examples()
    images = images_of(*(image for image, _ in examples))
    features = backbone(images.tensor)
    _, losses = generator(images, features, [gt for _, gt in examples])
    assert set(losses) == LOSSES
    with torch.no_grad():
        pyramid = generator.encode(images.image_sizes, features)
    places = list(slow_places(pyramid.sizes, generator.strides))
    score_loss = total = 0.0
    mask_terms, dice_terms, kinds = [], [], set()
    for number, (_, gt) in enumerate(examples):
        boxes = gt.gt_boxes.tensor.tolist()
        for place, score in zip(places, pyramid.scores[number].tolist()):
            if score > -math.inf:
                target = slow_target_of_score(place[4], boxes)
                score_loss += bce(score, target) * (target - 1 / (1 + math.exp(-score))) ** 2
                total += target
                kinds.add("between" if 0 < target < 1 else target)
        for owner, (x0, y0, x1, y1) in enumerate(boxes):
            half = max(x1 - x0, y1 - y0) / SHARE * mask_window / 2
            cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
            window = [cx - half, cy - half, cx + half, cy + half]
            with torch.no_grad():
                (mask,) = generator.decode(pyramid, Windows(torch.tensor([window]), image=number))
            target = slow_target(gt, owner, window, len(mask)).float()
            terms = [bce(value, t) for value, t in zip(mask.flatten().tolist(), target.flatten().tolist())]
            p = mask.sigmoid()
            dice = 1 - (2 * (p * target).sum() + 1) / ((p**2).sum() + target.sum() + 1)
            # Every image has 8 windows.
            mask_terms += [np.mean(terms)] * (8 // len(boxes))
            dice_terms += [dice.item()] * (8 // len(boxes))
    assert kinds == {0, "between", 1}
    assert losses["loss_sharpmask_score"].item() == pytest.approx(score_loss / total, rel=1e-4)
    weight = cfg.MODEL.SHARPMASK.MASK_LOSS_WEIGHT
    assert losses["loss_sharpmask_mask"].item() == pytest.approx(weight * np.mean(mask_terms), rel=1e-5)
    assert losses["loss_sharpmask_dice"].item() == pytest.approx(np.mean(dice_terms), rel=1e-5)


def bce(value, target):
    return max(value, 0) - value * target + math.log1p(math.exp(-abs(value)))


def slow_target(gt, number, window, side):
    """The target mask of a rectangle in a window: cells of which at least half lies in the rectangle, computed one by one."""
    x0, y0, x1, y1 = gt.gt_boxes.tensor[number].tolist()
    cell = (window[2] - window[0]) / side
    target = torch.zeros(side, side, dtype=torch.bool)
    for i, j in itertools.product(range(side), repeat=2):
        left, top = window[0] + j * cell, window[1] + i * cell
        width = min(x1, left + cell) - max(x0, left)
        height = min(y1, top + cell) - max(y0, top)
        target[i, j] = width > 0 and height > 0 and width * height >= cell * cell / 2
    return target


def trained_parts(model):
    scores, decoder = model.proposal_generator.scores, model.proposal_generator.decoder
    return dict((*scores.named_children(), *decoder.named_children()))


def inputs_of(*examples):
    return [{"image": 127.5 + 50 * image, "instances": gt} for image, gt in examples]


def test_gradients_of_each_loss_reach_the_layers_that_it_trains(cfg):
    model = build_model(with_fpn(cfg)).train()
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
        assert all(gradient(m) > 0 for n, m in laterals.items() if n.startswith("fpn_lateral")), name
    of_encoding = {"embed", "start", "horizontal_coarse", "refine_coarse"}
    of_mask = of_encoding | {"horizontal_fine", "widen", "refine_fine"}
    assert reached["loss_sharpmask_mask"] == reached["loss_sharpmask_dice"] == of_mask | {"to_mask"}
    assert reached["loss_sharpmask_side"] == of_mask | {"side_masks", "coarse_mask"}
    assert reached["loss_sharpmask_score"] == {"reduce", "templates", "predictors"}
    model.zero_grad()
    sum(model(inputs).values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())
    assert all(gradient(module) > 0 for module in laterals.values())


def test_with_a_frozen_feed_forward_part_the_losses_train_the_decoder_alone(cfg):
    cfg.MODEL.SHARPMASK.FREEZE_FEEDFORWARD = True
    model = build_model(with_fpn(cfg)).train()
    losses = model(inputs_of(draw()))
    assert set(losses) == LOSSES - {"loss_sharpmask_score"}
    sum(losses.values()).backward()
    generator = model.proposal_generator
    assert not any(p.requires_grad or p.grad is not None for p in generator.scores.parameters())
    assert all(p.grad is not None and p.grad.any() for p in generator.decoder.parameters())


def test_a_frozen_generator_has_no_losses_and_no_gradients(cfg):
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
def test_without_objects_to_train_on_the_losses_of_masks_are_zero_with_gradients(cfg, objects, storage):
    generator, backbone = build(cfg).train(), PatchBackbone()
    examples = [draw(objects), draw([], (64, 96))]
    images = images_of(*(image for image, _ in examples))
    _, losses = generator(images, backbone(images.tensor), [gt for _, gt in examples])
    assert set(losses) == LOSSES
    assert losses["loss_sharpmask_score"] > 0
    for name in LOSSES - {"loss_sharpmask_score"}:
        assert losses[name] == 0
        assert losses[name].requires_grad
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    # DistributedDataParallel waits for the gradients of all parameters.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
    assert gradient(generator.decoder.start) == 0
    assert gradient(generator.scores) > 0
    assert all(p.grad.any() for p in backbone.parameters())
    assert storage.latest()["sharpmask/num_positives"][0] == 0


def test_losses_are_multiplied_by_the_configured_weights(cfg):
    image, gt = draw()
    images = images_of(image)
    features = PatchBackbone()(images.tensor)
    found = []
    for weights in ((1.0, 1.0), (5.0, 3.0)):
        sharpmask = cfg.MODEL.SHARPMASK
        sharpmask.MASK_LOSS_WEIGHT, sharpmask.SCORE_LOSS_WEIGHT = weights
        torch.manual_seed(0)
        found.append(build(cfg).train()(images, features, [gt])[1])
    for name, factor in {"mask": 5, "score": 3, "dice": 1, "side": 1}.items():
        name = f"loss_sharpmask_{name}"
        torch.testing.assert_close(found[1][name], factor * found[0][name])


def test_losses_under_autocast_are_close_to_those_of_full_precision(cfg):
    generator, backbone = build(cfg).train(), PatchBackbone()
    image, gt = draw()
    images = images_of(image)
    torch.manual_seed(0)
    losses = generator(images, backbone(images.tensor), [gt])[1]
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (proposals,), found = generator(images, backbone(images.tensor), [gt])
    for name in LOSSES:
        torch.testing.assert_close(found[name], losses[name], atol=0, rtol=0.03)
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in generator.parameters())
    assert all(gradient(module) > 0 for module in (generator.scores, generator.decoder, backbone))
    assert proposals.objectness_logits.dtype == torch.float32


@pytest.mark.parametrize("kind", ["bitmap", "polygon"])
def test_training_on_two_images_finds_their_objects(cfg, kind):
    cfg.MODEL.SHARPMASK.EMBED_DIM = 32
    cfg.MODEL.SHARPMASK.MASK_LOSS_WEIGHT = 4.0
    cfg.MODEL.SHARPMASK.FPN.MASK_WINDOWS_PER_IMAGE = 16
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 20
    cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = ["f8", "f16", "f32"]
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 0
    model = build_model(cfg)
    # One image shows a disc, the other a rectangle. Windows of 80 and of 58 pixels are canonical for them.
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
    for _ in range(40):
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
    """Asserts that windows, scores, boxes and masks are equal, in any order of windows of equal score."""
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


def test_proposals_of_the_generator_do_not_depend_on_the_other_images_of_a_padded_batch(cfg):
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


def test_proposals_of_the_network_do_not_depend_on_the_other_images_of_a_batch(cfg):
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 100
    model = build_model(with_fpn(cfg)).eval()
    images = [127 + 50 * noise(3, *size, seed=i) for i, size in enumerate([(96, 128), (70, 90), (96, 128)])]
    inputs = [{"image": image} for image in images]
    # The original image has another size.
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
def test_proposals_of_the_original_image_are_the_rescaled_proposals_of_the_resized_image(cfg, size):
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
    # Masks of a few pixels may be empty in one of the two images.
    assert len(set(order)) == len(found) >= 0.95 * len(plain)
    assert torch.equal(found.proposal_boxes.tensor, expected.proposal_boxes.tensor[order])
    assert found.proposal_masks.rle() == expected.proposal_masks[order].rle()
    torch.testing.assert_close(found.objectness_logits, expected.objectness_logits[order])


def test_suppression_removes_boxes_that_overlap(cfg):
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


def test_mask_stability_and_mask_nms_lower_scores(cfg):
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


# ------------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["IN_FEATURES", ["f4", "p9"]], r"IN_FEATURES: the backbone has no \['p9'\], .*'f32'"),
        (["WINDOW_CELLS", [5, 6]], r"WINDOW_CELLS is \[5, 6\]: .*odd"),
        (["IN_FEATURES", ["f4", "f16"]], r"IN_FEATURES: .* strides are \[4, 16, 32\], .*twice"),
        (["IN_FEATURES", ["f8", "f4"]], r"IN_FEATURES: .* strides are \[8, 4, 8\], .*twice"),
        (["IN_FEATURES", ["f4", "wide"]], r"IN_FEATURES: .* channels, \[6, 9\]"),
        (["LABELS.NEGATIVE_SHIFT", 0.0], r"LABELS\.NEGATIVE_SHIFT is 0\.0: it must be above 0"),
        (["LABELS.NEGATIVE_OCTAVES", 0.0], r"LABELS\.NEGATIVE_OCTAVES is 0\.0: it must be above 0"),
    ],
)
def test_errors_name_the_key_that_does_not_fit_the_backbone(cfg, options, message):
    options[0] = f"MODEL.SHARPMASK.FPN.{options[0]}"
    cfg.merge_from_list(options)
    shapes = {**PatchBackbone().output_shape(), "wide": ShapeSpec(channels=9, stride=8)}
    with pytest.raises(ValueError, match=message):
        build_proposal_generator(cfg, shapes)


def test_training_without_masks_is_an_error_that_names_the_key(cfg):
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


def test_masks_have_56_cells_along_a_side(cfg):
    generator, backbone = build(cfg).eval(), PatchBackbone()
    images = images_of(noise(3, 64, 96))
    (proposals,), _ = generator(images, backbone(images.tensor))
    assert proposals.proposal_masks.logits.shape[1:] == (56, 56)
    assert 0 < len(proposals) <= cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS
    assert not proposals.proposal_masks.logits.requires_grad


def test_a_single_level_is_enough(cfg):
    cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = ["f16"]
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 0
    generator, backbone = build(cfg).train(), PatchBackbone()
    image, gt = draw()
    images = images_of(image)
    (proposals,), losses = generator(images, backbone(images.tensor), [gt])
    assert len(proposals)
    assert losses["loss_sharpmask_mask"] > 0
    assert all(loss.isfinite() for loss in losses.values())


def test_a_trunk_with_a_pyramid_returns_the_features_of_both():
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
    # The trunk is trained through the pyramid, and its parameters are listed once.
    assert sum(p is q for p in both.parameters() for q in trunk.parameters()) == len(list(trunk.parameters()))
    sum(both(x)[name].sum() for name in ("p2", "p5")).backward()
    assert all(p.grad is not None for p in trunk.parameters())


# ---------------------------------------------------------------------------------------------------------------- detectors


def detector_cfg(cfg, roi_heads):
    """A GeneralizedRCNN on a small pyramid with SharpMaskFPN as its proposal generator."""
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
def test_a_detector_trains_the_generator_and_detects(cfg, roi_heads):
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
            # Every mask equals the mask of a proposal.
            pasted = {mask.numpy().tobytes() for mask in proposals.proposal_masks.paste()}
            assert {mask.numpy().tobytes() for mask in found.pred_masks} <= pasted


def test_proposals_have_no_masks_in_training(cfg):
    generator, backbone = build(cfg).train(), PatchBackbone()
    image, gt = draw()
    images = images_of(image)
    (proposals,), _ = generator(images, backbone(images.tensor), [gt])
    assert set(proposals.get_fields()) == {"proposal_boxes", "objectness_logits"}
    (evaluation,), _ = generator.eval()(images, backbone(images.tensor))
    torch.testing.assert_close(proposals.objectness_logits, evaluation.objectness_logits)
    assert evaluation.has("proposal_masks")


def test_a_detector_handles_images_without_proposals(cfg):
    model = build_model(detector_cfg(cfg, "StandardROIHeads"))
    # Every mask is empty.
    decoder = model.proposal_generator.decoder
    for layer in (decoder.to_mask, decoder.coarse_mask):
        nn.init.constant_(layer.bias, -1e6)
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
def test_windows_that_overlap_a_better_one_are_ranked_behind_the_others(thresh, steps, count):
    generator = torch.Generator().manual_seed(4)
    corners = torch.rand(40, 2, generator=generator) * 20
    # Sizes are similar. With steps of 1.5, some pairs differ too much for an IoU of 0.6, but no pair for an IoU of 0.3.
    sides = steps ** (torch.arange(40) % 3)[:, None] * (10 + torch.rand(40, 2, generator=generator))
    windows = torch.cat([corners, corners + sides], dim=1)
    overlaps = pairwise_iou(Boxes(windows), Boxes(windows))
    kept = []
    for i in range(40):
        if all(overlaps[i, j] <= thresh for j in kept):
            kept.append(i)
    expected = kept + [i for i in range(40) if i not in kept]
    assert spread(windows, torch.linspace(1, 0, 40), thresh, count).tolist() == expected[:count]
    assert (len(kept) == 40) == (thresh == 1.0)
    assert len(spread(windows[:0], torch.zeros(0), thresh, count)) == 0


def test_windows_are_spread_before_their_masks_are_decoded(cfg):
    images = images_of(noise(3, 96, 128))
    features = PatchBackbone()(images.tensor)
    generator = build(cfg).eval()
    # Every mask is full, so that no window is left out.
    generator.num_proposals, generator.mask_threshold, generator.window_nms_thresh = 40, -1e6, 0.5
    with torch.no_grad():
        pyramid = generator.encode(images.image_sizes, features)
        (proposals,) = generator.propose(pyramid)
    # Proposals are selected among four times as many windows.
    scores, best = pyramid.scores[0].topk(160)
    windows = generator.geometry.windows(generator.geometry.cells(best, pyramid.sizes))
    first = spread(windows, scores, 0.5, 40)
    assert first.tolist() != list(range(40))
    found = {tuple(window) for window in proposals.proposal_masks.windows.tolist()}
    assert found == {tuple(window) for window in windows[first].tolist()}
