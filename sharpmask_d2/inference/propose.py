"""Proposals of many images: what tools/compute_proposals.py does."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from detectron2.config import CfgNode
from PIL import Image
from tqdm import tqdm

from .. import __version__, model_zoo
from ..config import merge_options, read_config
from ..data.coco import load_images
from ..data.failed_images import FailedImages
from ..data.images import read_image
from ..io.fingerprint import config_settings, digest_file
from ..io.outputs import check_outputs
from ..io.proposal_files import ProposalWriter, to_results
from ..model_zoo import DEFAULT
from ..visualization import choose_distinct, draw_masks, name_pictures, write_picture
from .caching import keep_between_images
from .predictor import ProposalPredictor

# Of files in folders. AVIF is read by Pillow 11.3 and later.
_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif", ".avif"}

# How many proposals a picture shows, of those that differ.
_SHOWN = 8


class InputImage(NamedTuple):
    """An image to work on. `name` is its path within the folder it was found in, and `extra` goes into each of its results."""

    image_id: int
    path: Path
    name: str
    extra: dict


def list_inputs(paths: list) -> list:
    """Images given as files and folders, numbered from 1 in the order of their names.

    Folders are searched with their sub-folders; hidden files and folders are passed over. What else is passed over is printed.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without images.
    """
    files, others = {}, Counter()
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(_walk(path))
            suffixes = _SUFFIXES & Image.registered_extensions().keys()
            images = [p for p in inside if p.suffix.lower() in suffixes]
            if not images:
                raise FileNotFoundError(f"--input: the folder {path} has no images")
            others.update(p.suffix.lower() or "no suffix" for p in inside if p.suffix.lower() not in suffixes)
            for image in images:
                files.setdefault(image, path)
        elif path.exists():
            files.setdefault(path, path.parent)
        else:
            raise FileNotFoundError(f"--input: there is no {path}")
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        print(f"passed over in the folders, for their suffix: {kinds}")
    images = []
    for i, (path, folder) in enumerate(files.items(), start=1):
        name = path.relative_to(folder).as_posix()
        images.append(InputImage(i, path, name, {"file_name": name}))
    return images


def _walk(folder: Path, above: frozenset = frozenset()) -> Iterator[Path]:
    """Files in a folder and those below it, but hidden ones. A link to a folder that is being searched is not followed."""
    folders = above | {os.path.realpath(folder)}
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif os.path.realpath(path) not in folders:
            yield from _walk(path, folders)


def list_annotated(annotations: str, image_root: str) -> list:
    """Images that a COCO JSON lists.

    Raises:
        FileNotFoundError: no such file or folder.
        AnnotationError: see `data.coco.load_images`.
    """
    for path in (annotations, image_root):
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no {path}")
    images = load_images(annotations)
    return [InputImage(image.id, Path(image_root) / image.file_name, image.file_name, {}) for image in images]


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

    Raises:
        UserError: no such model, no config, no such key, or a value of another type.
    """
    if config_file:
        cfg = read_config(config_file)
        cfg.MODEL.DEVICE = model_zoo.device()
    else:
        cfg = model_zoo.get(model)
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    if num_proposals is not None:
        cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = num_proposals
    merge_options(cfg, opts)
    cfg.freeze()
    return cfg


def process_images(
    images: list,
    writer: ProposalWriter,
    work: Callable,
    *,
    desc: str,
    draw: Optional[Callable] = None,
    pictures: Optional[str] = None,
) -> tuple:
    """Work on the images that `writer` has not done yet, and let it keep the results; an image that cannot be done is named and left out.

    A run that goes on knows an image by the content of its file, not by its path or time: a picture that is added, replaced or removed
    concerns no other, and one that is renamed, copied or downloaded again is not done anew. To read the files takes about a hundredth of
    the time that the work took.

    Args:
        images: list of InputImage.
        writer: gets the results of each image.
        work: makes them of an InputImage and its pixels (H, W, 3), uint8, BGR.
        desc: what the progress bar says.
        draw: makes the picture of an image, as pixels, of an image's pixels and its results.
        pictures: folder for these; one that an earlier run did not write is made of the results that it left.

    Returns:
        the images that are done, in their order, as `ProposalWriter.finish` takes them, and the FailedImages.
    """
    failed = FailedImages()
    names = name_pictures(images) if pictures else [None] * len(images)
    keys = _known_keys(images, writer)
    if keys:
        print(f"{len(keys)} of {len(images)} images are done already, in {writer.partial}")
    finished = []
    for i, (image, name) in enumerate(zip(tqdm(images, unit="image", desc=desc), names)):
        pixels = None
        if i not in keys:
            results = None
            with failed.named(image.image_id, image.path):
                key = digest_file(image.path)
                pixels = read_image(image.path)
                results = work(image, pixels)
            if results is None:
                continue
            writer.add(key, results)
            keys[i] = key
        finished.append((keys[i], {"image_id": image.image_id, **image.extra}))
        if name is None or (writer.has_picture(keys[i], name) and (Path(pictures) / name).exists()):
            continue
        drawn = False
        with failed.named(image.image_id, image.path, consequence=f"it has no picture {name}"):
            pixels = read_image(image.path) if pixels is None else pixels
            write_picture(Path(pictures) / name, draw(pixels, writer.results(keys[i])))
            drawn = True
        if drawn:
            writer.add_picture(keys[i], name)
    return finished, failed


def _known_keys(images: list, writer: ProposalWriter) -> dict:
    """Index of an image -> its key, for the images that the writer has."""
    keys = {}
    # Without a run to go on with, a file is read only when its turn comes.
    for i, image in enumerate(images if writer.done else []):
        # One that cannot be read is named when its turn comes.
        with contextlib.suppress(OSError):
            key = digest_file(image.path)
            if key in writer.done:
                keys[i] = key
    return keys


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
        exit status: 1 if an image could not be done, else 0.

    Raises:
        FileNotFoundError: an input that does not exist.
        OutputError: see `check_outputs` and `ProposalWriter`.
    """
    keep_between_images()
    images = list_inputs(input) if input else list_annotated(annotations, image_root)
    cfg = build_config(**config)
    check_outputs(
        {"--output": output, "--pkl": pkl},
        inputs=[annotations, config.get("config_file"), cfg.MODEL.WEIGHTS],
        folders={"--visualize": visualize},
        images=[*(input or []), *(image.path for image in images)],
    )
    settings = {**config_settings(cfg), "--dtype": dtype, "--compile": compiled, "version": __version__}

    def work(image: InputImage, pixels: np.ndarray) -> list:
        return to_results(predictor(pixels), image.image_id, **image.extra)

    with ProposalWriter(output, settings) as writer:
        predictor = ProposalPredictor(cfg, dtype=dtype, compiled=compiled)
        finished, failed = process_images(
            images, writer, work, desc="proposals", draw=_draw_proposals, pictures=visualize
        )
        # With the partial file, a run after the images are mended has to do only those.
        count = writer.finish(pkl, images=finished, pickle_masks=pkl_masks, keep_partial=len(failed) > 0)
    print(f"wrote {count} proposals of {len(finished)} images: {output}" + (f", {pkl}" if pkl else ""))
    if visualize:
        print(f"wrote pictures of them: {visualize}")
    return failed.status()


def _draw_proposals(pixels: np.ndarray, results: list) -> np.ndarray:
    rles = [result["segmentation"] for result in results[:200]]
    return draw_masks(pixels, [rles[i] for i in choose_distinct(rles, _SHOWN)])
