"""Training on several processes: what they learn together is what one process learns from all of their images."""

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
    # Of the first process, all patches pay for their masks and one for its score; of the second, one and three.
    pays = torch.arange(3) < torch.tensor([[3], [1]])
    return {
        "patches": torch.randint(0, 256, (3, 3, 96, 96), generator=generator, dtype=torch.uint8),
        "masks": torch.rand(3, 64, 64, generator=generator) < 0.5,
        "labels": torch.rand(3, generator=generator) < 0.5,
        "pays_mask": pays[number],
        "pays_score": pays[1 - number],
    }


INPUTS = {"SegmentProposalNetwork": _full_images, "SharpMaskProposalNetwork": _patches}


def _learn(cfg, numbers: list) -> tuple:
    """Losses and gradients of a step with some of the inputs."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            # What it draws depends on the size of the batch.
            module.p = 0.0
    with EventStorage():
        losses = model([INPUTS[cfg.MODEL.META_ARCHITECTURE](number) for number in numbers])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def _work(rank: int, cfgs: list, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([_learn(cfg, [rank]) for cfg in cfgs], f"{folder}/{rank}.pth")
    distributed.destroy_process_group()


@pytest.fixture
def cfgs(tiny_cfg):
    """Of the network on a feature pyramid, which draws nothing, and of the one that learns from patches."""
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


def test_two_processes_learn_what_one_learns_from_both_halves(cfgs, tmp_path):
    torch.multiprocessing.spawn(_work, (cfgs, str(tmp_path)), nprocs=2)
    halves = [torch.load(Path(tmp_path, f"{rank}.pth")) for rank in (0, 1)]
    for number, cfg in enumerate(cfgs):
        losses, gradients = _learn(cfg, [0, 1])
        (first, first_gradients), (second, second_gradients) = (half[number] for half in halves)
        assert len(losses) >= 2
        for name, loss in losses.items():
            # DistributedDataParallel takes the mean of the processes' gradients.
            torch.testing.assert_close((first[name] + second[name]) / 2, loss, msg=lambda m, name=name: f"{name}: {m}")
        assert first_gradients.keys() == second_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            together = (first_gradients[name] + second_gradients[name]) / 2
            # Convolutions of one image and of two round differently.
            assert (together - gradient).norm() <= 0.01 * gradient.norm(), name
