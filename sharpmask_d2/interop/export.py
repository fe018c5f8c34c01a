"""Writes a COCO file of masks in the formats of labelling tools."""

import json
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Optional
from urllib.parse import quote

import cv2
import yaml

from ..console import print_next, print_status
from ..errors import UserError
from ..io.outputs import check_outputs, write_output
from .coco import coco_dataset
from .cvat_files import cvat_annotations
from .label_maps import label_map
from .label_studio import label_studio_task, labelling_interface
from .labelled_images import LabelledImage, LabelledImages, read_labelled_images
from .labelme import labelme_file
from .yolo import yolo_dataset, yolo_labels


class _Options(NamedTuple):
    """What the writers of the formats need besides the masks."""

    output: Path
    shape: str
    image_root: Optional[str]
    image_url: Optional[str]


class _Format(NamedTuple):
    """A format that masks can be written in."""

    shapes: tuple[str, ...]  # the first is the default
    suffix: Optional[str]  # of the one file of each image; None for one file of all images
    encode: Callable[[Any, LabelledImages, Path, _Options], bytes]  # the content of a file of an image, or of all
    next: str  # command that uses the output, with {output} and {images}, the folder of the images
    inside: str = ""  # folder in the output in which the files of images lie


def _write_json(content: Any) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _coco(everything: LabelledImages, _: LabelledImages, path: Path, options: _Options) -> bytes:
    return _write_json(coco_dataset(everything, shape=options.shape))


def _cvat(everything: LabelledImages, _: LabelledImages, path: Path, options: _Options) -> bytes:
    return cvat_annotations(everything, shape=options.shape)


def _labelme(image: LabelledImage, everything: LabelledImages, path: Path, options: _Options) -> bytes:
    image_path = PurePosixPath(image.file_name).name
    if options.image_root is not None:
        image_path = Path(os.path.relpath(Path(options.image_root, image.file_name), path.parent)).as_posix()
    return _write_json(labelme_file(image, everything.labels, image_path=image_path, shape=options.shape))


def _label_studio(everything: LabelledImages, _: LabelledImages, path: Path, options: _Options) -> bytes:
    start = options.image_url
    tasks = []
    for image in everything.images:
        url = None if start is None else start + quote(image.file_name)
        tasks.append(label_studio_task(image, everything.labels, shape=options.shape, image_url=url))
    return _write_json(tasks)


def _yolo(image: LabelledImage, everything: LabelledImages, path: Path, options: _Options) -> bytes:
    classes = {category_id: number for number, category_id in enumerate(everything.labels)}
    return yolo_labels(image, classes, shape=options.shape).encode()


def _png(image: LabelledImage, everything: LabelledImages, path: Path, options: _Options) -> bytes:
    try:
        return cv2.imencode(".png", label_map(image))[1].tobytes()
    except ValueError as error:
        raise UserError(f"image {image.image_id}, {image.file_name}: {error} with --keep") from None


_ALL = ("mask", "polygon", "box")
_FORMATS = {
    "coco": _Format(_ALL, None, _coco, "cvat-cli task import-dataset TASK_ID {output} --format 'COCO 1.0'"),
    "cvat": _Format(_ALL, None, _cvat, "cvat-cli task import-dataset TASK_ID {output} --format 'CVAT 1.1'"),
    "labelme": _Format(_ALL, ".json", _labelme, "labelme {images} --output {output}"),
    "label-studio": _Format(_ALL, None, _label_studio, "label-studio start"),
    "yolo": _Format(("polygon", "box"), ".txt", _yolo, "cp -r {images} {output}/images", "labels"),
    "png": _Format(("mask",), ".png", _png, "python -m webbrowser {output}"),
}
FORMATS = tuple(_FORMATS)
SHAPES = ("mask", "polygon", "box")


def export_masks(
    proposals: str,
    *,
    to: str,
    output: str,
    annotations: Optional[str] = None,
    image_root: Optional[str] = None,
    keep: Optional[int] = None,
    min_score: Optional[float] = None,
    label: Optional[str] = None,
    shape: Optional[str] = None,
    image_url: Optional[str] = None,
) -> None:
    """Writes the masks of a COCO file in another format, and prints what was written.

    Args:
        proposals: COCO results or COCO dataset.
        to: one of `FORMATS`.
        output: folder for formats with one file per image, else the file.
        annotations, image_root, keep, min_score, label: see `read_labelled_images`. With `image_root`, the files of labelme name the images
            in this folder; without it, they have to be put beside their images.
        shape: "mask", "polygon" or "box". None takes what keeps most of a mask in this format.
        image_url: start of the URLs of the images, read for label-studio only; the file name follows. None takes the local storage of Label
            Studio.

    Raises:
        FileNotFoundError: an input does not exist.
        OutputError: see `check_outputs`; also if two images would be written to one file.
        UserError: the format does not have the shape, or a name of an image leads out of the folder; see also `read_labelled_images`.
    """
    form = _FORMATS[to]
    shape = shape or form.shapes[0]
    if shape not in form.shapes:
        raise UserError(f"--shape {shape}: the format {to} has {' and '.join(form.shapes)} only")
    if image_root is not None and not Path(image_root).is_dir():
        raise FileNotFoundError(f"--image-root: there is no folder {image_root}")
    content = read_labelled_images(
        proposals, annotations=annotations, image_root=image_root, keep=keep, min_score=min_score, label=label
    )
    options = _Options(Path(output), shape, image_root, image_url)
    files = dict(_files(content, form, options, annotations or proposals))
    images = [] if image_root is None else [Path(image_root, image.file_name) for image in content.images]
    check_outputs({option: path for option, (path, _) in files.items()}, inputs=[proposals, annotations, *images])
    for path, item in files.values():
        write_output(path, form.encode(item, content, path, options))
    if to == "yolo":
        write_output(options.output / "data.yaml", yaml.safe_dump(yolo_dataset(content.labels)).encode())
    count = sum(len(image.masks) for image in content.images)
    if to == "label-studio":
        print_status(f"labelling interface of the project: {labelling_interface(content.labels, shape=shape)}")
    print_status(f"wrote {count} masks of {len(content.images)} images: {output}")
    print_next([word.format(output=output, images=image_root or "IMAGES") for word in shlex.split(form.next)])


def _files(
    content: LabelledImages, form: _Format, options: _Options, listing: str
) -> Iterator[tuple[str, tuple[Path, Any]]]:
    """What messages call a file, its path, and what it holds: an image or all images. `listing` is the file that names the images."""
    if form.suffix is None:
        yield "--output", (options.output, content)
        return
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output: {options.output} is not a folder: this format has one file for each image")
    for image in content.images:
        name = PurePosixPath(image.file_name)
        if name.is_absolute() or ".." in name.parts or not name.name:
            raise UserError(
                f"{listing}: image {image.image_id} has the file_name {image.file_name}, which leads out of the folder {options.output}"
            )
        path = options.output / form.inside / name.with_suffix(form.suffix)
        yield f"--output, image {image.image_id}", (path, image)
