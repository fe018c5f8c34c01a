"""Detections of many images: what tools/demo.py does."""

from pathlib import Path
from typing import Optional

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from pycocotools import mask as mask_util

from .. import __version__
from ..errors import UserError
from ..io.fingerprint import config_settings
from ..io.outputs import check_outputs
from ..io.proposal_files import ProposalWriter
from ..model_zoo import DEFAULT_DETECTOR
from .caching import keep_between_images
from .predictor import DetectionPredictor
from .propose import InputImage, build_config, list_inputs, process_images


def dataset_metadata(name: str):
    """Metadata of a registered dataset, with its class names.

    Raises:
        ValueError: no such dataset.
    """
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes") and name in DatasetCatalog.list():
        # Datasets in COCO format learn their classes when they are read.
        DatasetCatalog.get(name)
    if not metadata.get("thing_classes"):
        raise UserError(f"DATASETS.TRAIN: the classes of {name!r} are not known: register it with --dataset")
    return metadata


def detection_results(instances: Instances, image_id, metadata, **extra) -> list:
    """Detections as COCO results.

    Args:
        instances: in the frame of the image, on the CPU.
        image_id: of the results.
        metadata: of the dataset that the detector was trained on.
        extra: more entries for every result.

    Returns:
        list of dicts: image_id, category_id as in the dataset, category_name, bbox (x, y, width, height), score and, if there are masks,
        segmentation (compressed RLE as text).
    """
    category_ids = {v: k for k, v in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
    results = []
    for result in instances_to_coco_json(instances, image_id):
        number = result["category_id"]
        result.update(
            category_id=category_ids.get(number, number), category_name=metadata.thing_classes[number], **extra
        )
        if "segmentation" in result:
            result["segmentation"]["size"] = list(result["segmentation"]["size"])
        results.append(result)
    return results


def instances_of_results(results: list, image_size: tuple, metadata) -> Instances:
    """What `detection_results` wrote, as instances.

    Args:
        results: of one image.
        image_size: (H, W).
        metadata: of the dataset that the detector was trained on.

    Returns:
        Instances with pred_boxes, scores, pred_classes and, if there are masks, pred_masks (N, H, W) bool.
    """
    numbers = metadata.get("thing_dataset_id_to_contiguous_id", {})
    instances = Instances(tuple(image_size))
    boxes = torch.tensor([result["bbox"] for result in results], dtype=torch.float32).reshape(-1, 4)
    instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    instances.scores = torch.tensor([result["score"] for result in results], dtype=torch.float32)
    classes = [numbers.get(result["category_id"], result["category_id"]) for result in results]
    instances.pred_classes = torch.tensor(classes, dtype=torch.long)
    if results and all("segmentation" in result for result in results):
        masks = mask_util.decode([result["segmentation"] for result in results])
        instances.pred_masks = torch.from_numpy(masks.transpose(2, 0, 1).astype(bool))
    return instances


def draw_detections(image: np.ndarray, instances: Instances, metadata) -> np.ndarray:
    """Masks, boxes, class names and scores over an image, by Detectron2's Visualizer.

    Args:
        image: (H, W, 3) uint8, BGR.
        instances: in the frame of the image, on the CPU.
        metadata: with thing_classes.

    Returns:
        (H, W, 3) uint8, BGR.
    """
    picture = Visualizer(image[:, :, ::-1], metadata).draw_instance_predictions(instances)
    return picture.get_image()[:, :, ::-1]


def detect(
    *,
    input: list,
    output: str,
    model: str = DEFAULT_DETECTOR,
    config_file: Optional[str] = None,
    weights: Optional[str] = None,
    score_threshold: float = 0.3,
    opts: tuple = (),
) -> int:
    """Detect objects in images and write detections.json and a picture of each image; see tools/demo.py.

    Args:
        input: files and folders.
        output: folder to write to.
        model, config_file, weights, opts: see `compute.build_config`.
        score_threshold: pictures show detections that reach it; the JSON has all.

    Returns:
        exit status: 1 if an image could not be done, else 0.

    Raises:
        FileNotFoundError: an input that does not exist.
        OutputError: see `check_outputs` and `ProposalWriter`.
    """
    keep_between_images()
    images = list_inputs(input)
    cfg = build_config(model=model, config_file=config_file, weights=weights, opts=opts)
    if not cfg.DATASETS.TRAIN:
        raise UserError(
            "DATASETS.TRAIN is empty: it names the data set whose classes the detector knows; choose a detector"
        )
    metadata = dataset_metadata(cfg.DATASETS.TRAIN[0])
    folder = Path(output)
    check_outputs(
        {"--output": folder / "detections.json"},
        inputs=[config_file, cfg.MODEL.WEIGHTS],
        folders={"--output": folder},
        images=[*input, *(image.path for image in images)],
    )
    settings = {
        **config_settings(cfg),
        "--score-threshold": score_threshold,
        "classes": list(metadata.thing_classes),
        "version": __version__,
    }

    def work(image: InputImage, pixels: np.ndarray) -> list:
        instances = predictor(pixels).to("cpu")
        return detection_results(instances, image.image_id, metadata, **image.extra)

    def draw(pixels: np.ndarray, results: list) -> np.ndarray:
        shown = [result for result in results if result["score"] >= score_threshold]
        return draw_detections(pixels, instances_of_results(shown, pixels.shape[:2], metadata), metadata)

    with ProposalWriter(folder / "detections.json", settings) as writer:
        predictor = DetectionPredictor(cfg)
        finished, failed = process_images(images, writer, work, desc="detections", draw=draw, pictures=output)
        count = writer.finish(images=finished, keep_partial=len(failed) > 0)
    print(f"wrote {count} detections of {len(finished)} images: {writer.output}")
    print(f"wrote pictures of them: {folder}")
    return failed.status()
