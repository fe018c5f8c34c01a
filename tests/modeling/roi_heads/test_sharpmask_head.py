"""The mask head that decodes masks in windows around boxes: its masks, its losses, and detectors of every kind with it."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads.mask_head import build_mask_head
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from drawing import draw_example
from sharpmask_d2.modeling.feature_pyramid.decoder import SampledDecoder
from sharpmask_d2.modeling.feature_pyramid.grid import PyramidWindows
from sharpmask_d2.modeling.proposal_generator import SharpMaskFPN
from sharpmask_d2.modeling.roi_heads import SharpMaskHead, resample_masks
from sharpmask_d2.modeling.segment_generator import Windows
from sharpmask_d2.structures import WindowMasks
from torch import nn

SIZE = (96, 128)
LEVELS = {"p2": 4, "p3": 8, "p4": 16}
LOSSES = {"loss_mask", "loss_mask_dice", "loss_mask_side"}


@BACKBONE_REGISTRY.register()
class SmallPyramid(Backbone):
    """Three levels of 8 channels, fast enough to be trained in a test."""

    size_divisibility = 16

    def __init__(self, cfg=None, input_shape=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        levels = [self.stem(x)]
        for step in self.down:
            levels.append(step(levels[-1]))
        return dict(zip(LEVELS, levels))

    def output_shape(self):
        return {name: ShapeSpec(channels=8, stride=stride) for name, stride in LEVELS.items()}


@pytest.fixture
def cfg(tiny_cfg):
    cfg = tiny_cfg.clone()
    model = cfg.MODEL
    model.META_ARCHITECTURE = "GeneralizedRCNN"
    model.BACKBONE.NAME = "SmallPyramid"
    model.PIXEL_MEAN, model.PIXEL_STD = [0.0] * 3, [1.0] * 3
    model.MASK_ON = True
    model.PROPOSAL_GENERATOR.NAME = "RPN"
    model.RPN.IN_FEATURES = list(LEVELS)
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 30
    model.ANCHOR_GENERATOR.SIZES = [[16], [32], [64]]
    model.ROI_HEADS.NAME = "StandardROIHeads"
    model.ROI_HEADS.IN_FEATURES = list(LEVELS)
    model.ROI_HEADS.NUM_CLASSES = 3
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    model.ROI_BOX_HEAD.NUM_FC, model.ROI_BOX_HEAD.FC_DIM = 1, 32
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
    model.ROI_MASK_HEAD.NAME = "SharpMaskHead"
    model.ROI_MASK_HEAD.POOLER_TYPE = ""
    model.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True
    model.SHARPMASK.DETECTION_MASKS = "head"
    model.SHARPMASK.FPN.IN_FEATURES = list(LEVELS)
    model.SHARPMASK.FPN.EXTRA_LEVELS = 1
    # Detectors of this config sort few detections out, so that there are masks to look at without a training.
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 6
    torch.manual_seed(0)
    return cfg


def as_cascade(cfg):
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True


def as_multipath(cfg):
    cfg.MODEL.ROI_HEADS.NAME = "MultiPathROIHeads"
    cfg.MODEL.MULTIPATH.LEVELS = [["p2"]] * 4
    cfg.MODEL.MULTIPATH.REGRESSOR_LEVELS = ["p2"]
    cfg.MODEL.MULTIPATH.MIX_CHANNELS = 8


KINDS = {"StandardROIHeads": lambda cfg: None, "CascadeROIHeads": as_cascade, "MultiPathROIHeads": as_multipath}


def features_of(images: int = 1) -> dict:
    """Random features of images of `SIZE`."""
    draws = torch.Generator().manual_seed(1)
    sizes = {name: (SIZE[0] // stride, SIZE[1] // stride) for name, stride in LEVELS.items()}
    return {name: torch.randn(images, 8, *size, generator=draws) for name, size in sizes.items()}


def head_of(cfg) -> SharpMaskHead:
    """The head alone, with weights of which masks depend visibly."""
    head = build_mask_head(cfg, SmallPyramid().output_shape())
    with torch.no_grad():
        head.decoder.to_mask.weight *= 30
    return head


def detections(boxes: list, classes=None, size: tuple = SIZE) -> Instances:
    found = Instances(size, pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    found.pred_classes = torch.tensor(classes or [0] * len(boxes), dtype=torch.long)
    return found


def examples(objects: list, kind: str = "polygon") -> list:
    """Inputs of a detector, one image for each list of rectangles; the class of an object is its number modulo 3."""
    inputs = []
    for number, boxes in enumerate(objects):
        image, gt = draw_example(boxes, SIZE, kind=kind, seed=number)
        gt.gt_classes = torch.arange(len(boxes)) % 3
        inputs.append({"image": image, "instances": gt, "height": SIZE[0], "width": SIZE[1]})
    return inputs


# ------------------------------------------------------------------------------------------------------------ masks of boxes

BOXES = [[20.0, 20, 80, 60], [3, 2, 40, 90], [100, 60, 104, 63], [0, 0, 128, 96]]


@torch.no_grad()
def test_in_its_window_a_box_has_the_mask_of_the_generator_with_equal_weights(cfg):
    head, features = head_of(cfg).eval(), features_of()
    generator = SharpMaskFPN(cfg, SmallPyramid().output_shape()).eval()
    head.decoder.load_state_dict(generator.decoder.state_dict())
    boxes = torch.tensor(BOXES)
    windows = head.canonical_windows(boxes)
    assert torch.equal(windows, generator.canonical_windows(boxes))
    expected = generator.decode(generator.encode([SIZE], features), Windows(windows))
    found = head.decode(head.encode(features, [SIZE]), torch.zeros(4, dtype=torch.long), windows)
    assert torch.equal(found, expected)
    assert found.std() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("windows_per_batch", [1, 128])
def test_detectron2_pastes_the_masks_of_the_windows(cfg, windows_per_batch):
    cfg.MODEL.SHARPMASK.TEST.WINDOWS_PER_BATCH = windows_per_batch
    head, features = head_of(cfg).eval(), features_of()
    (found,) = head(features, [detections(BOXES)])
    windows = head.canonical_windows(torch.tensor(BOXES))
    logits = head.decode(head.encode(features, [SIZE]), torch.zeros(4, dtype=torch.long), windows)
    size = (2 * SIZE[0], 3 * SIZE[1])
    for threshold in (0.5, 0.45):
        cut = torch.tensor(threshold).logit().item()
        expected = WindowMasks(logits, windows, SIZE, threshold=cut).scale(3, 2, size).paste()
        copy = Instances(SIZE, pred_boxes=found.pred_boxes.clone(), pred_masks=found.pred_masks)
        pasted = detector_postprocess(copy, *size, mask_threshold=threshold).pred_masks
        assert torch.equal(pasted, expected)
        assert 0.05 < pasted.float().mean() < 0.95
    # Of boxes that are left out, masks are left out too.
    some = detector_postprocess(found[torch.tensor([False, True, True, False])], *size).pred_masks
    assert torch.equal(some, WindowMasks(logits, windows, SIZE, threshold=0.0).scale(3, 2, size).paste()[1:3])


@torch.no_grad()
def test_probabilities_on_the_boxes_are_the_window_masks_within_half_a_cell(cfg):
    """What Detectron2's test-time augmentation averages, pasted by Detectron2 itself."""
    head, features = head_of(cfg).eval(), features_of()
    (found,) = head(features, [detections(BOXES)])
    probabilities = torch.stack([found.pred_masks])[0]
    assert probabilities.shape == (4, 1, 56, 56)
    assert torch.equal(found.pred_masks.flip(dims=[3]), probabilities.flip(dims=[3]))
    some = torch.tensor([False, True, True, False])
    assert torch.equal(found.pred_masks[some].tensor, probabilities[some, 0])
    assert torch.equal(found.pred_masks[2].to("cpu").tensor, probabilities[2])
    windows = found.pred_masks.masks
    # Four times as large, so that a cell of a window has some pixels.
    size = (4 * SIZE[0], 4 * SIZE[1])
    cell = (windows.windows[:, 2] - windows.windows[:, 0]) / 56
    moved = [windows.windows]
    for side in (-0.5, 0.5):
        for axis in (0, 1):
            moved.append(windows.windows + side * cell[:, None] * (torch.arange(4) % 2 == axis))
    masks = torch.stack([WindowMasks(windows.logits, x, SIZE, threshold=0.0).scale(4, 4, size).paste() for x in moved])
    found.pred_masks = probabilities
    pasted = detector_postprocess(found, *size).pred_masks
    for number, (x0, y0, x1, y1) in enumerate((4 * torch.tensor(BOXES)).long().tolist()):
        # Detectron2 fades masks out at the edges of their boxes.
        inner = torch.zeros(size, dtype=torch.bool)
        inner[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = True
        clear = (masks[:, number] == masks[0, number]).all(dim=0) & inner
        assert clear.sum() > 0.3 * inner.sum()
        assert (pasted[number] == masks[0, number])[clear].float().mean() > 0.99


def test_resampling_follows_a_linear_ramp():
    window, box = torch.tensor([[10.0, 20, 66, 76]]), torch.tensor([[20.0, 30, 48, 72]])
    # The logits at a cell's centre are x + 100 y of the frame.
    cells = torch.arange(56) + 0.5
    logits = ((10 + cells)[None, :] + 100 * (20 + cells)[:, None])[None]
    x, y = 20 + cells / 2, 30 + cells * 0.75
    torch.testing.assert_close(resample_masks(logits, window, box), (x[None] + 100 * y[:, None])[None])


@torch.no_grad()
def test_masks_of_a_batch_are_those_of_its_images(cfg):
    head, features = head_of(cfg).eval(), features_of(2)
    small = (64, 100)
    together = head(features, [detections(BOXES[:2]), detections(BOXES[1:3], size=small)])
    alone = [
        head({name: x[number : number + 1] for name, x in features.items()}, [found])[0]
        for number, found in enumerate([detections(BOXES[:2]), detections(BOXES[1:3], size=small)])
    ]
    for found, expected in zip(together, alone):
        torch.testing.assert_close(found.pred_masks.tensor, expected.pred_masks.tensor, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0].pred_masks[1].tensor, together[1].pred_masks[0].tensor, atol=1e-3)


@torch.no_grad()
def test_boxes_of_zero_size_or_outside_of_the_image_have_finite_masks(cfg):
    head, features = head_of(cfg).eval(), features_of()
    odd = [
        [300.0, 300, 400, 400],
        [-300, -300, -200, -250],
        [10, 10, 10, 10],
        [20, 10, 20, 60],
        [-500, -500, 3000, 3000],
    ]
    (found,) = head(features, [detections([*odd, *BOXES])])
    assert found.pred_masks.masks.logits.isfinite().all()
    assert found.pred_masks.to_bitmasks(found.pred_boxes, *SIZE).tensor[:2].sum() == 0
    (alone,) = head(features, [detections(BOXES)])
    torch.testing.assert_close(found.pred_masks.masks.logits[5:], alone.pred_masks.masks.logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_per_class_masks_are_those_of_the_predicted_classes(cfg):
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = False
    head, features = head_of(cfg).eval(), features_of()
    assert head.decoder.to_mask.out_channels == 3
    by_class = [head(features, [detections(BOXES, [k] * 4)])[0].pred_masks.tensor for k in range(3)]
    (mixed,) = head(features, [detections(BOXES, [2, 0, 1, 2])])
    for number, k in enumerate([2, 0, 1, 2]):
        torch.testing.assert_close(mixed.pred_masks.tensor[number], by_class[k][number], atol=1e-5, rtol=0)
    assert not torch.allclose(by_class[0], by_class[1], atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------- training


def proposals(objects: list, kind: str = "polygon") -> Instances:
    """Foreground proposals, as RoI heads give them to a mask head: the objects' boxes, moved a little."""
    _, gt = draw_example(objects, SIZE, kind=kind)
    gt.proposal_boxes = Boxes(gt.gt_boxes.tensor + 3)
    gt.gt_classes = torch.arange(len(objects)) % 3
    return gt


OBJECTS = [(20, 20, 80, 60), (3, 2, 40, 90), (90, 40, 120, 80)]


@pytest.mark.parametrize("kind", ["polygon", "bitmap"])
@pytest.mark.parametrize("agnostic", [True, False])
def test_losses_are_finite_and_train_the_whole_decoder(cfg, kind, agnostic):
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = agnostic
    cfg.VIS_PERIOD = 1
    head = head_of(cfg).train()
    features = {name: x.requires_grad_() for name, x in features_of(2).items()}
    with EventStorage() as storage:
        losses = head(features, [proposals(OBJECTS, kind), proposals([], kind)])
    assert losses.keys() == LOSSES
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert 0 <= storage.latest()["mask_head/mask_iou"][0] <= 1
    # Images for TensorBoard: three windows above each other, prediction beside target.
    assert [tuple(picture[1].shape) for picture in storage._vis_data] == [(3, 3 * 56, 2 * 56)]
    sum(losses.values()).backward()
    for name, parameter in head.decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    if not agnostic:
        assert (head.decoder.to_mask.weight.grad.flatten(1).abs().sum(dim=1) > 0).all()
    assert all(x.grad[0].abs().sum() > 0 for x in features.values())
    assert not any(x.grad[1].any() for x in features.values())


def test_a_perfect_mask_has_no_loss(cfg):
    """The targets lie in the windows: a decoder that knows the object has no loss."""
    head = head_of(cfg).train()
    gt = proposals(OBJECTS[:1])
    x0, y0, x1, y1 = head.canonical_windows(gt.proposal_boxes.tensor)[0].tolist()
    cells = (torch.arange(56) + 0.5) / 56
    xs, ys = x0 + (x1 - x0) * cells, y0 + (y1 - y0) * cells
    inside = ((xs >= 20) & (xs < 80))[None] & ((ys >= 20) & (ys < 60))[:, None]
    logits = torch.where(inside, 20.0, -20.0)[None]
    steps = [torch.zeros(1, 14, 14), torch.zeros(1, 28, 28), logits]
    head.decoder.forward = lambda *args: steps
    with EventStorage():
        losses = head(features_of(), [gt])
    assert losses["loss_mask"] < 0.02
    assert losses["loss_mask_dice"] < 0.02
    assert losses["loss_mask_side"].item() == pytest.approx(2 * torch.log(torch.tensor(2.0)).item())


@pytest.mark.parametrize("agnostic", [True, False])
def test_without_foreground_the_losses_are_zero_and_of_every_parameter(cfg, agnostic):
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = agnostic
    head = head_of(cfg).train()
    with EventStorage():
        losses = head(features_of(2), [proposals([]), proposals([])])
    assert losses.keys() == LOSSES
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_the_weight_of_the_losses(cfg):
    torch.manual_seed(0)
    heads = [
        SharpMaskHead(
            geometry=PyramidWindows(strides=list(LEVELS.values()), window_cells=[5, 7], object_share=0.8),
            decoder=SampledDecoder(in_channels=8, embed_dim=16, channels=16),
            mask_window=1.2,
            loss_weight=weight,
        ).train()
        for weight in (1.0, 3.0)
    ]
    heads[1].load_state_dict(heads[0].state_dict())
    with EventStorage():
        one, three = (head(features_of(), [proposals(OBJECTS)]) for head in heads)
    for name in LOSSES:
        torch.testing.assert_close(three[name], 3 * one[name])


# ---------------------------------------------------------------------------------------------------------------- detectors


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_of_every_kind_trains_and_detects(cfg, kind, agnostic):
    KINDS[kind](cfg)
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = agnostic
    model = build_model(cfg).train()
    assert type(model.roi_heads).__name__ == kind
    with EventStorage():
        losses = model(examples([OBJECTS, []]))
    assert losses.keys() >= LOSSES
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.roi_heads.mask_head.parameters())
    inputs = examples([OBJECTS, []])
    inputs[1].update(height=48, width=64)
    with torch.no_grad():
        outputs = model.eval()(inputs)
    for output, size in zip(outputs, [SIZE, (48, 64)]):
        found = output["instances"]
        assert len(found)
        assert found.pred_masks.shape == (len(found), *size)
        assert found.pred_masks.dtype == torch.bool


def test_under_autocast_losses_are_nearly_those_of_full_precision(cfg):
    head = head_of(cfg).train()
    with EventStorage():
        exact = head(features_of(), [proposals(OBJECTS)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = {name: x.bfloat16() for name, x in features_of().items()}
            mixed = head(features, [proposals(OBJECTS)])
    for name in LOSSES:
        assert mixed[name].dtype == torch.float32
        torch.testing.assert_close(mixed[name], exact[name], atol=0.02, rtol=0.05)
    sum(mixed.values()).backward()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = head.eval()(features, [detections(BOXES)])
    assert found.pred_masks.tensor.dtype == torch.float32


@torch.no_grad()
def test_without_detections_there_are_no_masks(cfg):
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1.1
    found = build_model(cfg).eval()(examples([OBJECTS]))[0]["instances"]
    assert found.pred_masks.shape == (0, *SIZE)


@torch.no_grad()
def test_boxes_that_are_given_get_masks(cfg):
    model = build_model(cfg).eval()
    inputs = examples([OBJECTS])
    (found,) = model.inference(inputs, [detections(BOXES)])
    assert found["instances"].pred_masks.shape == (4, *SIZE)


@torch.no_grad()
def test_detectron2s_test_time_augmentation_works(cfg):
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (96, 112), 200
    model = build_model(cfg).eval()
    image = (examples([OBJECTS])[0]["image"].clamp(0, 1) * 255).byte()
    found = GeneralizedRCNNWithTTA(cfg, model)([{"image": image, "height": SIZE[0], "width": SIZE[1]}])[0]["instances"]
    assert len(found)
    assert found.pred_masks.shape == (len(found), *SIZE)


def test_a_frozen_backbone_stays_as_it_is(cfg):
    model = build_model(cfg).train()
    model.backbone.requires_grad_(False)
    with EventStorage():
        sum(model(examples([OBJECTS])).values()).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.roi_heads.mask_head.parameters())


def test_a_state_comes_back(cfg, tmp_path):
    first = build_model(cfg).eval()
    DetectionCheckpointer(first, str(tmp_path)).save("model")
    second = build_model(cfg).eval()
    missing = DetectionCheckpointer(second).load(str(tmp_path / "model.pth")).get("missing_keys", [])
    assert not missing
    with torch.no_grad():
        one, two = (model(examples([OBJECTS]))[0]["instances"] for model in (first, second))
    assert torch.equal(one.pred_masks, two.pred_masks)
    assert len(one)


def with_ellipses(inputs: list) -> list:
    """Inputs whose rectangles are cut to ellipses, so that boxes are not masks, with proposals around the objects and elsewhere."""
    xs, ys = torch.arange(SIZE[1]) + 0.5, torch.arange(SIZE[0])[:, None] + 0.5
    draws = torch.Generator().manual_seed(0)
    for example in inputs:
        gt = example["instances"]
        gt.gt_classes.zero_()
        boxes = gt.gt_boxes.tensor
        for (x0, y0, x1, y1), mask in zip(boxes.tolist(), gt.gt_masks.tensor):
            ellipse = ((2 * xs - x0 - x1) / (x1 - x0)) ** 2 + ((2 * ys - y0 - y1) / (y1 - y0)) ** 2 <= 1
            example["image"][:, mask & ~ellipse] = 0
            mask &= ellipse
        near = boxes.repeat(10, 1) + 6 * torch.randn(10 * len(boxes), 4, generator=draws)
        corners, sides = 60 * torch.rand(20, 2, generator=draws), 10 + 30 * torch.rand(20, 2, generator=draws)
        proposed = Boxes(torch.cat([near, torch.cat([corners, corners + sides], dim=1)]))
        example["proposals"] = Instances(SIZE, proposal_boxes=proposed, objectness_logits=torch.zeros(len(proposed)))
    return inputs


def test_a_detector_learns_the_masks_of_four_images(cfg):
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    objects = [[(20, 20, 80, 60)], [(70, 10, 110, 86)], [(10, 40, 50, 70), (80, 8, 112, 40)], [(30, 6, 100, 90)]]
    inputs = with_ellipses(examples(objects, "bitmap"))
    model = build_model(cfg).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=90)
    with EventStorage():
        for _ in range(90):
            optimizer.zero_grad()
            sum(model(inputs).values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        outputs = model.eval()(inputs)
    for example, output in zip(inputs, outputs):
        truth = example["instances"].gt_masks.tensor
        # The detections of highest score are the objects: AP at the IoU of the limit is 1.
        found = output["instances"].pred_masks[: len(truth)]
        overlaps = (truth[:, None] & found).sum((2, 3)) / (truth[:, None] | found).sum((2, 3))
        assert overlaps.amax(dim=1).min() > 0.7, overlaps
        assert overlaps.argmax(dim=1).unique().numel() == len(truth)


# ------------------------------------------------------------------------------------------------------------ configuration


def test_pooled_features_are_refused(cfg):
    cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "ROIAlignV2"
    with pytest.raises(ValueError, match=r"MODEL\.ROI_MASK_HEAD\.POOLER_TYPE is 'ROIAlignV2': set it to \"\""):
        build_model(cfg)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (8, 4), "b": (9, 8)}, r"MODEL\.ROI_HEADS\.IN_FEATURES: .* channels, \[8, 9\]"),
        ({"a": (8, 4), "b": (8, 16)}, r"MODEL\.ROI_HEADS\.IN_FEATURES: .* strides are \[4, 16, 32\], .*twice"),
    ],
)
def test_features_that_do_not_fit_are_named(cfg, shapes, message):
    shapes = {name: ShapeSpec(channels=channels, stride=stride) for name, (channels, stride) in shapes.items()}
    with pytest.raises(ValueError, match=message):
        build_mask_head(cfg, shapes)


def test_images_without_masks_are_named(cfg):
    head = head_of(cfg).train()
    with EventStorage(), pytest.raises(ValueError, match="training images come without gt_masks"):
        head(features_of(), [proposals(OBJECTS, "none")])
