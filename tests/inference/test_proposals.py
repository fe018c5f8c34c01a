"""Proposals of image files: predictor, `compute_proposals`, precomputed proposals and packaged models."""

import json
import os
import pickle
import platform
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.build import load_proposals_into_dataset
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import BoxMode, ImageList, Instances
from drawing import to_small_detector, write_with_weights
from pycocotools import mask as mask_util
from sharpmask_d2 import model_zoo
from sharpmask_d2.errors import UserError
from sharpmask_d2.inference import propose as compute
from sharpmask_d2.inference.caching import keep_between_images
from sharpmask_d2.inference.predictor import ProposalPredictor
from sharpmask_d2.inference.preparation import autocast, prepare_for_inference
from sharpmask_d2.io.proposal_files import ProposalWriter, to_results
from sharpmask_d2.modeling.layers import fold_batch_norm
from sharpmask_d2.visualization import choose_distinct, draw_masks


@pytest.fixture
def tiny_config(tiny_cfg, tmp_path):
    """A config file of a model with weights and 12 proposals per image."""
    cfg = tiny_cfg.clone()
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 12
    return write_with_weights(cfg, tmp_path)


def _compute(tiny_config, output, **options):
    return compute.compute_proposals(
        output=str(output), config_file=str(tiny_config), opts=["MODEL.DEVICE", "cpu"], **options
    )


def test_json_pickle_and_pictures_hold_the_proposals_of_all_images(tiny_config, photographs, tmp_path):
    output, pkl = tmp_path / "out" / "proposals.json", tmp_path / "proposals.pkl"
    status = _compute(tiny_config, output, input=[str(photographs)], pkl=str(pkl), visualize=str(tmp_path / "pictures"))
    assert status == 0
    results = json.loads(output.read_text())
    assert {r["image_id"] for r in results} == {1, 2, 3}
    assert {r["file_name"] for r in results} == {"0.png", "1.png", "2.png"}
    for result in results:
        assert result["category_id"] == 1
        assert 0 <= result["score"] <= 1
        np.testing.assert_allclose(mask_util.toBbox(result["segmentation"]), result["bbox"])
    content = pickle.loads(pkl.read_bytes())
    dicts = [{"image_id": i, "file_name": "x", "height": 80, "width": 100} for i in (1, 2, 3)]
    loaded = load_proposals_into_dataset(dicts, str(pkl))
    assert content["ids"] == [1, 2, 3]
    for d in loaded:
        mine = [r for r in results if r["image_id"] == d["image_id"]]
        boxes = BoxMode.convert(np.asarray(d["proposal_boxes"]), d["proposal_bbox_mode"], BoxMode.XYWH_ABS)
        np.testing.assert_allclose(boxes, [r["bbox"] for r in mine])
        probabilities = 1 / (1 + np.exp(-d["proposal_objectness_logits"].astype(np.float64)))
        np.testing.assert_allclose(probabilities, [r["score"] for r in mine], rtol=1e-4)
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_broken_image_is_reported_and_all_others_are_processed(tiny_config, photographs, tmp_path, capsys):
    whole = (photographs / "1.png").read_bytes()
    (photographs / "1.png").write_bytes(whole[:40])
    output = tmp_path / "proposals.json"
    assert _compute(tiny_config, output, input=[str(photographs)]) == 1
    assert "1.png" in capsys.readouterr().err
    assert {r["image_id"] for r in json.loads(output.read_text())} == {1, 3}
    # After the image is repaired, only this image is processed.
    (photographs / "1.png").write_bytes(whole)
    assert _compute(tiny_config, output, input=[str(photographs)]) == 0
    assert "2 of 3 images are done already" in capsys.readouterr().out
    assert {r["image_id"] for r in json.loads(output.read_text())} == {1, 2, 3}


def test_a_stopped_run_resumes_after_the_last_complete_line(tmp_path):
    output = tmp_path / "proposals.json"
    writer = ProposalWriter(str(output), {"a": 1})
    for image_id in (7, 8):
        writer.add(image_id, [{"image_id": image_id, "bbox": [0, 0, 1, 1], "score": 0.5}])
    # The run is killed while it writes a third line.
    with open(writer.partial, "ab") as file:
        file.write(b'{"image": 9, "resul')
    writer.close()
    with pytest.raises(ValueError, match=r"proposals\.json\.partial .* a was 1 and is 2\."):
        ProposalWriter(str(output), {"a": 2})
    again = ProposalWriter(str(output), {"a": 1})
    assert again.done == {7, 8}
    again.add(9, [])
    again.add(10, [{"image_id": 10, "bbox": [0, 0, 1, 1], "score": 0.5}])
    assert again.finish() == 3
    assert [r["image_id"] for r in json.loads(output.read_text())] == [7, 8, 10]


def test_a_run_without_a_finished_image_does_not_block_other_settings(tmp_path):
    output = tmp_path / "proposals.json"
    ProposalWriter(str(output), {"a": 1})
    writer = ProposalWriter(str(output), {"a": 2})
    writer.add(7, [{"image_id": 7, "bbox": [0, 0, 1, 1], "score": 0.5}])
    writer.close()
    assert ProposalWriter(str(output), {"a": 2}).done == {7}
    with pytest.raises(ValueError, match="a was 2 and is 1"):
        ProposalWriter(str(output), {"a": 1})


def test_images_of_an_annotation_file_keep_their_ids(tiny_config, make_dataset, tmp_path):
    json_file, image_root, _ = make_dataset(tmp_path / "data")
    output = tmp_path / "proposals.json"
    assert _compute(tiny_config, output, annotations=str(json_file), image_root=str(image_root), num_proposals=3) == 0
    ids = {image["id"] for image in json.loads(json_file.read_text())["images"]}
    assert {r["image_id"] for r in json.loads(output.read_text())} <= ids


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({"input": ["nowhere.jpg"]}, "nowhere"), ({"annotations": "none.json", "image_root": "."}, "none.json")],
)
def test_errors_name_missing_inputs(tiny_config, tmp_path, inputs, message):
    with pytest.raises(FileNotFoundError, match=message):
        _compute(tiny_config, tmp_path / "p.json", **inputs)


def test_errors_name_broken_annotation_files(tiny_config, tmp_path):
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        _compute(tiny_config, tmp_path / "p.json", annotations=str(tmp_path / "bad.json"), image_root=str(tmp_path))


def test_the_predictor_rejects_wrong_images_and_architectures(tiny_cfg):
    predictor = ProposalPredictor(tiny_cfg)
    with pytest.raises(ValueError, match="float32"):
        predictor(np.zeros((5, 5, 3), np.float32))
    with pytest.raises(ValueError, match="shape"):
        predictor(np.zeros((0, 5, 3), np.uint8))
    cfg = tiny_cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(ValueError, match="GeneralizedRCNN"):
        ProposalPredictor(cfg)


def test_proposals_of_a_batch_equal_those_of_single_images(tiny_cfg):
    predictor = ProposalPredictor(tiny_cfg)
    rng = np.random.default_rng(0)
    sizes = [(60, 80), (50, 90), (60, 80)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    batches = []
    predictor.model.pyramid.network.trunk.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    together = predictor.of_batch(images)
    assert [proposals.image_size for proposals in together] == sizes
    scales = len(tiny_cfg.MODEL.SHARPMASK.TEST.SCALES)
    assert sorted(batches) == [1] * scales + [2] * scales
    for image, proposals in zip(images, together):
        alone = predictor(image)
        torch.testing.assert_close(proposals.objectness_logits, alone.objectness_logits)
        assert torch.equal(proposals.proposal_boxes.tensor, alone.proposal_boxes.tensor)


def test_proposals_are_in_the_frame_of_the_original_image(tiny_cfg):
    model = build_model(tiny_cfg).eval()
    image = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0)) * 255
    plain, scaled = model([{"image": image}, {"image": image, "height": 120, "width": 240}])
    plain, scaled = plain["proposals"], scaled["proposals"]
    assert scaled.image_size == (120, 240)
    expected = plain.proposal_masks.windows * torch.tensor([3.0, 2.0, 3.0, 2.0])
    assert len(plain) == len(scaled)
    torch.testing.assert_close(scaled.proposal_masks.windows, expected)
    torch.testing.assert_close(scaled.proposal_boxes.tensor, scaled.proposal_masks.boxes().tensor)


def test_proposals_do_not_depend_on_the_channel_order_of_the_input(tiny_cfg):
    torch.manual_seed(0)
    rgb = build_model(tiny_cfg).eval()
    cfg = tiny_cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = "BGR" if tiny_cfg.INPUT.FORMAT == "RGB" else "RGB"
    bgr = build_model(cfg).eval()
    bgr.load_state_dict(rgb.state_dict())
    image = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0)) * 255
    a, b = rgb([{"image": image}])[0]["proposals"], bgr([{"image": image.flip(0)}])[0]["proposals"]
    torch.testing.assert_close(a.objectness_logits, b.objectness_logits)


def test_the_generator_of_a_detector_computes_the_proposals_of_the_stand_alone_network(tiny_cfg):
    cfg = tiny_cfg.clone()
    cfg.defrost()
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 20
    torch.manual_seed(0)
    alone = build_model(cfg).eval()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMask"
    generator = build_proposal_generator(cfg, {})
    generator.load_state_dict({f"pyramid.{name}": value for name, value in alone.pyramid.state_dict().items()})
    generator.train()  # a frozen generator also computes proposals in training
    image = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0)) * 255
    mean, std = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1), torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1)
    small = image[:, :40, :50]
    images = ImageList.from_tensors([(x - mean) / std for x in (image, small)])
    proposals, losses = generator(images, {})
    assert losses == {}
    for x, found in zip((image, small), proposals):
        expected = alone([{"image": x}])[0]["proposals"]
        assert found.image_size == tuple(x.shape[1:])
        torch.testing.assert_close(found.objectness_logits, expected.objectness_logits, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.proposal_boxes.tensor, expected.proposal_boxes.tensor, atol=2.0, rtol=0)
        assert len(found.proposal_masks) == len(found)


def test_proposals_of_all_scales_are_the_best_proposals_of_single_scales(tiny_cfg):
    torch.manual_seed(0)
    pyramid = build_model(tiny_cfg).eval().pyramid
    # Every mask is full, so that no window is left out, and no scale has 100 windows.
    pyramid.num_proposals, pyramid.mask_threshold = 100, -1e6
    image = torch.rand(3, 96, 130, generator=torch.Generator().manual_seed(0)) * 255
    found = []
    for pyramid.exponents in ([-1.0, -0.5, 0.0], [-1.0], [-0.5], [0.0]):
        (proposals,) = pyramid(image[None])
        scores, windows = proposals.objectness_logits.tolist(), proposals.proposal_masks.windows.tolist()
        found.append(list(zip(scores, map(tuple, windows), proposals.proposal_masks.logits)))
    together, *each = found
    best = sorted((item for items in each for item in items), key=lambda item: -item[0])[:100]
    assert max(map(len, each)) < len(together) == 100
    for (score, window, logits), (best_score, best_window, best_logits) in zip(together, best):
        assert score == pytest.approx(best_score)
        assert window == best_window
        torch.testing.assert_close(logits, best_logits)


def test_a_detector_with_sharpmask_proposals_detects(tiny_cfg):
    cfg = tiny_cfg.clone()
    to_small_detector(cfg, roi_heads="StandardROIHeads", num_classes=3)
    model = build_model(cfg).eval()
    with torch.no_grad():
        (output,) = model([{"image": torch.rand(3, 60, 80) * 255}])
    assert isinstance(output["instances"], Instances)


def test_results_hold_the_exact_masks(tiny_cfg):
    predictor = ProposalPredictor(tiny_cfg)
    proposals = predictor(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    for i, result in enumerate(to_results(proposals, 5)[:4]):
        assert result["segmentation"]["size"] == [50, 70]
        np.testing.assert_array_equal(mask_util.decode(result["segmentation"]), proposals.proposal_masks[i].paste()[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["deepmask_lite0", "sharpmask_lite0", "sharpmask_bifpn_lite0"])
def test_packaged_models_segment_a_disc(name, dtype):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    # The disc is 80 pixels wide. The canonical size at scale 1 is 92 pixels.
    cfg.MODEL.SHARPMASK.TEST.SCALES = [0.0]
    image = np.full((120, 160, 3), 255, np.uint8)
    cv2.circle(image, (80, 60), 40, (20, 40, 160), -1)
    proposals = ProposalPredictor(cfg, dtype=dtype)(image)
    assert str(proposals.proposal_masks.logits.dtype) == f"torch.{dtype}"
    disc = np.zeros((120, 160), np.uint8)
    cv2.circle(disc, (80, 60), 40, 1, -1)
    best = [mask_util.encode(np.asfortranarray(disc))]
    # One of the ten best proposals segments the disc.
    assert mask_util.iou(proposals.proposal_masks.rle()[:10], best, [0]).max() > 0.7


def test_an_unknown_model_is_an_error_that_lists_the_models():
    with pytest.raises(UserError, match="sharpmask_lite0"):
        model_zoo.get_config("sharpmask_lite1")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sharpmask_fpn_lite0", "sharpmask_bifpn_lite0"),
        ("multipath_fpn_lite0", "multipath_bifpn_lite0"),
        ("multipath_lite0", "multipath_bifpn_lite0"),
    ],
)
def test_a_model_of_an_earlier_version_is_an_error_that_names_its_successor(old, new):
    with pytest.raises(UserError, match=f"{old}.* in version 0.1 only: '{new}' takes its place"):
        model_zoo.get_config(old)
    assert old not in model_zoo.names()
    assert new in model_zoo.names()


def test_pictures_show_masks_that_differ():
    def square(x0, x1):
        mask = np.zeros((20, 30), np.uint8, order="F")
        mask[2:18, x0:x1] = 1
        return mask_util.encode(mask)

    rles = [square(0, 10), square(0, 11), square(15, 25), square(16, 25), square(26, 30)]
    assert choose_distinct(rles, 2) == [0, 2]
    assert choose_distinct(rles, 5) == [0, 2, 4]
    assert choose_distinct([], 3) == []
    picture = draw_masks(np.full((20, 30, 3), 100, np.uint8), [rles[0]])
    assert (picture[10, 20] == 100).all()
    assert (picture[10, 5] != 100).any()


def test_scores_under_autocast_are_close_to_those_of_full_precision(tiny_cfg):
    torch.manual_seed(0)
    model = build_model(tiny_cfg).eval()
    image = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0)) * 255
    exact = model([{"image": image}])[0]["proposals"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model([{"image": image}])[0]["proposals"]
    assert rounded.proposal_masks.logits.dtype == torch.bfloat16
    scale = exact.objectness_logits.abs().max()
    assert (exact.objectness_logits - rounded.objectness_logits).abs().max() <= 0.05 * scale


def test_casting_weights_once_gives_the_proposals_of_autocast(tiny_cfg):
    torch.manual_seed(0)
    model = build_model(tiny_cfg).eval()
    images = [{"image": torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0)) * 255}]
    with autocast(model.device, "bfloat16"):
        expected = fold_batch_norm(model)(images)[0]["proposals"]
        found = prepare_for_inference(model, "bfloat16")(images)[0]["proposals"]
    assert {p.dtype for p in model.pyramid.network.head.parameters()} == {torch.bfloat16}
    assert torch.equal(found.objectness_logits, expected.objectness_logits)
    logits, reference = found.proposal_masks.logits.float(), expected.proposal_masks.logits.float()
    assert (logits - reference).abs().max() <= 0.02 * reference.abs().max()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_a_compiled_model_computes_equal_scores(tiny_cfg):
    torch.manual_seed(0)
    model = fold_batch_norm(build_model(tiny_cfg).eval())
    generator = torch.Generator().manual_seed(0)
    images = [{"image": torch.rand(3, 60, 80, generator=generator) * 255}]
    with torch.no_grad():
        expected = model(images)[0]["proposals"]
        prepare_for_inference(model, compiled=True)
        found = model(images)[0]["proposals"]
    assert "forward" in vars(model.pyramid.network.trunk)
    torch.testing.assert_close(found.objectness_logits, expected.objectness_logits, atol=1e-4, rtol=1e-4)


def test_an_unknown_dtype_is_an_error_that_lists_the_choices(tiny_cfg):
    with pytest.raises(ValueError, match=r"'float16': choose from .*bfloat16"):
        ProposalPredictor(tiny_cfg, dtype="float16")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept_if_requested(keep):
    program = f"""
import re, torch
from sharpmask_d2.inference.caching import keep_between_images
assert not {keep} or keep_between_images()
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
before = resident()
torch.ones(100, 2**20).sum()
print(resident() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert (grown > 350) == keep


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_does_not_exceed_the_limit():
    program = """
import re, torch
from sharpmask_d2.inference.caching import bound_kept_memory, keep_between_images
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
keep_between_images(100 << 20)
before = resident()
for megabytes in (2, 15):
    # Every other block is freed, so that the end of the heap stays in use.
    blocks = [torch.ones(megabytes, 2**18) for _ in range(20)][::2]
    bound_kept_memory()
    print(resident() - before - 10 * megabytes)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    below, above = map(int, done.stdout.split())
    assert below > 15
    assert above < 15


@pytest.mark.parametrize(("set_before", "expected"), [(None, "8192"), ("77", "77")])
def test_the_number_of_kept_kernels_is_set_unless_the_user_has_set_it(monkeypatch, set_before, expected):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, set_before or "")
    if set_before is None:
        monkeypatch.delenv(name)
    keep_between_images()
    assert os.environ[name] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_computes_the_scores_of_the_cpu(tiny_cfg):
    torch.manual_seed(0)
    model = build_model(tiny_cfg).eval()
    image = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0)) * 255
    expected = model([{"image": image}])[0]["proposals"]
    found = model.cuda()([{"image": image}])[0]["proposals"].to("cpu")
    torch.testing.assert_close(found.objectness_logits, expected.objectness_logits, atol=1e-2, rtol=1e-2)
