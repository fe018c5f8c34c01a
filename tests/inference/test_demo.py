"""Detections of photographs: predictor, pictures and JSON."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from drawing import to_small_detector, write_with_weights
from pycocotools import mask as mask_util
from sharpmask_d2 import model_zoo
from sharpmask_d2.data import register_datasets
from sharpmask_d2.inference import detect
from sharpmask_d2.inference.predictor import DetectionPredictor


@pytest.fixture
def dataset(make_dataset, tmp_path):
    """Name of a registered dataset of drawn images with the categories 3 (odd) and 7 (even)."""
    drawn = make_dataset(tmp_path / "drawn")
    name = f"drawn_{tmp_path.name}"
    register_datasets([(name, str(drawn.annotations), str(drawn.image_root))])
    return name


@pytest.fixture
def detector_cfg(tiny_cfg, dataset):
    """The config of a small, untrained detector of two classes with SharpMask proposals."""
    cfg = tiny_cfg
    to_small_detector(cfg, roi_heads="ProposalMaskROIHeads", num_classes=2)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.TEST.DETECTIONS_PER_IMAGE = 6
    return cfg


@pytest.fixture
def config_file(detector_cfg, tmp_path):
    return write_with_weights(detector_cfg, tmp_path)


def run(config_file, photographs, output, **options) -> int:
    return detect.detect(
        input=[str(photographs)],
        output=str(output),
        config_file=str(config_file),
        opts=["MODEL.DEVICE", "cpu"],
        **options,
    )


def test_json_and_pictures_hold_the_detections_of_all_images(config_file, photographs, tmp_path):
    output = tmp_path / "out"
    assert run(config_file, photographs, output, score_threshold=0.0) == 0
    results = json.loads((output / "detections.json").read_text())
    assert {(r["image_id"], r["file_name"]) for r in results} == {(1, "0.png"), (2, "1.png"), (3, "2.png")}
    assert {(r["category_id"], r["category_name"]) for r in results} <= {(3, "odd"), (7, "even")}
    for result in results:
        assert 0 <= result["score"] <= 1
        assert result["segmentation"]["size"] == [80, 99 + result["image_id"]]
        assert mask_util.area(result["segmentation"]) > 0
    for i in range(3):
        before, after = cv2.imread(str(photographs / f"{i}.png")), cv2.imread(str(output / f"{i}.jpg"))
        assert before.shape == after.shape
        assert np.abs(before.astype(int) - after).mean() > 5


def test_pictures_show_only_detections_that_reach_the_threshold(config_file, photographs, tmp_path):
    run(config_file, photographs, tmp_path / "out", score_threshold=1.01)
    before, after = cv2.imread(str(photographs / "0.png")), cv2.imread(str(tmp_path / "out" / "0.jpg"))
    # The images differ only by the compression of JPEG.
    assert np.abs(before.astype(int) - after).mean() < 5


def test_a_broken_image_is_reported_and_all_others_are_processed(config_file, photographs, tmp_path, capsys):
    (photographs / "0.png").write_bytes(b"no image")
    assert run(config_file, photographs, tmp_path / "out") == 1
    assert "0.png" in capsys.readouterr().err
    assert {r["image_id"] for r in json.loads((tmp_path / "out" / "detections.json").read_text())} == {2, 3}


def test_results_have_the_category_ids_of_the_dataset(dataset):
    metadata = detect.dataset_metadata(dataset)
    instances = Instances((20, 30))
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 11.0, 6.0]]))
    instances.scores, instances.pred_classes = torch.tensor([0.5]), torch.tensor([1])
    instances.pred_masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    instances.pred_masks[0, 3:6, 2:10] = True
    (result,) = detect.detection_results(instances, 5, metadata, file_name="a.jpg")
    rle = result.pop("segmentation")
    assert result == {
        "image_id": 5,
        "category_id": 7,
        "category_name": "even",
        "bbox": [1.0, 2.0, 10.0, 4.0],
        "score": 0.5,
        "file_name": "a.jpg",
    }
    assert np.array_equal(mask_util.decode(rle).astype(bool), instances.pred_masks[0].numpy())


def test_a_dataset_without_class_names_is_an_error_that_names_it():
    MetadataCatalog.get("nobody_s_data")
    with pytest.raises(ValueError, match="nobody_s_data"):
        detect.dataset_metadata("nobody_s_data")


def test_the_packaged_detector_finds_the_astronaut():
    pytest.importorskip("skimage", reason="needs the photographs of scikit-image")
    from skimage.data import astronaut

    cfg = model_zoo.get_config(model_zoo.DEFAULT_DETECTOR)
    cfg.MODEL.DEVICE = "cpu"
    instances = DetectionPredictor(cfg)(astronaut()[:, :, ::-1])
    names = detect.dataset_metadata("coco_2017_train").thing_classes
    assert names[instances.pred_classes[0]] == "person"
    x0, y0, x1, y1 = instances.pred_boxes.tensor[0].tolist()
    # The box contains the face.
    assert x0 < 225 < x1
    assert y0 < 110 < y1
    assert instances.pred_masks[0].any()


def test_detections_are_in_the_frame_of_the_original_image(detector_cfg, config_file):
    detector_cfg.INPUT.MIN_SIZE_TEST = 160
    image = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    instances = DetectionPredictor(detector_cfg)(image)
    assert instances.image_size == (80, 100)
    assert instances.pred_masks.shape[1:] == (80, 100)
    assert (instances.pred_boxes.tensor <= torch.tensor([100, 80, 100, 80])).all()


def test_the_predictor_rejects_wrong_images_and_configs(detector_cfg, config_file):
    with pytest.raises(ValueError, match="float32"):
        DetectionPredictor(detector_cfg)(np.zeros((5, 5, 3), dtype=np.float32))
    detector_cfg.MODEL.LOAD_PROPOSALS = True
    with pytest.raises(ValueError, match="LOAD_PROPOSALS"):
        DetectionPredictor(detector_cfg)
    with pytest.raises(ValueError, match="a detector is needed"):
        DetectionPredictor(model_zoo.get_config("sharpmask_lite0"))


def test_weights_of_another_model_are_an_error(detector_cfg, config_file):
    detector_cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 12
    with pytest.raises(ValueError, match=r"model\.pth does not fit"):
        DetectionPredictor(detector_cfg)


def test_weights_of_the_generator_may_be_in_a_separate_file(detector_cfg, config_file, tmp_path):
    state = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    prefix = "proposal_generator."
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith(prefix)}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"lacks.*proposal_generator"):
        DetectionPredictor(detector_cfg)
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    torch.save({"model": own}, tmp_path / "sharpmask.pth")
    detector_cfg.MODEL.SHARPMASK.GENERATOR.WEIGHTS = str(tmp_path / "sharpmask.pth")
    generator = DetectionPredictor(detector_cfg).model.proposal_generator
    assert torch.equal(generator.pyramid.network.head.reduce.weight, own["pyramid.network.head.reduce.weight"])
