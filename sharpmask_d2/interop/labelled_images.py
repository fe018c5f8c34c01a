"""Reads COCO files of masks and groups the masks by image, so that they can be written in other formats."""

import math
import os
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from pycocotools import mask as mask_utils

from ..data.coco import check_annotations, load_annotations, load_json
from ..data.images import read_image
from ..errors import UserError
from ..structures.coco_masks import MaskError, check_masks, to_rle
from ..structures.tight_masks import TightMask

# Name of the only category of proposals.
DEFAULT_LABEL = "object"


class LabelledMask(NamedTuple):
    """A mask of an image with its category."""

    rle: dict[str, Any]  # compressed RLE of the size of the image
    category_id: int
    score: Optional[float]  # None if the file does not say it

    def tight(self) -> TightMask:
        """The bitmap of the mask within its tight box."""
        return TightMask.from_rle(self.rle)


class LabelledImage(NamedTuple):
    """An image with its masks."""

    image_id: Union[int, str]
    file_name: str  # path relative to the folder of images, with "/" as separator
    size: tuple[int, int]  # (H, W) in pixels
    masks: list[LabelledMask]  # by descending score


class LabelledImages(NamedTuple):
    """The images of a file."""

    images: list[LabelledImage]
    labels: dict[int, str]  # category id -> name, in ascending order of the ids


class _Source(NamedTuple):
    """What a file of masks says before its masks are checked."""

    path: str
    entries: list[dict]  # results or annotations
    listing: Optional[str]  # file that lists the images; None if only the entries name them
    images: dict[Any, dict]  # id -> image as COCO lists it
    labels: dict[int, str]

    def where(self, number: int) -> str:
        """What messages call an entry."""
        entry = self.entries[number]
        if self.listing == self.path:
            return f"{self.path}: annotation {entry.get('id')} of image {entry.get('image_id')}"
        return f"{self.path}: result {number} of image {entry.get('image_id')}"


def read_labelled_images(
    path: Union[str, os.PathLike],
    *,
    annotations: Optional[str] = None,
    image_root: Optional[str] = None,
    keep: Optional[int] = None,
    min_score: Optional[float] = None,
    label: Optional[str] = None,
) -> LabelledImages:
    """Reads the masks of a COCO file.

    Args:
        path: COCO results, or a COCO dataset.
        annotations: COCO JSON that lists the images and names the categories; needed for results without file_name. With it, images without
            masks are returned as well. None by default.
        image_root: folder of the images. It is searched for an image whose size no file says. None by default.
        keep: maximum number of masks per image, those of highest score. None keeps all.
        min_score: masks of a lower score are left out; None keeps all. A mask without a score is kept.
        label: name of all masks, in one category of id 1. None takes the categories of the files. Results that are all of category 1
            without a name are class-agnostic, as those of `sharpmask propose`: where `annotations` has several categories, their name is
            `DEFAULT_LABEL`.

    Returns:
        The images in the order of the file that lists them, or in the order in which the results name them. The score is an entry's score,
        or its mask_quality if it has none. Empty masks and crowds are left out.

    Raises:
        FileNotFoundError: a file does not exist.
        UserError: a file is not JSON or not of these forms, a mask is not valid, or an image is not listed or has no name or no size; the
            message names the file and the image.
    """
    source = _read(os.fspath(path), annotations)
    checked = _checked(source)
    numbers: dict[Any, list[int]] = {image_id: [] for image_id in source.images}
    for number in checked:
        numbers[source.entries[number]["image_id"]].append(number)
    images = []
    for image_id, of_image in numbers.items():
        size = _size(source, image_id, of_image, image_root)
        found = list(_masks(source, of_image, size, 1 if label else None))
        # Entries without a score keep their place among themselves, before the others.
        found.sort(key=lambda mask: math.inf if mask.score is None else mask.score, reverse=True)
        if min_score is not None:
            found = [mask for mask in found if mask.score is None or mask.score >= min_score]
        images.append(LabelledImage(image_id, source.images[image_id]["file_name"], size, found[:keep]))
    labels = {1: label} if label else _names(source)
    return LabelledImages(images, dict(sorted(labels.items())))


def _read(path: str, annotations: Optional[str]) -> _Source:
    content = load_json(path)
    listing = None
    if isinstance(content, dict):
        if annotations:
            raise UserError(f"{path} is a COCO dataset, which lists its images itself: leave out --annotations")
        check_annotations(content, path)
        listing, document, entries = path, content, content["annotations"]
    else:
        if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
            raise UserError(f"{path} is not a COCO result file: a list of dicts is expected")
        entries = content
        document = {}
        if annotations:
            listing, document = annotations, load_annotations(annotations).dataset
    images = {image["id"]: image for image in document.get("images", [])}
    for image_id, image in images.items():
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise UserError(f"{listing}: image {image_id} has no file_name: name its file")
    labels = {category["id"]: str(category.get("name", "")) for category in document.get("categories", [])}
    return _Source(path, entries, listing, images, {number: name for number, name in labels.items() if name})


def _checked(source: _Source) -> list[int]:
    """The numbers of the entries that are masks of single objects. Images that only results name are added to the source."""
    numbers = []
    for number, entry in enumerate(source.entries):
        if missing := [key for key in ("image_id", "category_id") if key not in entry]:
            raise UserError(f"{source.path}: result {number} has no {missing[0]}")
        image_id = entry["image_id"]
        if not isinstance(image_id, (int, str)) or type(entry["category_id"]) is not int:
            raise UserError(
                f"{source.where(number)}: image_id {reprlib.repr(image_id)} and category_id {reprlib.repr(entry['category_id'])} have to "
                "be whole numbers; an image_id may also be text"
            )
        if entry.get("iscrowd"):
            continue
        if not entry.get("segmentation"):
            raise UserError(
                f"{source.where(number)} has no segmentation: sharpmask segment --boxes makes masks of boxes"
            )
        score = _score(entry)
        if score is not None and not (isinstance(score, (int, float)) and math.isfinite(score)):
            raise UserError(f"{source.where(number)} has the score {reprlib.repr(score)}, not a finite number")
        if image_id not in source.images:
            _add_image(source, number)
        numbers.append(number)
    sizes = [_known_size(source.images[source.entries[number]["image_id"]]) for number in numbers]
    try:
        check_masks([source.entries[number]["segmentation"] for number in numbers], sizes)
    except MaskError as error:
        raise UserError(f"{source.where(numbers[error.index])} has a segmentation that {error}") from None
    return numbers


def _add_image(source: _Source, number: int) -> None:
    entry = source.entries[number]
    if source.listing:
        raise UserError(
            f"{source.where(number)}: {source.listing} does not list this image: name the file that lists it with --annotations"
        )
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{source.where(number)} has no file_name: name the file that lists the images with --annotations"
        )
    source.images[entry["image_id"]] = {"id": entry["image_id"], "file_name": name}


def _known_size(image: dict[str, Any]) -> Optional[tuple[int, int]]:
    return (image["height"], image["width"]) if image.get("height") and image.get("width") else None


def _size(source: _Source, image_id: Any, numbers: Sequence[int], image_root: Optional[str]) -> tuple[int, int]:
    """(H, W) of an image: as its list, an RLE or its file says."""
    image = source.images[image_id]
    if known := _known_size(image):
        return known
    for number in numbers:
        segmentation = source.entries[number]["segmentation"]
        if isinstance(segmentation, dict):
            height, width = segmentation["size"]
            return height, width
    if image_root is None:
        raise UserError(
            f"{source.listing or source.path}: the size of image {image_id}, {image['file_name']}, is not known: name the folder of the "
            "images with --image-root"
        )
    height, width = read_image(Path(image_root) / image["file_name"]).shape[:2]
    return height, width


def _masks(
    source: _Source, numbers: Sequence[int], size: tuple[int, int], category_id: Optional[int]
) -> Iterator[LabelledMask]:
    """The masks of an image that are not empty; `category_id` replaces those of the entries, unless it is None."""
    for place in numbers:
        entry = source.entries[place]
        try:
            # Once more, because the size of the image may not have been known.
            check_masks([entry["segmentation"]], [size])
            rle = to_rle(entry["segmentation"], size)
        except MaskError as error:
            raise UserError(f"{source.where(place)} has a segmentation that {error}") from None
        if mask_utils.area(rle):
            score = _score(entry)
            number = entry["category_id"] if category_id is None else category_id
            yield LabelledMask(rle, number, None if score is None else float(score))


def _score(entry: dict[str, Any]) -> Any:
    return entry.get("score", entry.get("mask_quality"))


def _names(source: _Source) -> dict[int, str]:
    """Category id -> name of the categories of the files and of those that only entries name."""
    entries = [entry for entry in source.entries if not entry.get("iscrowd")]
    used = {entry["category_id"]: entry.get("category_name") for entry in entries}
    agnostic = source.listing != source.path and all(number == 1 and not name for number, name in used.items())
    if agnostic and len(source.labels) != 1:
        return {1: DEFAULT_LABEL}
    return {**{number: str(name or f"category {number}") for number, name in used.items()}, **source.labels}
