"""Training in several processes: the mean of their losses and gradients equals that of one process with all of their images."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from drawing import draw_example
from torch import distributed, nn

OBJECTS = [[(8, 8, 40, 36), (50, 20, 84, 60), (10, 44, 30, 62)], [(30, 10, 60, 50)]]


def _full_images(number: int) -> dict:
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


INPUTS = {"SegmentProposalNetwork": _full_images, "SharpMaskProposalNetwork": _patches}


def _losses_and_gradients(cfg, numbers: list) -> tuple:
    """Losses and gradients of one step with the inputs of these numbers."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            # Its random numbers depend on the size of the batch.
            module.p = 0.0
    with EventStorage():
        losses = model([INPUTS[cfg.MODEL.META_ARCHITECTURE](number) for number in numbers])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def _work(rank: int, cfgs: list, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([_losses_and_gradients(cfg, [rank]) for cfg in cfgs], f"{folder}/{rank}.pth")
    distributed.destroy_process_group()


@pytest.fixture
def cfgs(tiny_cfg):
    """Configs of the network on a feature pyramid and of the network that is trained on patches. Neither draws random numbers: all windows
    contribute to the losses, and without jitter every object has its canonical window."""
    tiny_cfg.MODEL.SHARPMASK.WINDOW_SIZE = 64
    cfg = tiny_cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "SegmentProposalNetwork"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMaskFPN"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.SHARPMASK.GENERATOR.FROZEN = False
    cfg.MODEL.SHARPMASK.FPN.SCORE_CHANNELS = 8
    cfg.MODEL.SHARPMASK.FPN.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.SHARPMASK.FPN.EXTRA_LEVELS = 2
    # Without jitter every object has its canonical window, equally often where the number of windows is a multiple of the objects.
    cfg.MODEL.SHARPMASK.FPN.MASK_JITTER_SHIFT = cfg.MODEL.SHARPMASK.FPN.MASK_JITTER_OCTAVES = 0.0
    cfg.MODEL.SHARPMASK.FPN.MASK_WINDOWS_PER_IMAGE = 12
    return [cfg, tiny_cfg]


def test_two_processes_have_the_mean_losses_and_gradients_of_one(cfgs, tmp_path):
    torch.multiprocessing.spawn(_work, (cfgs, str(tmp_path)), nprocs=2)
    halves = [torch.load(Path(tmp_path, f"{rank}.pth")) for rank in (0, 1)]
    for number, cfg in enumerate(cfgs):
        losses, gradients = _losses_and_gradients(cfg, [0, 1])
        (first, first_gradients), (second, second_gradients) = (half[number] for half in halves)
        assert len(losses) >= 2
        for name, loss in losses.items():
            # DistributedDataParallel averages the gradients of the processes.
            torch.testing.assert_close((first[name] + second[name]) / 2, loss, msg=lambda m, name=name: f"{name}: {m}")
        assert first_gradients.keys() == second_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            together = (first_gradients[name] + second_gradients[name]) / 2
            # Convolutions round differently in batches of one and of two images.
            assert (together - gradient).norm() <= 0.01 * gradient.norm(), name
