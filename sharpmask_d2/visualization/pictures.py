"""Pictures as files."""

from collections import Counter
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from ..errors import UserError
from ..io.outputs import write_output


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write a picture whole or not at all; its folder is made where it is missing.

    Args:
        path: with a suffix that OpenCV knows.
        pixels: (H, W, 3) uint8, BGR.

    Raises:
        OutputError: the file cannot be written, such as on a full disk.
        ValueError: more pixels than the format holds; JPEG holds 65535 a side.
    """
    done, content = cv2.imencode(Path(path).suffix, np.ascontiguousarray(pixels))
    if not done:
        raise UserError(f"{path}: an image of {pixels.shape[1]} x {pixels.shape[0]} pixels cannot be written")
    write_output(path, content.tobytes())


def name_pictures(images: list) -> list:
    """A name for the picture of each image: that of the image with the suffix .jpg, in the sub-folder in which the image is.

    Where several images would share it, they keep their own suffix before it: photo.bmp.jpg and photo.webp.jpg. Images of the same name
    in several input folders also get their id. No two names differ in case alone.

    Args:
        images: N of InputImage.

    Returns:
        N paths, within the folder of the pictures.
    """
    inside = [_within(image.name) for image in images]
    kinds = [
        [str(path.with_suffix("")) for path in inside],
        [str(path) for path in inside],
        [f"{path}.{image.image_id}" for path, image in zip(inside, images)],
        [f"{path}.{image.image_id}.{i}" for i, (path, image) in enumerate(zip(inside, images))],
    ]
    names, taken, left = {}, set(), range(len(images))
    for kind in kinds:
        counts = Counter(kind[i].lower() for i in left)
        for i in left:
            if counts[kind[i].lower()] == 1 and kind[i].lower() not in taken:
                names[i] = f"{kind[i]}.jpg"
        taken |= {kind[i].lower() for i in left if i in names}
        left = [i for i in left if i not in names]
    return [names[i] for i in range(len(images))]


def _within(name: str) -> PurePosixPath:
    """A path that leads nowhere else: without root and without `..`."""
    return PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..")))
