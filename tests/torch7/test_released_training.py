"""The `released` presets train as the released code does: losses and gradients of a fixed batch against Torch7's modules run one by one.

What the reference takes from the released trainer:

* nn.SoftMarginCriterion is the mean of log(1 + exp(-y f)) over all pixels; in batches of masks its gradient is multiplied by the batch
  size;
* a released batch trains one head; ours train both, so a mixed batch has to give the sum of two released ones;
* the gradient of a mirrored border is dropped.

One thing of the released code is not built on purpose: its in-place modules scale the gradient that a residual block hands to its shortcut
by the norm of the main path as well, because both share memory.
"""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from drawing import ROOT
from sharpmask_d2 import add_sharpmask_config
from sharpmask_d2.torch7.conversion import convert_content
from sharpmask_d2.torch7.reader import parse_torch7
from torch import nn
from torch.nn.functional import soft_margin_loss
from torch7_models import draw_deepmask, draw_sharpmask, published
from torch7_network import Torch7DeepMask, Torch7SharpMask
from torch7_writer import dumps

BATCH = 32
WINDOW, COARSE = 32, 12


@pytest.fixture(scope="module")
def contents():
    """name -> what a file of that model holds: narrow heads and small windows, but a whole ResNet-18 as trunk."""
    rng = np.random.default_rng(0)
    deepmask = draw_deepmask(rng, window=WINDOW, coarse=COARSE)
    models = {"deepmask": deepmask, "sharpmask": draw_sharpmask(deepmask, rng)}
    return {name: parse_torch7(dumps(published(model))) for name, model in models.items()}


def build_preset(name: str, content):
    """Our model of a released preset with the sizes and parameters of a file's content."""
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / f"{name}_R_50.yaml"))
    converted = convert_content(content, name="drawn")
    for key in ("WINDOW_SIZE", "EMBED_DIM", "REDUCED_CHANNELS", "SCORE_DIM", "COARSE_MASK_SIZE"):
        cfg.MODEL.SHARPMASK[key] = converted.cfg.MODEL.SHARPMASK[key]
    cfg.MODEL.SHARPMASK.TRUNK.RESNET_DEPTH = 18
    cfg.MODEL.SHARPMASK.REFINEMENT.CHANNELS = 16
    cfg.MODEL.DEVICE = "cpu"
    # In double precision, so that no ReLU and no pooling decides otherwise than in the reference.
    model = build_model(cfg).train().double()
    model.pyramid.network.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    model.load_state_dict(converted.state, strict=False)
    for module in model.modules():
        # The reference has no dropout.
        if isinstance(module, nn.Dropout):
            module.eval()
    return model


def draw_patches(mask_size: int, seed: int, *, mask: bool = False, score: bool = False) -> dict:
    """BATCH patches as `PatchMapper` makes them, all of which contribute to the losses given."""
    generator = torch.Generator().manual_seed(seed)
    side = WINDOW + 32
    return {
        "patches": torch.randint(0, 256, (BATCH, 3, side, side), generator=generator, dtype=torch.uint8),
        "masks": torch.randint(0, 2, (BATCH, mask_size, mask_size), generator=generator, dtype=torch.uint8),
        "labels": torch.randint(0, 2, (BATCH,), generator=generator),
        "in_mask_loss": torch.full((BATCH,), mask),
        "in_score_loss": torch.full((BATCH,), score),
    }


def our_losses_and_gradients(model, batch: list) -> tuple:
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def normalised(batch: dict) -> torch.Tensor:
    """Patches as the released loader gives them: 0..1, minus the mean, divided by the deviation."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64).view(2, 3, 1, 1)
    return (batch["patches"].double() / 255 - mean) / std


def signs(targets: torch.Tensor) -> torch.Tensor:
    return targets.double() * 2 - 1


def by_our_names(model, content) -> dict:
    """The reference's gradients that are not zero, under the names of our parameters: a file of gradients, converted."""
    for network in model.networks:
        for module, name, gradient in network.gradients():
            module.fields[name] = gradient
    state = convert_content(content, name="gradients").state
    return {name: value for name, value in state.items() if ".norm." not in name and value.any()}


def assert_same_gradients(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_a_mixed_batch_of_deepmask_is_a_released_batch_of_masks_and_one_of_scores(contents):
    content = contents["deepmask"]
    masks, scores = draw_patches(2 * COARSE, 1, mask=True), draw_patches(2 * COARSE, 2, score=True)
    losses, gradients = our_losses_and_gradients(build_preset("deepmask", content), [masks, scores])
    reference = Torch7DeepMask(content["model"])
    loss_mask = BATCH * soft_margin_loss(reference.forward_mask(normalised(masks)), signs(masks["masks"]).flatten(1))
    loss_score = soft_margin_loss(reference.forward_score(normalised(scores)), signs(scores["labels"])[:, None])
    (loss_mask + loss_score).backward()
    assert losses == pytest.approx({"loss_mask": loss_mask.item(), "loss_score": loss_score.item()}, rel=1e-5)
    assert_same_gradients(gradients, by_our_names(reference, content))


def test_sharpmask_trains_the_refinement_alone_as_released(contents):
    content = contents["sharpmask"]
    batch = draw_patches(WINDOW, 3, mask=True)
    losses, gradients = our_losses_and_gradients(build_preset("sharpmask", content), [batch])
    reference = Torch7SharpMask(content["model"])
    loss = BATCH * soft_margin_loss(reference.forward(normalised(batch)), signs(batch["masks"]).flatten(1))
    loss.backward()
    assert losses == pytest.approx({"loss_mask": loss.item()}, rel=1e-5)
    theirs = by_our_names(reference, content)
    assert {name.split(".")[2] for name in theirs} == {"mask_branch"}
    assert_same_gradients(gradients, theirs)
