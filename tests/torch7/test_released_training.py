"""The `released` preset trains as the released code: losses and gradients of a fixed batch, against Torch7's modules run one by one.

The reference (torch7_network.py) knows neither our network nor autograd. Where it stands for the released trainer:

* nn.SoftMarginCriterion is the mean over all pixels of log(1 + exp(-y f)); in batches of masks its gradient is taken times the batch size;
* a released batch trains one head; ours mix both, so a mixed batch has to give the sum of two released ones;
* the gradient of a mirrored border is dropped (nn.SpatialSymmetricPadding inherits the backward pass of zero padding).

One thing of the released code is not built: it folds batch norms into modules that work in place, behind an in-place addition, so that the
gradient that a residual block hands to its shortcut is scaled by the norm of its main path as well. We take that for an accident: see
`test_the_released_shortcut_gradient_is_not_copied`.
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
from torch7_models import draw_deepmask, draw_sharpmask, published
from torch7_network import LiteralDeepMask, LiteralSharpMask, SoftMarginCriterion
from torch7_writer import dumps

BATCH = 32
WINDOW, COARSE = 64, 12


@pytest.fixture(scope="module")
def contents():
    """name -> what a file of that model holds: thin heads and small windows, but a whole ResNet-18 as trunk."""
    rng = np.random.default_rng(0)
    deepmask = draw_deepmask(rng, window=WINDOW, coarse=COARSE, side=2 * COARSE)
    models = {"deepmask": deepmask, "sharpmask": draw_sharpmask(deepmask, rng)}
    return {name: dumps(published(model)) for name, model in models.items()}


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
    # In double precision, lest a ReLU or a pooling that is undecided in single takes another way than the reference.
    model = build_model(cfg).train().double()
    model.pyramid.network.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    model.load_state_dict(converted.state, strict=False)
    for module in model.modules():
        # The reference has no dropout.
        if isinstance(module, nn.Dropout):
            module.eval()
    return model


def draw_patches(mask_size: int, seed: int, **pays) -> dict:
    """BATCH patches as `PatchMapper` makes them, all of which pay the losses given."""
    generator = torch.Generator().manual_seed(seed)
    side = WINDOW + 32
    return {
        "patches": torch.randint(0, 256, (BATCH, 3, side, side), generator=generator, dtype=torch.uint8),
        "masks": torch.randint(0, 2, (BATCH, mask_size, mask_size), generator=generator, dtype=torch.uint8),
        "labels": torch.randint(0, 2, (BATCH,), generator=generator),
        "pays_mask": torch.full((BATCH,), pays.get("mask", False)),
        "pays_score": torch.full((BATCH,), pays.get("score", False)),
    }


def our_losses_and_gradients(model, batch: list) -> tuple:
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def normalised(batch: dict) -> torch.Tensor:
    """Patches as the released loader gives them: 0..1, less the mean, over the deviation."""
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    return (batch["patches"].double() / 255 - mean) / std


def signs(targets: torch.Tensor) -> torch.Tensor:
    return targets.double() * 2 - 1


def by_our_names(literal, content) -> dict:
    """The reference's gradients under our parameters' names: a file of gradients, converted."""
    for path, layer in literal.layers.items():
        gradients = literal.gradients.get(path, {})
        for key in ("weight", "bias"):
            if key in layer.fields:
                value = gradients.get(key, torch.zeros(layer.fields[key].shape))
                layer.fields[key] = value.numpy()
    state = convert_content(content, name="gradients").state
    return {name: value for name, value in state.items() if ".norm." not in name}


def assert_same_gradients(ours: dict, theirs: dict) -> None:
    nonzero = {name for name, value in theirs.items() if value.any()}
    assert set(ours) == nonzero
    for name in nonzero:
        scale = theirs[name].abs().max()
        assert (ours[name] - theirs[name]).abs().max() <= 1e-5 * scale, name


def mask_step(literal: LiteralDeepMask, batch: dict) -> float:
    """The released trainer on a batch of masks: the loss, and gradients in `literal`."""
    inputs = normalised(batch)
    outputs, targets = literal.forward_mask(inputs), signs(batch["masks"]).flatten(1)
    literal.backward_mask(SoftMarginCriterion.backward(outputs, targets) * len(inputs))
    return SoftMarginCriterion.forward(outputs, targets)


def score_step(literal: LiteralDeepMask, batch: dict) -> float:
    outputs, targets = literal.forward_score(normalised(batch)), signs(batch["labels"])[:, None]
    literal.backward_score(SoftMarginCriterion.backward(outputs, targets))
    return SoftMarginCriterion.forward(outputs, targets)


def test_a_mixed_batch_of_deepmask_is_a_released_batch_of_masks_and_one_of_scores(contents):
    content = parse_torch7(contents["deepmask"])
    masks, scores = draw_patches(2 * COARSE, 1, mask=True), draw_patches(2 * COARSE, 2, score=True)
    losses, gradients = our_losses_and_gradients(build_preset("deepmask", content), [masks, scores])
    literal = LiteralDeepMask(content["model"])
    expected = {"loss_mask": 32 * mask_step(literal, masks), "loss_score": score_step(literal, scores)}
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(gradients, by_our_names(literal, content))


def test_sharpmask_trains_the_refinement_alone_as_released(contents):
    content = parse_torch7(contents["sharpmask"])
    batch = draw_patches(WINDOW, 3, mask=True)
    losses, gradients = our_losses_and_gradients(build_preset("sharpmask", content), [batch])
    literal = LiteralSharpMask(content["model"])
    outputs, targets = literal.forward(normalised(batch)), signs(batch["masks"]).flatten(1)
    assert losses == pytest.approx({"loss_mask": 32 * SoftMarginCriterion.forward(outputs, targets)}, rel=1e-5)
    literal.backward(SoftMarginCriterion.backward(outputs, targets) * BATCH)
    theirs = by_our_names(literal, content)
    assert {name.split(".")[2] for name, value in theirs.items() if value.any()} == {"mask_branch"}
    assert_same_gradients(gradients, theirs)


def test_the_released_shortcut_gradient_is_not_copied(contents):
    batch = draw_patches(2 * COARSE, 1, mask=True)
    gradients = []
    for in_place in (False, True):
        content = parse_torch7(contents["deepmask"])
        literal = LiteralDeepMask(content["model"], in_place=in_place)
        mask_step(literal, batch)
        gradients.append(by_our_names(literal, content))
    ours, released = gradients
    prefix = "pyramid.network."
    # Behind the last addition nothing differs; before it the gradient came through a shortcut.
    assert torch.equal(ours[prefix + "head.reduce.weight"], released[prefix + "head.reduce.weight"])
    assert not torch.allclose(
        ours[prefix + "trunk.stem.conv1.weight"], released[prefix + "trunk.stem.conv1.weight"], rtol=0.1
    )
