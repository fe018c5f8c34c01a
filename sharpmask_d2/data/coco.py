"""Reads and checks COCO annotation files, for all tools that take one."""

import contextlib
import io
import json
import logging
import os
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from ..errors import UserError

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# COCO's evaluation assigns an object with a larger area to no range of sizes.
_MAX_AREA = 1e10
_MAX_COORDINATE = 1e10
_REMEDY = "correct the annotation or remove it"


class AnnotationError(UserError):
    """A COCO annotation file cannot be used.

    The message is one line that names the file, the image or annotation, the wrong field, and what to do.
    """


class ListedImage(NamedTuple):
    """An image as an annotation file lists it."""

    id: Union[int, str]
    file_name: str  # path of its file, relative to the folder of images


def load_json(path: Union[str, os.PathLike]) -> Any:
    """The content of a JSON file.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the file is not JSON, or is nested too deeply; the message names it.
    """
    with open(path, encoding="utf-8-sig") as file:
        try:
            return json.load(file)
        except RecursionError:
            raise UserError(f"{os.fspath(path)} cannot be read: its JSON is nested too deeply") from None
        # Also for bytes that are not text, and for a number of several thousand digits.
        except ValueError as error:
            raise UserError(f"{os.fspath(path)} is not JSON: {error}") from error


def load_images(path: Union[str, os.PathLike]) -> list[ListedImage]:
    """The images that a COCO annotation file lists. Its annotations are not checked.

    Args:
        path: of the file.

    Returns:
        The images in the order of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        AnnotationError: the file is not a COCO annotation file, or an image has no id, no file_name, or the id of another image.
    """
    source = os.fspath(path)
    content = _load(source)
    _check_images(content, source)
    for number, image in enumerate(content["images"]):
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            found = f"file_name {reprlib.repr(name)}, not text" if "file_name" in image else "no file_name"
            raise AnnotationError(
                f"{source}: image {image['id']} (number {number} in the list) has {found}: name its file"
            )
    return [ListedImage(image["id"], image["file_name"]) for image in content["images"]]


def load_annotations(path: Union[str, os.PathLike]) -> "COCO":
    """Read a COCO annotation file for pycocotools and check it, see `check_annotations`.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        AnnotationError: the file is not a COCO annotation file, or a field is not valid.
    """
    # Only the list of images is read without pycocotools and Detectron2.
    from pycocotools.coco import COCO

    source = os.fspath(path)
    content = _load(source)
    check_annotations(content, source)
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    return coco


def image_size(coco: "COCO", image_id: Union[int, str]) -> Optional[tuple[int, int]]:
    """(height, width) of an image in pixels, or None if the annotation file does not say it."""
    image = coco.imgs[image_id]
    return (image["height"], image["width"]) if image.get("height") and image.get("width") else None


def load_records(json_file: str, image_root: str, name: Optional[str] = None) -> list[dict]:
    """Read a COCO annotation file with Detectron2's `load_coco_json`, check the annotations, and name the fault of an invalid file.

    Args:
        json_file: path of the annotation file.
        image_root: folder of the images.
        name: of the dataset whose metadata get the categories; none by default.

    Returns:
        Detectron2's dataset dicts.

    Raises:
        FileNotFoundError: the file does not exist.
        AnnotationError: see `load_annotations`; also if Detectron2 cannot read the file for another reason.
    """
    from detectron2.data.datasets import load_coco_json
    from detectron2.utils.file_io import PathManager

    source = PathManager.get_local_path(json_file)
    try:
        records = load_coco_json(json_file, image_root, name)
    except OSError:
        raise
    except Exception as error:
        # The file is read a second time only where it is invalid.
        content = load_annotations(source).dataset
        if not content.get("categories"):
            raise AnnotationError(
                f"{source} has no categories: training needs a list of their ids and names"
            ) from error
        for image in content["images"]:
            if missing := [key for key in ("file_name", "height", "width") if image.get(key) is None]:
                raise AnnotationError(
                    f"{source}: image {image['id']} has no {missing[0]}: training needs it"
                ) from error
        raise AnnotationError(f"{source}: Detectron2 cannot read it: {type(error).__name__}: {error}") from error
    _check_objects(
        (
            (
                annotation,
                f"{source}: annotation {number} of image {record['image_id']}",
                (record["height"], record["width"]),
            )
            for record in records
            for number, annotation in enumerate(record["annotations"])
        ),
        needed=("bbox", "category_id"),
    )
    return records


def check_annotations(content: Any, source: str) -> None:
    """Check the types and values of all fields of a COCO annotation file. Fields may be missing.

    Annotations of images that the file does not list are ignored, and their number is logged.

    Args:
        content: of the file.
        source: what messages call the file.

    Raises:
        AnnotationError: a field is not valid; the message names the first one.
    """
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise AnnotationError(f"{source} is not a COCO annotation file: 'images' and 'annotations' are expected")
    _check_images(content, source)
    sizes = {}
    for image in content["images"]:
        size = [image.get(side) for side in ("height", "width")]
        if size != [None, None] and not all(type(n) is int and n > 0 for n in size):
            raise AnnotationError(
                f"{source}: image {image['id']} has height, width {reprlib.repr(size)}: whole numbers of pixels are expected"
            )
        sizes[image["id"]] = None if size == [None, None] else tuple(size)
    keys: tuple[str, ...] = ("id", "image_id")
    if "categories" in content:
        # pycocotools sorts annotations by their category.
        keys += ("category_id",)
        for number, category in enumerate(_list_of_dicts(content, "categories", source)):
            if not _is_id(category.get("id")):
                raise AnnotationError(
                    f"{source}: category number {number} of the list has no id that is a whole number"
                )
    objects, unlisted = [], 0
    for number, annotation in enumerate(_list_of_dicts(content, "annotations", source)):
        for key in keys:
            if not _is_id(annotation.get(key)):
                found = (
                    f"{key} {reprlib.repr(annotation[key])}, not a whole number or text"
                    if key in annotation
                    else f"no {key}"
                )
                raise AnnotationError(f"{source}: annotation number {number} of the list has {found}: {_REMEDY}")
        if annotation["image_id"] in sizes:
            where = f"{source}: annotation {annotation['id']} of image {annotation['image_id']}"
            objects.append((annotation, where, sizes[annotation["image_id"]]))
        else:
            unlisted += 1
    _check_objects(objects)
    if unlisted:
        logging.getLogger(__name__).warning(
            f"{source}: {unlisted} of {len(content['annotations'])} annotations belong to images that it does not list; they are ignored"
        )


def _load(source: str) -> Any:
    try:
        return load_json(source)
    except ValueError as error:
        raise AnnotationError(f"{error}; a COCO annotation file is expected") from error


def _check_images(content: Any, source: str) -> None:
    if not isinstance(content, dict) or "images" not in content:
        raise AnnotationError(f"{source} is not a COCO annotation file: it has no 'images'")
    seen = set()
    for number, image in enumerate(_list_of_dicts(content, "images", source)):
        image_id = image.get("id")
        if not _is_id(image_id):
            found = f"id {reprlib.repr(image_id)}, not a whole number or text" if "id" in image else "no id"
            raise AnnotationError(f"{source}: image number {number} of the list has {found}: give it one")
        if image_id in seen:
            raise AnnotationError(f"{source}: two images have the id {image_id}: give every image its own id")
        seen.add(image_id)


def _list_of_dicts(content: dict[str, Any], key: str, source: str) -> list[dict]:
    values = content[key]
    if not isinstance(values, list):
        raise AnnotationError(f"{source} is not a COCO annotation file: {key!r} is not a list")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise AnnotationError(
                f"{source} is not a COCO annotation file: entry {number} of {key!r} is {reprlib.repr(value)}"
            )
    return values


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _check_objects(
    objects: Iterable[tuple[dict, str, Optional[tuple[int, int]]]], *, needed: tuple[str, ...] = ()
) -> None:
    """Check annotations.

    Args:
        objects: (annotation, what messages call it, (height, width) of its image in pixels or None) of each annotation.
        needed: fields that must not be missing; none by default.
    """
    from ..structures.coco_masks import MaskError, check_masks

    masks, places, sizes = [], [], []
    for annotation, where, size in objects:
        for key, (is_right, expected) in _CHECKS.items():
            value = annotation.get(key)
            if value is None or (isinstance(value, list) and not value):
                if key in needed:
                    raise AnnotationError(f"{where} has no {key}: {_REMEDY}")
            elif not is_right(value):
                raise AnnotationError(f"{where}: {key} is {reprlib.repr(value)}: {expected}; {_REMEDY}")
        mask = annotation.get("segmentation")
        if mask is not None and not (isinstance(mask, list) and not mask):
            masks.append(mask)
            places.append(where)
            sizes.append(size)
    try:
        check_masks(masks, sizes)
    except MaskError as error:
        raise AnnotationError(f"{places[error.index]}: segmentation {error}; {_REMEDY}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and -_MAX_COORDINATE < value < _MAX_COORDINATE


def _is_box(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(map(_is_number, value)) and min(value[2:]) >= 0


# Field -> (whether a value is valid, what messages expect).
_CHECKS = {
    "bbox": (_is_box, "four finite numbers are expected: x, y, width and height, the last two not negative"),
    "area": (
        lambda value: isinstance(value, (int, float)) and 0 <= value <= _MAX_AREA,
        f"a number of square pixels from 0 to {_MAX_AREA:g} is expected",
    ),
    "iscrowd": (lambda value: isinstance(value, (int, float)) and value in (0, 1), "0 or 1 is expected"),
    "category_id": (lambda value: type(value) is int, "a whole number is expected"),
}
