"""Proposals of many images: what tools/compute_proposals.py does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Optional

import cv2
import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data.detection_utils import read_image
from tqdm import tqdm

from . import model_zoo
from .caching import keep_between_images
from .config import add_sharpmask_config
from .model_zoo import DEFAULT
from .predictor import ProposalPredictor
from .proposal_files import ProposalWriter, to_results
from .visualization import choose_distinct, draw_masks

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}

# How many proposals a picture shows, of those that differ.
_SHOWN = 8


class InputImage(NamedTuple):
    """An image to work on; `extra` goes into each of its results."""

    image_id: int
    path: Path
    extra: dict


def list_inputs(paths: list) -> list:
    """Images given as files and folders, numbered from 1 in the order of their names.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without images.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"--input: the folder {path} has no images")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"--input: there is no {path}")
    return [InputImage(i, path, {"file_name": path.name}) for i, path in enumerate(files, start=1)]


def list_annotated(annotations: str, image_root: str) -> list:
    """Images that a COCO JSON lists.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: not a COCO JSON.
    """
    for path in (annotations, image_root):
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no {path}")
    try:
        images = json.loads(Path(annotations).read_text())["images"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{annotations} is not a COCO annotation file: {error!r}") from error
    return [InputImage(image["id"], Path(image_root) / image["file_name"], {}) for image in images]


def build_config(
    model: str = DEFAULT,
    config_file: Optional[str] = None,
    weights: Optional[str] = None,
    num_proposals: Optional[int] = None,
    opts: tuple = (),
) -> CfgNode:
    """The config to run: a packaged model or a file, with changes.

    Args:
        model: name in the model zoo, if there is no config file.
        config_file: yaml.
        weights: instead of MODEL.WEIGHTS.
        num_proposals: instead of MODEL.SHARPMASK.TEST.NUM_PROPOSALS.
        opts: KEY VALUE pairs.
    """
    if config_file:
        cfg = get_cfg()
        add_sharpmask_config(cfg)
        cfg.merge_from_file(config_file)
        cfg.MODEL.DEVICE = model_zoo.device()
    else:
        cfg = model_zoo.get(model)
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    if num_proposals is not None:
        cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = num_proposals
    cfg.merge_from_list(list(opts))
    cfg.freeze()
    return cfg


def process_images(images: list, writer: ProposalWriter, work: Callable, *, desc: str) -> int:
    """Work on the images that `writer` has not done yet, and let it keep the results; images that cannot be read are named.

    Args:
        images: list of InputImage.
        writer: gets the results of each image.
        work: makes them of an InputImage and its pixels (H, W, 3), uint8, BGR.
        desc: what the progress bar says.

    Returns:
        how many images could not be read.
    """
    broken = 0
    todo = [image for image in images if image.image_id not in writer.done]
    if len(todo) < len(images):
        print(f"{len(images) - len(todo)} of {len(images)} images are done already, in {writer.partial}")
    for image in tqdm(todo, unit="image", desc=desc):
        try:
            pixels = read_image(str(image.path), format="BGR")
        except (OSError, SyntaxError, ValueError) as error:
            tqdm.write(f"cannot read image {image.image_id}, {image.path}: {error}; it is left out", file=sys.stderr)
            broken += 1
            continue
        writer.add(image.image_id, work(image, np.ascontiguousarray(pixels)))
    return broken


def compute_proposals(
    *,
    output: str,
    input: Optional[list] = None,
    annotations: Optional[str] = None,
    image_root: Optional[str] = None,
    visualize: Optional[str] = None,
    pkl: Optional[str] = None,
    pkl_masks: bool = False,
    dtype: str = "float32",
    compiled: bool = False,
    **config,
) -> int:
    """Compute proposals of images and write them; see tools/compute_proposals.py.

    Args:
        output: JSON to write.
        input: files and folders; or
        annotations, image_root: a COCO JSON and the folder of its images.
        visualize: folder for pictures.
        pkl: pickle to write.
        pkl_masks: with the masks.
        dtype, compiled: see `ProposalPredictor`.
        config: see `build_config`.

    Returns:
        exit status: 1 if an image could not be read, else 0.
    """
    keep_between_images()
    images = list_inputs(input) if input else list_annotated(annotations, image_root)
    cfg = build_config(**config)
    inputs = [str(image.path) for image in images]
    writer = ProposalWriter(output, {"config": cfg.MODEL.dump(), "input": [cfg.INPUT.FORMAT, *inputs], "dtype": dtype})
    predictor = ProposalPredictor(cfg, dtype=dtype, compiled=compiled)
    if visualize:
        Path(visualize).mkdir(parents=True, exist_ok=True)

    def work(image: InputImage, pixels: np.ndarray) -> list:
        results = to_results(predictor(pixels), image.image_id, **image.extra)
        if visualize:
            _write_picture(pixels, results, Path(visualize) / f"{image.path.stem}.jpg")
        return results

    broken = process_images(images, writer, work, desc="proposals")
    # With the partial file, a run after the images are mended has to do only those.
    count = writer.finish(pkl or "", pickle_masks=pkl_masks, keep_partial=broken > 0)
    print(f"wrote {count} proposals of {len(writer.done)} images: {output}" + (f", {pkl}" if pkl else ""))
    if visualize:
        print(f"wrote pictures of them: {visualize}")
    if broken:
        print(f"{broken} images could not be read, see above", file=sys.stderr)
    return int(broken > 0)


def _write_picture(pixels: np.ndarray, results: list, path: Path) -> None:
    rles = [result["segmentation"] for result in results[:200]]
    shown = choose_distinct(rles, _SHOWN)
    cv2.imwrite(str(path), draw_masks(pixels, [rles[i] for i in shown]))
