"""Detections of many images: what tools/demo.py does."""

from pathlib import Path
from typing import Optional

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

from .caching import keep_between_images
from .compute import InputImage, build_config, list_inputs, process_images
from .model_zoo import DEFAULT_DETECTOR
from .predictor import DetectionPredictor
from .proposal_files import ProposalWriter


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
        raise ValueError(f"DATASETS.TRAIN: the classes of {name!r} are not known: register it with --dataset")
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
        exit status: 1 if an image could not be read, else 0.
    """
    keep_between_images()
    images = list_inputs(input)
    cfg = build_config(model=model, config_file=config_file, weights=weights, opts=opts)
    metadata = dataset_metadata(cfg.DATASETS.TRAIN[0])
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"config": cfg.MODEL.dump(), "input": [cfg.INPUT.FORMAT, *(str(image.path) for image in images)]}
    writer = ProposalWriter(folder / "detections.json", settings)
    predictor = DetectionPredictor(cfg)

    def work(image: InputImage, pixels: np.ndarray) -> list:
        instances = predictor(pixels).to("cpu")
        shown = instances[instances.scores >= score_threshold]
        cv2.imwrite(str(folder / f"{image.path.stem}.jpg"), draw_detections(pixels, shown, metadata))
        return detection_results(instances, image.image_id, metadata, **image.extra)

    broken = process_images(images, writer, work, desc="detections")
    count = writer.finish(keep_partial=broken > 0)
    print(f"wrote {count} detections of {len(writer.done)} images: {writer.output}")
    print(f"wrote pictures of them: {folder}")
    return int(broken > 0)
