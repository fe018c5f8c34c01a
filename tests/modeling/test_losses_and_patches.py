"""Losses against slow references, the evaluator of patches, and packed checkpoints."""

import numpy as np
import pytest
import torch
from sharpmask_d2.checkpoint import StrictCheckpointer, pack, save_packed
from sharpmask_d2.evaluation import PatchEvaluator
from sharpmask_d2.modeling.losses import mask_iou, mask_loss, score_loss
from torch import nn


def _batch(seed=0, count=5, side=6):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, side, side, generator=generator)
    targets = (torch.rand(count, side, side, generator=generator) > 0.5).to(torch.uint8)
    return logits, targets


def test_mask_loss_is_the_soft_margin_loss_of_the_selected_windows():
    logits, targets = _batch()
    selected = torch.tensor([True, False, True, False, False])
    expected = 0.0
    for n in (0, 2):
        for row in range(6):
            for column in range(6):
                y = 1.0 if targets[n, row, column] else -1.0
                expected += np.log1p(np.exp(-y * float(logits[n, row, column]))) / 36 / 2
    assert mask_loss(logits, targets, selected).item() == pytest.approx(expected, rel=1e-5)


def test_score_loss_is_the_logistic_loss_of_the_selected_windows():
    logits, labels = torch.tensor([0.3, -2.0, 5.0]), torch.tensor([1, 1, 0])
    selected = torch.tensor([True, True, False])
    expected = (np.log1p(np.exp(-0.3)) + np.log1p(np.exp(2.0))) / 2
    assert float(score_loss(logits, labels, selected)) == pytest.approx(expected, rel=1e-5)


def test_the_mask_loss_without_selected_windows_is_zero_and_has_a_gradient():
    logits, targets = _batch()
    logits.requires_grad_(True)
    loss = mask_loss(logits, targets, torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert float(logits.grad.abs().sum()) == 0


def test_mask_iou_by_hand():
    targets = torch.zeros(3, 4, 4)
    targets[0, :2] = 1  # 8 pixels
    targets[1, :, :2] = 1
    logits = torch.full((3, 4, 4), -1.0)
    logits[0, 1:3] = 1  # intersection 4, union 12
    logits[1, :, :2] = 1
    torch.testing.assert_close(mask_iou(logits, targets), torch.tensor([4 / 12, 1.0, 1.0]))


def test_patch_evaluator_reports_mean_median_shares_and_accuracy():
    side = 10
    ious = [0.2, 0.4, 0.6, 1.0]
    targets, masks = torch.zeros(6, side, side, dtype=torch.uint8), torch.full((6, side, side), -1.0)
    for n, iou in enumerate(ious):
        targets[n] = 1
        masks[n].view(-1)[: round(100 * iou)] = 1.0
    inputs = {
        "masks": targets,
        "labels": torch.tensor([1, 1, 1, 1, 0, 0]),
        "in_mask_loss": torch.tensor([True] * 4 + [False] * 2),
        "in_score_loss": torch.tensor([False] + [True] * 5),
    }
    outputs = {"masks": masks, "scores": torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0])}
    evaluator = PatchEvaluator(distributed=False)
    evaluator.process([inputs], [outputs])
    results = evaluator.evaluate()["patches"]
    assert results["mean IoU"] == pytest.approx(55.0)
    assert results["median IoU"] == pytest.approx(50.0)
    assert results["IoU>0.5"] == pytest.approx(50.0)
    assert results["IoU>0.7"] == pytest.approx(25.0)
    assert results["score accuracy"] == pytest.approx(60.0)
    evaluator.reset()
    assert np.isnan(evaluator.evaluate()["patches"]["mean IoU"])


def test_packing_merges_models_that_share_parameters():
    a = {"trunk": torch.tensor([1.0, 2.0]), "mask": torch.tensor([3.0])}
    b = {"trunk": torch.tensor([1.0, 2.0]), "steps": torch.tensor([4])}
    packed = pack([a, b])
    assert set(packed) == {"trunk", "mask", "steps"}
    assert packed["trunk"].dtype == torch.float16
    with pytest.raises(ValueError, match="trunk differs"):
        pack([a, {"trunk": torch.tensor([1.0, 3.0])}])
    with pytest.raises(ValueError, match="mask has values"):
        pack([{"mask": torch.tensor([1e6])}])


def test_packed_files_are_checkpoints_and_smaller(tmp_path):
    packed = pack([{"0.weight": torch.arange(6.0).repeat(1000).view(2, 3000), "0.bias": torch.ones(2)}])
    save_packed(packed, str(tmp_path / "packed.pth"))
    torch.save({"model": packed}, tmp_path / "plain.pth")
    assert (tmp_path / "packed.pth").stat().st_size < (tmp_path / "plain.pth").stat().st_size / 2
    model = nn.Sequential(nn.Linear(3000, 2))
    StrictCheckpointer(model).load(str(tmp_path / "packed.pth"))
    assert torch.equal(model[0].weight, packed["0.weight"].float())


def test_missing_and_unfitting_parameters_of_a_checkpoint_are_named(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = model.state_dict()
    torch.save({"model": {**state, "more": torch.zeros(1)}}, tmp_path / "whole.pth")
    StrictCheckpointer(model).load(str(tmp_path / "whole.pth"))
    torch.save({"model": {k: v for k, v in state.items() if k != "1.bias"}}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth.*1\.bias"):
        StrictCheckpointer(model).load(str(tmp_path / "part.pth"))
    torch.save({"model": {**state, "0.weight": torch.zeros(5, 5)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth.*0\.weight"):
        StrictCheckpointer(model).load(str(tmp_path / "other.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        StrictCheckpointer(model).load(str(tmp_path / "list.pth"))
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        StrictCheckpointer(model).load(str(tmp_path / "none.pth"))
