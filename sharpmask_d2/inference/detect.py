"""Detections of many images, written as COCO results and as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from pycocotools import mask as mask_util

from .. import __version__
from ..errors import UserError
from ..io.fingerprint import config_settings
from ..io.outputs import check_outputs
from ..io.shards import Shard
from ..model_zoo import DEFAULT_DETECTOR
from .caching import keep_between_images
from .configuration import build_config
from .image_files import InputImage, Work, list_inputs, report_command, run_images
from .predictor import DetectionPredictor
from .ranks import is_first_rank


def dataset_metadata(name: str) -> Metadata:
    """Returns the metadata of a dataset, with its class names in `thing_classes`.

    Args:
        name: of a registered dataset.

    Raises:
        UserError: the dataset is not registered, or has no class names.
    """
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes") and name in DatasetCatalog.list():
        # The classes of a dataset in COCO format are known once it has been read.
        DatasetCatalog.get(name)
    if not metadata.get("thing_classes"):
        raise UserError(f"DATASETS.TRAIN: the classes of {name!r} are not known: register it with --dataset")
    return metadata


def detection_results(
    instances: Instances, image_id: Union[int, str], metadata: Metadata, **extra: Any
) -> list[dict[str, Any]]:
    """Turns the detections of an image into COCO results.

    Args:
        instances: pred_boxes, scores, pred_classes and, optionally, pred_masks in the frame of the image, on the CPU.
        image_id: id of the image in the results.
        metadata: of the dataset that the detector was trained on.
        extra: more entries for every result.

    Returns:
        One dict per detection: image_id, category_id as in the dataset, category_name, bbox (x, y, width, height in pixels of the image),
        score and, if there are masks, segmentation (compressed RLE as text).
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


def instances_of_results(
    results: Sequence[dict[str, Any]], image_size: tuple[int, int], metadata: Metadata
) -> Instances:
    """Turns COCO results that `detection_results` made back into detections.

    Args:
        results: those of one image.
        image_size: (H, W) of the image.
        metadata: of the dataset that the detector was trained on.

    Returns:
        `Instances` with pred_boxes, scores, pred_classes and, if all results have a mask, pred_masks (N, H, W) bool.
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


def draw_detections(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """Draws masks, boxes, class names and scores over an image, with Detectron2's Visualizer.

    Args:
        image: (H, W, 3) uint8, BGR.
        instances: detections in the frame of the image, on the CPU.
        metadata: its `thing_classes` are the class names.

    Returns:
        (H, W, 3) uint8, BGR; a new array.
    """
    picture = Visualizer(image[:, :, ::-1], metadata).draw_instance_predictions(instances)
    return picture.get_image()[:, :, ::-1]


def detect(
    *,
    input: Sequence[str],
    output: str,
    score_threshold: float = 0.3,
    model: str = DEFAULT_DETECTOR,
    shard: Optional[Shard] = None,
    **config: Any,
) -> int:
    """Detects objects in images, and writes detections.json and one picture per image.

    A run that was stopped resumes when it is started again with equal settings.

    Args:
        input: image files and folders.
        output: folder to write to.
        score_threshold: lowest score of the detections that pictures show, in 0..1; the JSON file holds all detections.
        model: see `build_config`.
        shard: see `run_images`.
        config: see `build_config`.

    Returns:
        Exit status: 1 if an image failed, else 0.

    Raises:
        FileNotFoundError: an input does not exist.
        OutputError: see `check_outputs` and `ProposalWriter`.
        UserError: see `build_config` and `DetectionPredictor`.
    """
    keep_between_images()
    images = list_inputs(input)
    cfg = build_config(model, **config)
    if not cfg.DATASETS.TRAIN:
        raise UserError(
            "DATASETS.TRAIN is empty: it has to name the dataset whose classes the model detects; choose a detector"
        )
    metadata = dataset_metadata(cfg.DATASETS.TRAIN[0])
    folder = Path(output)
    file = folder / "detections.json"
    check_outputs(
        {"--output": file} if is_first_rank() else {},
        inputs=[config.get("config_file"), cfg.MODEL.WEIGHTS],
        folders={"--output": folder},
        images=[*input, *(image.path for image in images)],
    )
    settings = {
        **config_settings(cfg),
        "--score-threshold": score_threshold,
        "classes": list(metadata.thing_classes),
        "version": __version__,
    }

    def prepare() -> Work:
        predictor = DetectionPredictor(cfg)

        def work(image: InputImage, pixels: np.ndarray) -> list[dict[str, Any]]:
            return detection_results(predictor(pixels).to("cpu"), image.image_id, metadata, **image.extra)

        return work

    def draw(pixels: np.ndarray, results: list[dict[str, Any]]) -> np.ndarray:
        shown = [result for result in results if result["score"] >= score_threshold]
        return draw_detections(pixels, instances_of_results(shown, pixels.shape[:2], metadata), metadata)

    return run_images(
        images,
        file,
        settings,
        prepare,
        desc="detections",
        describe=lambda count, num_images: f"wrote {count} detections of {num_images} images: {file}",
        next_command=report_command(str(file), images),
        draw=draw,
        pictures=folder,
        shard=shard,
    )
