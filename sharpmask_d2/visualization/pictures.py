"""Names and writes picture files."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import cv2
import numpy as np

from ..errors import UserError
from ..io.outputs import write_output


class NamedImage(Protocol):
    """The properties of an input image from which the name of its picture is made."""

    @property
    def name(self) -> str:
        """Path relative to the input folder, with "/" as separator."""

    @property
    def image_id(self) -> object:
        """Unique among all images."""


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write a picture atomically; missing folders are created.

    Args:
        path: path with a suffix of an image format that OpenCV can write, such as .jpg.
        pixels: (H, W, 3) uint8, BGR; H and W are height and width in pixels.

    Raises:
        OutputError: the file cannot be written, for example because the disk is full.
        UserError: the image is too large for the format; JPEG allows at most 65535 pixels per side.
    """
    done, content = cv2.imencode(Path(path).suffix, np.ascontiguousarray(pixels))
    if not done:
        raise UserError(
            f"{path}: an image of {pixels.shape[1]} x {pixels.shape[0]} pixels is too large for this format: use smaller images"
        )
    write_output(path, content.tobytes())


def name_pictures(images: Sequence[NamedImage]) -> list[str]:
    """Choose a unique name for the picture of each image: the name of the image with the suffix .jpg, in the same sub-folder.

    If several images would share a name, they keep their own suffix: photo.bmp.jpg and photo.webp.jpg. Images of the same name from
    different input folders get their id in addition. Names differ in more than letter case.

    Args:
        images: the images, such as `InputImage` objects.

    Returns:
        One path per image, relative to the folder of the pictures.
    """
    inside = [_within(image.name) for image in images]
    candidates = [
        [str(path.with_suffix("")) for path in inside],
        [str(path) for path in inside],
        [f"{path}.{image.image_id}" for path, image in zip(inside, images)],
        [f"{path}.{image.image_id}.{i}" for i, (path, image) in enumerate(zip(inside, images))],
    ]
    names, taken, unnamed = {}, set(), range(len(images))
    for kind in candidates:
        counts = Counter(kind[i].lower() for i in unnamed)
        for i in unnamed:
            if counts[kind[i].lower()] == 1 and kind[i].lower() not in taken:
                names[i] = f"{kind[i]}.jpg"
        taken |= {kind[i].lower() for i in unnamed if i in names}
        unnamed = [i for i in unnamed if i not in names]
    return [names[i] for i in range(len(images))]


def _within(name: str) -> PurePosixPath:
    """Remove root and `..` from a path, so that it stays inside the folder of the pictures."""
    return PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..")))
