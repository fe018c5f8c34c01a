"""Training in two processes equals training in one: batches, losses, gradients and weights."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import os

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from drawing import draw_example, to_small_detector
from processes import in_two_processes
from sharpmask_d2.data import register_datasets
from sharpmask_d2.data.seeding import seed_all
from sharpmask_d2.engine import Trainer
from torch import nn

# The images have different numbers of objects, so that the processes have different numbers of windows and RoIs.
OBJECTS = [[(8, 8, 40, 36), (50, 20, 84, 60), (10, 44, 30, 62)], [(30, 10, 60, 50)]]


def _full_image(number: int) -> dict:
    image, gt = draw_example(OBJECTS[number], (64, 96), kind="bitmap", seed=number)
    return {"image": 128 + 40 * image, "instances": gt}


def _patches(number: int) -> dict:
    generator = torch.Generator().manual_seed(number)
    # Three masks and one score contribute to the losses of the first process, one mask and three scores to those of the second.
    counted = torch.arange(3) < torch.tensor([[3], [1]])
    return {
        "patches": torch.randint(0, 256, (3, 3, 96, 96), generator=generator, dtype=torch.uint8),
        "masks": torch.rand(3, 64, 64, generator=generator) < 0.5,
        "labels": torch.rand(3, generator=generator) < 0.5,
        "in_mask_loss": counted[number],
        "in_score_loss": counted[1 - number],
    }


def _losses_and_gradients(cfg, make_input, numbers: list) -> tuple:
    """Losses and gradients of one step with the inputs of these numbers."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            # Its random numbers depend on the size of the batch.
            module.p = 0.0
    # The ranks of a training have different random numbers.
    seed_all(1, numbers[0], 5, 0)
    if cfg.MODEL.META_ARCHITECTURE == "SegmentProposalNetwork":
        # In float32, rounding moves some of its values from one side of a ReLU to the other.
        model = model.double()
    with EventStorage():
        losses = model([make_input(number) for number in numbers])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def _deepmask(cfg):
    return _patches


def _deepmask_of_full_images(cfg):
    """The mapper draws the patches, in the model."""
    return _full_image


def _fpn(cfg):
    """Windows are drawn around the objects."""
    cfg.MODEL.META_ARCHITECTURE = "SegmentProposalNetwork"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMaskFPN"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.SHARPMASK.FPN.SCORE_CHANNELS = 8
    cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 2
    cfg.MODEL.SHARPMASK.FPN.MASK_WINDOWS_PER_IMAGE = 12
    return _full_image


def _detector(cfg, roi_heads="ProposalMaskROIHeads"):
    """A detector on an image pyramid. Each image has another number of RoIs, all of which Detectron2 samples."""
    to_small_detector(cfg, roi_heads=roi_heads, num_classes=2)
    cfg.MODEL.SHARPMASK.GENERATOR.WINDOWS_PER_IMAGE = 8
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 1000
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    return _full_image


def _multipath(cfg):
    make_input = _detector(cfg, "MultiPathROIHeads")
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4"]
    cfg.MODEL.MULTIPATH.FOVEAL_FACTORS = [1.0, 2.0]
    cfg.MODEL.MULTIPATH.LEVELS = [["res3", "res4"], ["res4"]]
    cfg.MODEL.MULTIPATH.REGRESSOR_LEVELS = ["res4"]
    cfg.MODEL.MULTIPATH.IOU_THRESHOLDS = [0.5, 0.7]
    return make_input


def _half(rank: int, cfg, make_input) -> tuple:
    return _losses_and_gradients(cfg, make_input, [rank])


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.MODEL.SHARPMASK.WINDOW_SIZE = 64
    tiny_cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = False
    return tiny_cfg


@pytest.mark.parametrize("case", [_deepmask, _deepmask_of_full_images, _fpn, _detector, _multipath])
def test_two_processes_have_the_mean_losses_and_gradients_of_one(cfg, case, tmp_path):
    make_input = case(cfg)
    (first, first_gradients), (second, second_gradients) = in_two_processes(_half, cfg, make_input, folder=tmp_path)
    losses, gradients = _losses_and_gradients(cfg, make_input, [0, 1])
    assert len(losses) >= 2
    for name, loss in losses.items():
        # DistributedDataParallel averages the gradients of the processes.
        torch.testing.assert_close((first[name] + second[name]) / 2, loss, rtol=1e-5, atol=0, msg=f"{name}: {first}")
    assert first_gradients.keys() == second_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        together = (first_gradients[name] + second_gradients[name]) / 2
        assert (together - gradient).norm() <= 1e-5 * gradient.norm(), name


NAME = "shared_by_processes"


@pytest.fixture
def training(cfg, make_dataset, tmp_path):
    """Config of a training of four steps of four images, whose numbers per image differ."""
    data = make_dataset(tmp_path / "data", num_images=6)
    register_datasets([(NAME, str(data.annotations), str(data.image_root))])
    _fpn(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [50.0] * 3
    cfg.INPUT.SCALE_JITTER.ENABLED = True
    cfg.INPUT.SCALE_JITTER.SIDE = cfg.INPUT.SCALE_JITTER.CROP = 96
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.001
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.MAX_ITER = 4
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    yield cfg
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def _train(rank: int, cfg, resume: bool = False) -> dict:
    """Trains, and returns for each step the ids and pixels of the images of this process."""
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    torch.manual_seed(1)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    recorded = {}

    def record(_, inputs):
        recorded[trainer.iter] = [(image["image_id"], image["image"]) for image in inputs[0]]

    trainer._trainer.model.register_forward_pre_hook(record)
    trainer.train()
    return recorded


def _into(cfg, folder: str, **changes):
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/{folder}"
    for name, value in changes.items():
        cfg.SOLVER[name] = value
    return cfg


def _weights(cfg) -> torch.Tensor:
    model = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=False)["model"]
    return torch.cat([weight.flatten().float() for weight in model.values()])


def _check_images(whole: dict, halves: list, steps) -> None:
    """Checks that the processes have the images of one process, in turn."""
    for step in steps:
        shared = [image for pair in zip(*(half[step] for half in halves)) for image in pair]
        assert [image_id for image_id, _ in shared] == [image_id for image_id, _ in whole[step]]
        assert all(torch.equal(image, other) for (_, image), (_, other) in zip(shared, whole[step]))


def test_a_training_in_two_processes_equals_one_in_one_process(training, tmp_path):
    """Also where it is resumed with another number of processes."""
    alone, together = _into(training, "alone"), _into(training, "together")
    whole = _train(0, alone)
    halves = in_two_processes(_train, together, folder=tmp_path)
    _check_images(whole, halves, range(4))
    begun = _into(training, "continued", MAX_ITER=2)
    _train(0, begun)
    start = _weights(begun)
    continued = _into(training, "continued")
    halves = in_two_processes(_train, continued, True, folder=tmp_path)
    assert halves[0].keys() == {2, 3}
    _check_images(whole, halves, (2, 3))
    for cfg in (together, continued):
        moved, error = (_weights(alone) - start).abs().max(), (_weights(alone) - _weights(cfg)).abs().max()
        assert error <= 1e-4 * moved
