"""Precomputed proposals in detectors: pickles with masks, the mapper, training and evaluation."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import itertools
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from drawing import ROOT, compressed_rle
from precomputed import SIZE, draw_proposals, to_detector
from pycocotools import mask as mask_util
from sharpmask_d2.data import ProposalMapper, load_proposal_masks, register_datasets
from sharpmask_d2.data.proposal_mapper import get_proposal_dicts, sample_masks
from sharpmask_d2.engine.trainer import Trainer, optimizer_params
from sharpmask_d2.evaluation import WithGeneratedProposals, evaluate_proposal_file
from sharpmask_d2.evaluation.proposal_evaluation import evaluate_proposal_json
from sharpmask_d2.io.proposal_files import write_pickle

NAME = "precomputed"


@pytest.fixture
def drawn(make_dataset, tmp_path):
    """A drawn dataset with a crowd, registered as NAME while the test runs: (name, JSON, images)."""
    data = make_dataset(tmp_path / "data", num_images=3, size=SIZE, crowd=True)
    dataset = (NAME, str(data.annotations), str(data.image_root))
    register_datasets([dataset])
    yield dataset, data.masks
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def entries(drawn):
    """Results of the images, as `write_pickle` takes them; the last image has none."""
    rng = np.random.default_rng(0)
    entries = [{"image_id": i, "results": draw_proposals(masks, rng)} for i, masks in drawn[1].items()]
    entries[-1]["results"] = []
    return entries


@pytest.fixture
def pickled(entries, tmp_path):
    """Path of the pickle of these results."""
    path = tmp_path / "proposals.pkl"
    write_pickle(entries, str(path), masks=True)
    return str(path)


def with_proposals(cfg, path: str):
    """The config with precomputed proposals for NAME, in place."""
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (NAME,)
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = (path,)
    return cfg


@pytest.fixture
def cfg(tiny_cfg, pickled):
    """The config of a Fast R-CNN that reads the pickle and keeps the masks of its proposals."""
    return with_proposals(to_detector(tiny_cfg, "ProposalMaskROIHeads"), pickled)


# ---------------------------------------------------------------------- pickles


@pytest.mark.parametrize("roi_heads", ["StandardROIHeads", "Res5ROIHeads"])
def test_stock_detectron2_reads_our_pickles(tiny_cfg, pickled, entries, roi_heads):
    cfg = with_proposals(to_detector(tiny_cfg, roi_heads), pickled)
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    cfg.SOLVER.IMS_PER_BATCH = 3
    model = build_model(cfg)
    batch = next(iter(build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, True))))
    with EventStorage():
        losses = model(batch)
    assert {"loss_cls", "loss_box_reg"} <= losses.keys()
    assert all(loss.isfinite() for loss in losses.values())
    model.eval()
    # Random features of a ResNet may be so large that all but one class get a probability of 0, or that boxes have no size.
    for layer in (model.roi_heads.box_predictor.cls_score, model.roi_heads.box_predictor.bbox_pred):
        torch.nn.init.zeros_(layer.weight)
    seen = {}
    for (inputs,) in build_detection_test_loader(cfg, NAME, mapper=DatasetMapper(cfg, False)):
        with torch.no_grad():
            seen[inputs["image_id"]] = len(inputs["proposals"]), len(model([inputs])[0]["instances"])
        assert not inputs["proposals"].has("proposal_masks")
    assert [seen[entry["image_id"]][0] for entry in entries] == [12, 12, 0]
    assert [seen[entry["image_id"]][1] > 0 for entry in entries] == [True, True, False]


def test_pickle_has_the_masks_byte_for_byte(entries, pickled):
    content = pickle.loads(Path(pickled).read_bytes())
    for entry, masks in zip(entries[:2], content["masks"]):
        assert masks["size"] == list(SIZE)
        assert masks["counts"].split(b"\n") == [r["segmentation"]["counts"].encode() for r in entry["results"]]
    assert content["masks"][2] == {"size": None, "counts": b""}


def test_pickle_has_masks_only_if_they_are_asked_for(entries, tmp_path):
    write_pickle(entries, str(tmp_path / "boxes.pkl"))
    assert "masks" not in pickle.loads((tmp_path / "boxes.pkl").read_bytes())


def test_masks_that_a_pickle_cannot_hold_are_named(entries, tmp_path):
    path = str(tmp_path / "bad.pkl")
    result = entries[1]["results"][3]
    whole = result.pop("segmentation")
    with pytest.raises(ValueError, match=r"bad\.pkl: image 2: segmentation 3 is not a compressed"):
        write_pickle(entries, path, masks=True)
    result["segmentation"] = {"size": [7, 8], "counts": whole["counts"]}
    with pytest.raises(ValueError, match=r"image 2: segmentation 3 has the size \[7, 8\]"):
        write_pickle(entries, path, masks=True)
    result["segmentation"] = [[0, 0, 5, 0, 5, 5]]
    with pytest.raises(ValueError, match=r"image 2: segmentation 3 is not a compressed"):
        write_pickle(entries, path, masks=True)
    assert not Path(path).exists()


def _rewrite(path: str, change) -> str:
    content = pickle.loads(Path(path).read_bytes())
    change(content)
    Path(path).write_bytes(pickle.dumps(content))
    return path


def _dicts(path: str) -> list:
    return load_proposal_masks(get_detection_dataset_dicts([NAME], False, proposal_files=[path]), path)


def test_masks_are_in_the_order_in_which_detectron2_sorts_boxes(pickled, entries):
    _rewrite(pickled, lambda content: content.update(ids=[str(i) for i in content["ids"]]))
    for record, entry in zip(_dicts(pickled), entries):
        counts = record["proposal_masks"]["counts"].split(b"\n")
        order = record["proposal_masks"]["order"]
        assert sorted(order) == list(range(len(entry["results"])))
        for box, place in zip(record["proposal_boxes"], order):
            x0, y0, w, h = mask_util.toBbox({"size": list(SIZE), "counts": counts[place]})
            assert box.tolist() == [x0, y0, x0 + w, y0 + h]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["ids"].__setitem__(1, 99), r"proposals\.pkl has no image 2.*compute_proposals"),
        (lambda c: c["masks"].__setitem__(0, {"size": list(SIZE), "counts": b""}), r"image 1: .*'masks': 0"),
        (lambda c: c["masks"][1].update(size=[160, 120]), r"masks of image 2 are of size \(160, 120\)"),
        (
            lambda c: c["masks"][1].update(counts=c["masks"][1]["counts"] + b"o"),
            r"proposals\.pkl: mask \d+ of image 2 is broken RLE",
        ),
        (lambda c: c.pop("boxes"), r"proposals\.pkl is not a proposal file, because it has no boxes"),
    ],
)
def test_errors_name_file_image_and_remedy(pickled, cfg, change, message):
    _rewrite(pickled, change)
    with pytest.raises(ValueError, match=message):
        get_proposal_dicts([NAME], [pickled], filter_empty=False, masks=True)
    with pytest.raises(ValueError, match=message):
        Trainer.build_test_loader(cfg, NAME)


def test_missing_files_are_named(cfg):
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = ("nowhere.pkl",)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl.*compute_proposals"):
        Trainer.build_train_loader(cfg)
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = ()
    with pytest.raises(ValueError, match=rf"1 datasets \('{NAME}',\) but 0 proposal files"):
        Trainer.build_train_loader(cfg)
    cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    with pytest.raises(ValueError, match=f"PROPOSAL_FILES_TEST has no file for {NAME}"):
        Trainer.build_test_loader(cfg, NAME)


# ---------------------------------------------------------------------- mapper


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / max(1, (first | second).sum())


def test_pasted_sampled_masks_equal_the_masks_closely():
    rng = np.random.default_rng(0)
    small, large = [], []
    for sides, masks in (((3, 15), small), ((30, 200), large)):
        for _ in range(30):
            polygon = rng.normal(0, 1, (7, 2))
            # Sorted by angle, the corners form a connected shape.
            polygon = polygon[np.arctan2(*polygon.T).argsort()] * rng.uniform(*sides, (1, 2)) + (320, 240)
            masks.append(cv2.fillPoly(np.zeros((480, 640), np.uint8), [polygon.round().astype(np.int32)], 1))
    # A mask at the border of the image, and one that fills it.
    large += [np.pad(np.ones((100, 50), np.uint8), ((0, 380), (590, 0))), np.ones((480, 640), np.uint8)]
    pasted = sample_masks([compressed_rle(mask) for mask in small + large], (480, 640)).paste().numpy()
    ious = [_iou(mask > 0, back) for mask, back in zip(small + large, pasted)]
    assert np.mean(ious[: len(small)]) > 0.97
    assert min(ious[: len(small)]) > 0.9
    assert np.mean(ious[len(small) :]) > 0.96
    assert ious[-2:] == [1, 1]


def test_no_masks_and_empty_masks_can_be_sampled():
    assert sample_masks([], SIZE).paste().shape == (0, *SIZE)
    assert not sample_masks([compressed_rle(np.zeros(SIZE, bool))], SIZE).paste().any()


def _resized(mask: np.ndarray, size: tuple, flip: bool) -> np.ndarray:
    """Resized by nearest neighbour, in integer arithmetic of pixel centres."""
    rows = ((np.arange(size[0]) + 0.5) * mask.shape[0] / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * mask.shape[1] / size[1]).astype(int)
    mask = mask[rows][:, columns]
    return mask[:, ::-1] if flip else mask


@pytest.mark.parametrize(("size", "flip"), [((120, 160), False), ((240, 320), True), ((90, 200), True)])
def test_masks_follow_the_transforms_of_the_image(cfg, pickled, entries, size, flip):
    augmentations = [T.Resize(size), T.RandomFlip(prob=1.0 if flip else 0.0)]
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = 7
    mapper = ProposalMapper(cfg, False, augmentations=augmentations)
    stock = DatasetMapper(cfg, False, augmentations=augmentations)
    for record, entry in zip(_dicts(pickled), entries):
        mapped = mapper(record)
        proposals, expected = mapped["proposals"], stock(record)["proposals"]
        assert proposals.image_size == size
        assert torch.equal(proposals.proposal_boxes.tensor, expected.proposal_boxes.tensor)
        assert torch.equal(proposals.objectness_logits, expected.objectness_logits)
        assert len(proposals) == min(7, len(entry["results"]))
        order = np.array([r["score"] for r in entry["results"]], dtype=np.float32)
        # float32 logits and scores are in the same order; of the two equal scores either may be first.
        for number, pasted in enumerate(proposals.proposal_masks.paste().numpy()):
            score = 1 / (1 + np.exp(-float(proposals.objectness_logits[number])))
            same = np.flatnonzero(np.abs(order - score) < 1e-4)
            ious = [
                _iou(_resized(mask_util.decode(entry["results"][i]["segmentation"]) > 0, size, flip), pasted)
                for i in same
            ]
            assert max(ious) > 0.93


def test_dropped_boxes_have_no_masks(cfg, pickled):
    def flatten(content):
        content["boxes"][0][4, 2] = content["boxes"][0][4, 0]  # a box without width

    _rewrite(pickled, flatten)
    record = _dicts(pickled)[0]
    proposals = ProposalMapper(cfg, False)(record)["proposals"]
    assert len(proposals) == 11
    boxes = proposals.proposal_masks.boxes().tensor
    assert (boxes - proposals.proposal_boxes.tensor).abs().max() <= 1


def test_mapper_does_not_change_the_dataset(cfg, pickled):
    record = _dicts(pickled)[0]
    before = dict(record)
    ProposalMapper(cfg, False)(record)
    assert record.keys() == before.keys()
    assert all(record[key] is before[key] for key in before)


def test_training_has_masks_only_if_asked(cfg, pickled):
    record = _dicts(pickled)[0]
    mapped = ProposalMapper(cfg, True)(record)
    assert "proposal_masks" not in mapped
    assert not mapped["proposals"].has("proposal_masks")
    assert len(mapped["instances"]) == 2
    assert ProposalMapper(cfg, True, masks=True)(record)["proposals"].has("proposal_masks")


def test_transforms_that_masks_cannot_follow_are_named(cfg, pickled):
    record = _dicts(pickled)[0]
    with pytest.raises(ValueError, match="VFlipTransform"):
        ProposalMapper(cfg, False, augmentations=[T.RandomFlip(prob=1.0, horizontal=False, vertical=True)])(record)
    cfg.INPUT.CROP.ENABLED = True
    with pytest.raises(ValueError, match=r"INPUT\.CROP"):
        Trainer.build_train_loader(cfg)


# ---------------------------------------------------------------------- training and evaluation


def test_trainer_loads_masks_only_for_heads_that_keep_them(cfg, entries, pickled, caplog):
    def has_masks():
        (inputs,) = next(iter(Trainer.build_test_loader(cfg, NAME)))
        return inputs["proposals"].has("proposal_masks")

    assert has_masks()
    cfg.MODEL.SHARPMASK.DETECTION_MASKS = "none"
    assert not has_masks()
    cfg.MODEL.SHARPMASK.DETECTION_MASKS = "proposal"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    assert not has_masks()
    cfg.MODEL.ROI_HEADS.NAME = "ProposalMaskROIHeads"
    _rewrite(pickled, lambda content: content.pop("masks"))
    with caplog.at_level(logging.INFO, logger="sharpmask_d2"):
        assert not has_masks()
    assert "proposals.pkl has no masks" in caplog.text


@pytest.mark.parametrize("amp", [False, True])
def test_a_detector_trains_and_is_evaluated(cfg, amp):
    cfg.SOLVER.AMP.ENABLED = amp
    cfg.TEST.EVAL_PERIOD = 2
    seen = []
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = Trainer(cfg)
    layer = trainer.model.roi_heads.box_head.fc1
    layer.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.dtype)))
    trainer.train()
    assert (True, torch.bfloat16 if amp else torch.float32) in seen
    # The evaluation does not depend on the precision of training.
    assert {dtype for training, dtype in seen if not training} == {torch.float32}
    assert np.isfinite(trainer.storage.history("total_loss").latest())
    results = trainer._last_eval_results
    assert results.keys() == {"bbox", "segm"}
    assert {"AP", "AP50"} <= results["segm"].keys()


def test_recall_of_a_pickle_equals_that_of_the_results(pickled, entries, drawn):
    results = [{**r, "image_id": entry["image_id"]} for entry in entries for r in entry["results"]]
    expected = evaluate_proposal_json(drawn[0][1], results)
    found = evaluate_proposal_file(NAME, pickled)
    assert found.keys() == {"proposal_segm", "proposal_bbox"}
    for kind in ("segm", "bbox"):
        assert found[f"proposal_{kind}"] == pytest.approx(expected[kind], nan_ok=True)
    # In two of the three images, all objects are among the proposals.
    assert 50 < found["proposal_segm"]["AR@100"] < 80


def test_eval_only_of_a_detector_prints_ap_and_recall(cfg, drawn, tmp_path):
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "detector.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "detector.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    script = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "train_net.py")]
    done = subprocess.run(
        [*script, "--config-file", str(tmp_path / "config.yaml"), "--dataset", *drawn[0], "--eval-only"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for task in ("bbox", "segm", "proposal_bbox", "proposal_segm"):
        assert f"Task: {task}\n" in done.stdout
    assert "AR@1000" in done.stdout


@pytest.fixture
def online_cfg(tiny_cfg, drawn):
    """The config of a detector with a proposal generator, whose images are enlarged by a factor of 2."""
    cfg = to_detector(tiny_cfg, "ProposalMaskROIHeads")
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMask"
    cfg.MODEL.SHARPMASK.TEST.SCALES = [-1.0]
    cfg.DATASETS.TEST = (NAME,)
    cfg.INPUT.MIN_SIZE_TEST = 2 * SIZE[0]
    return cfg


def test_a_detector_with_its_own_proposals_is_evaluated_with_them(online_cfg):
    torch.manual_seed(0)
    model = Trainer.build_model(online_cfg)
    model.eval()
    results = Trainer.test(online_cfg, model)
    assert list(results) == ["bbox", "segm", "proposal_segm", "proposal_bbox"]
    assert json.loads(Path(online_cfg.OUTPUT_DIR, "proposal_metrics.json").read_text()).keys() == {"segm", "bbox"}
    # The model is unchanged afterwards.
    assert not model.training
    assert not model.roi_heads.training
    assert not model.proposal_generator._forward_hooks
    online_cfg.MODEL.SHARPMASK.TEST.FULL_IMAGES = False
    assert Trainer.test(online_cfg, model.train()).keys() == {"bbox", "segm"}
    assert model.training


def test_generated_proposals_are_in_the_frame_of_the_original_image(online_cfg):
    torch.manual_seed(0)
    model = Trainer.build_model(online_cfg).eval()
    (inputs,) = next(iter(Trainer.build_test_loader(online_cfg, NAME)))
    assert tuple(inputs["image"].shape[1:]) == (240, 320)
    with torch.no_grad():
        (plain,) = model([inputs])
        (output,) = WithGeneratedProposals(model)([inputs])
        images = model.preprocess_image([inputs])
        (generated,), _ = model.proposal_generator(images, {}, None)
    assert torch.equal(plain["instances"].pred_boxes.tensor, output["instances"].pred_boxes.tensor)
    found = output["generated_proposals"]
    assert found.image_size == SIZE
    assert len(found) > 0
    # Every second pixel of the enlarged mask, on average over both.
    for large, small in zip(generated.proposal_masks.paste().numpy(), found.proposal_masks.paste().numpy()):
        assert abs(large.mean() - small.mean()) < 0.01
    assert torch.equal(found.objectness_logits, generated.objectness_logits[: len(found)])


class _Fixed(torch.nn.Module):
    """Stands for a generator: proposes the objects of an image, in the frame of the resized image."""

    def __init__(self, rles: list, scale: float):
        super().__init__()
        self.rles, self.scale = rles, scale

    def forward(self, images, features, gt_instances=None):
        size = tuple(images.image_sizes[0])
        masks = sample_masks(self.rles.pop(0), SIZE).scale(self.scale, self.scale, size)
        proposals = Instances(size)
        proposals.proposal_boxes = Boxes(masks.boxes().tensor)
        proposals.objectness_logits = torch.arange(len(masks)).float()
        proposals.proposal_masks = masks
        return [proposals], {}


def test_perfect_proposals_have_perfect_recall_at_any_size_of_the_input(online_cfg, drawn):
    model = Trainer.build_model(online_cfg).eval()
    model.proposal_generator = _Fixed([[compressed_rle(mask) for mask in masks] for masks in drawn[1].values()], 2.0)
    results = Trainer.test(online_cfg, model)
    assert results["proposal_segm"]["Recall@10-IoU80"] == 100
    assert results["proposal_bbox"]["Recall@10-IoU80"] == 100


def test_the_backbone_of_a_detector_has_a_learning_rate_of_its_own(online_cfg):
    model = build_model(online_cfg)
    groups = optimizer_params(model, base_lr=0.1, trunk_multiplier=0.5)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    named = {name: rates.get(parameter) for name, parameter in model.named_parameters()}
    assert {rate for name, rate in named.items() if name.startswith("backbone.res4")} == {0.05}
    assert {rate for name, rate in named.items() if name.startswith("roi_heads.")} == {0.1}
    # The generator is frozen.
    assert {rate for name, rate in named.items() if name.startswith("proposal_generator.")} == {None}


def test_batches_of_images_with_proposals_depend_on_their_number_only(cfg):
    def take(loader, count):
        return [x for batch in itertools.islice(loader, count) for x in batch]

    whole = take(Trainer.build_train_loader(cfg), 6)
    resumed = Trainer.build_train_loader(cfg)
    iterator = iter(resumed)
    resumed.start = 4
    np.random.seed(7)  # noqa: NPY002
    for image, same in zip(take(iterator, 2), whole[8:]):
        assert image["image_id"] == same["image_id"]
        assert torch.equal(image["image"], same["image"])
        assert torch.equal(image["proposals"].proposal_boxes.tensor, same["proposals"].proposal_boxes.tensor)
        assert torch.equal(image["instances"].gt_boxes.tensor, same["instances"].gt_boxes.tensor)
    # Images are mirrored at random.
    assert len({image["image"].float().mul(torch.arange(image["image"].shape[-1])).sum().item() for image in whole}) > 3
