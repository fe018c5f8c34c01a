"""Masks of many images, written as COCO files: the clean masks of whole images, or the masks of given boxes.

Shape letters: G boxes of an image.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from pycocotools import mask as mask_utils

from .. import __version__
from ..data.coco import AnnotationError, load_annotations, load_json
from ..errors import UserError
from ..evaluation.coco_results import check_results
from ..io.fingerprint import config_settings
from ..io.outputs import check_outputs
from ..io.shards import Shard
from ..visualization import draw_masks
from .automatic_mask_generator import SharpMaskAutomaticMaskGenerator
from .caching import bound_kept_memory, keep_between_images
from .configuration import build_config
from .image_files import (
    InputImage,
    Work,
    export_command,
    find_images,
    list_annotated,
    report_command,
    run_images,
)
from .predictor import ProposalPredictor
from .prompt_predictor import SharpMaskPredictor
from .ranks import is_first_rank


def segment_images(
    *,
    output: str,
    input: Optional[Sequence[str]] = None,
    annotations: Optional[str] = None,
    image_root: Optional[str] = None,
    visualize: Optional[str] = None,
    min_quality: Optional[float] = None,
    non_overlapping: bool = False,
    dtype: str = "float32",
    shard: Optional[Shard] = None,
    **config: Any,
) -> int:
    """Segments images with `SharpMaskAutomaticMaskGenerator` and writes COCO results, whose score is the predicted IoU.

    A run that was stopped resumes when it is started again with equal settings.

    Args:
        output: COCO result JSON to write.
        input: image files and folders; None reads the images from `annotations`.
        annotations: COCO JSON that lists the images; read only without `input`.
        image_root: folder of the images that `annotations` lists.
        visualize: folder for pictures of the masks; None writes none.
        min_quality: lowest predicted IoU of a mask, in 0..1; None: the generator's default.
        non_overlapping: see `SharpMaskAutomaticMaskGenerator`. Default: False.
        dtype: see `ProposalPredictor`.
        shard: see `run_images`.
        config: see `build_config`.

    Returns:
        Exit status: 1 if an image failed, else 0.

    Raises:
        FileNotFoundError: an input does not exist.
        OutputError: see `check_outputs` and `ProposalWriter`.
        UserError: see `build_config` and `SharpMaskAutomaticMaskGenerator`.
    """
    keep_between_images()
    images = find_images(input, annotations, image_root)
    cfg = build_config(**config)
    check_outputs(
        {"--output": output} if is_first_rank() else {},
        inputs=[annotations, config.get("config_file"), cfg.MODEL.WEIGHTS],
        folders={"--visualize": visualize},
        images=[*(input or []), *(image.path for image in images)],
    )
    options: dict[str, Any] = {"non_overlapping": non_overlapping}
    if min_quality is not None:
        options["pred_iou_thresh"] = min_quality
    settings = {**config_settings(cfg), "--dtype": dtype, "segment": options, "version": __version__}

    def prepare() -> Work:
        generator = SharpMaskAutomaticMaskGenerator(
            ProposalPredictor(cfg, dtype=dtype), output_mode="coco_rle", **options
        )

        def work(image: InputImage, pixels: np.ndarray) -> list[dict[str, Any]]:
            records = generator.generate(pixels)
            bound_kept_memory()
            return [
                {
                    "image_id": image.image_id,
                    **image.extra,
                    "category_id": 1,
                    "bbox": record["bbox"],
                    "score": record["predicted_iou"],
                    "area": record["area"],
                    "segmentation": record["segmentation"],
                }
                for record in records
            ]

        return work

    return run_images(
        images,
        output,
        settings,
        prepare,
        desc="masks",
        describe=lambda count, num_images: f"wrote {count} masks of {num_images} images: {output}",
        next_command=report_command(output, images, None if input else annotations, image_root),
        draw=_draw,
        pictures=visualize,
        shard=shard,
    )


class _Boxes(NamedTuple):
    """The boxes of a file."""

    images: list[InputImage]
    entries: dict[Hashable, list[dict]]  # image id -> results or annotations of the image
    document: Optional[dict[str, Any]]  # the dataset without its annotations; None for a file of results
    sizes: dict[Hashable, Optional[tuple[int, int]]]  # image id -> (H, W) that the file says


def segment_boxes(
    *,
    boxes: str,
    image_root: str,
    output: str,
    annotations: Optional[str] = None,
    visualize: Optional[str] = None,
    min_quality: Optional[float] = None,
    dtype: str = "float32",
    **config: Any,
) -> int:
    """Makes masks of the boxes of a COCO file, and writes a file of the same form with the masks.

    A run that was stopped resumes when it is started again with equal settings.

    Args:
        boxes: COCO result file, or COCO dataset, whose entries have a bbox.
        image_root: folder of the images.
        output: JSON to write. Entries get a segmentation (compressed RLE), mask_quality in 0..1 and, in a dataset, the area of the mask;
            entries whose mask is empty or below `min_quality` are left out. Annotations of crowds stay as they are.
        annotations: COCO JSON that lists the images; needed if `boxes` is a result file.
        visualize: folder for pictures of the masks; None writes none.
        min_quality: lowest quality of a mask, in 0..1; None keeps all.
        dtype: see `ProposalPredictor`.
        shard: see `run_images`.
        config: see `build_config`.

    Returns:
        Exit status: 1 if an image failed, else 0.

    Raises:
        FileNotFoundError: an input does not exist.
        OutputError: see `check_outputs` and `ProposalWriter`.
        UserError: a file is not valid, or an entry has no box; see also `build_config` and `SharpMaskPredictor`.
    """
    keep_between_images()
    given = _read_boxes(boxes, annotations, image_root)
    cfg = build_config(**config)
    check_outputs(
        {"--output": output} if is_first_rank() else {},
        inputs=[boxes, annotations, config.get("config_file"), cfg.MODEL.WEIGHTS],
        folders={"--visualize": visualize},
        images=[image.path for image in given.images],
    )
    lowest = min_quality or 0.0
    settings = {**config_settings(cfg), "--dtype": dtype, "--min-quality": lowest, "version": __version__}

    def prepare() -> Work:
        predictor = SharpMaskPredictor(cfg, dtype=dtype)

        def work(image: InputImage, pixels: np.ndarray) -> list[dict[str, Any]]:
            size = given.sizes[image.image_id]
            if size is not None and size != pixels.shape[:2]:
                raise UserError(f"its size (height, width) is {pixels.shape[:2]}, but the COCO file says {size}")
            entries = given.entries[image.image_id]
            objects = [entry for entry in entries if not entry.get("iscrowd")]
            found = _with_masks(predictor, pixels, objects, lowest, given)
            bound_kept_memory()
            return found + [entry for entry in entries if entry.get("iscrowd")]

        return work

    def name_boxes(image: InputImage) -> str:
        return hashlib.blake2b(json.dumps(given.entries[image.image_id]).encode(), digest_size=16).hexdigest()

    total = sum(len(given.entries[image.image_id]) for image in given.images)
    is_dataset = given.document is not None
    return run_images(
        given.images,
        output,
        settings,
        prepare,
        desc="masks",
        describe=lambda count, num_images: f"wrote {count} masks of {total} boxes in {num_images} images: {output}",
        # A report shows results only.
        next_command=export_command(output) if is_dataset else report_command(output, [], annotations, image_root),
        draw=_draw,
        pictures=visualize,
        more_input=name_boxes,
        dataset=given.document,
    )


def _read_boxes(path: str, annotations: Optional[str], image_root: str) -> _Boxes:
    if not Path(image_root).is_dir():
        raise FileNotFoundError(f"--image-root: there is no folder {image_root}")
    content = load_json(path)
    document = None
    if isinstance(content, dict):
        if annotations:
            raise UserError(f"{path} is a COCO dataset, which lists its images itself: leave out --annotations")
        coco = load_annotations(path)
        content, annotations = content["annotations"], path
        document = {key: value for key, value in coco.dataset.items() if key != "annotations"}
    else:
        if not annotations:
            raise UserError(f"{path} is not a COCO dataset: name the file that lists its images with --annotations")
        coco = load_annotations(annotations)
        check_results(coco, content, path)
    entries = defaultdict(list)
    for i, entry in enumerate(content):
        if not entry.get("bbox"):
            where = f"annotation {entry.get('id')}" if document else f"result {i}"
            raise AnnotationError(f"{path}: {where} has no bbox, which --boxes needs: add it or remove the entry")
        entries[entry["image_id"]].append(entry)
    sizes = {}
    for image_id, image in coco.imgs.items():
        known = image.get("height") and image.get("width")
        sizes[image_id] = (image["height"], image["width"]) if known else None
    images = list_annotated(annotations, image_root)
    if document is None:
        images = [image for image in images if image.image_id in entries]
    return _Boxes(images, entries, document, sizes)


def _with_masks(
    predictor: SharpMaskPredictor, pixels: np.ndarray, entries: list[dict], lowest: float, given: _Boxes
) -> list[dict]:
    """The entries of an image that get a mask, with it."""
    if not entries:
        return []
    corners = np.array([entry["bbox"] for entry in entries], dtype=np.float64)
    corners[:, 2:] += corners[:, :2]
    predictor.set_image(pixels)
    found = predictor.predict_masks(boxes=corners)
    rles, areas, scores = found.masks.rle(), found.masks.areas().tolist(), found.scores[:, 0].tolist()
    # Rounded before they are compared, so that the limit can be a quality that a file holds.
    scores = [round(score, 4) for score in scores]
    return [
        {**entry, "segmentation": rle, "mask_quality": score, **({"area": area} if given.document else {})}
        for entry, rle, area, score in zip(entries, rles, areas, scores)
        if area > 0 and score >= lowest
    ]


def _draw(pixels: np.ndarray, results: list[dict[str, Any]]) -> np.ndarray:
    rles = [result["segmentation"] for result in results if isinstance(result.get("segmentation"), dict)]
    return draw_masks(pixels, [rle for rle in rles if isinstance(rle["counts"], str) and mask_utils.area(rle)])
