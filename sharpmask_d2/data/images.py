"""Reads images from files, Pillow images and arrays as pixels for models and pictures.

Shape letters: H W image.
"""

import io
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

import numpy as np
from PIL import Image

from ..errors import UserError

# Modes of 16-bit grey images. Before Pillow 11, some formats have the mode of 32-bit integers instead.
_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_16_BITS_AT_MOST = ("PNG", "PPM")
# EXIF orientation, a number in entry 0x0112 -> what turns the image upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_270,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_90,
}
_TO_8_BITS = "convert it to 8 bits, 0 for black and 255 for white"


class ImageError(UserError):
    """An image cannot be read, or its values are not in 0..255.

    Attributes:
        reason: the message without the name of the file.
    """

    def __init__(self, reason: str, path: Union[str, Path, None] = None):
        """
        Args:
            reason: what is wrong, and what to do.
            path: of the file; None if the image is not from a file.
        """
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason


def read_image(path: Union[str, Path], format: str = "BGR", *, content: Optional[bytes] = None) -> np.ndarray:
    """Read an image file of any format that Pillow reads.

    As in Detectron2's `read_image`, the image is rotated by its EXIF orientation, and an alpha channel is dropped. Of 16-bit values the
    upper eight bits are kept, in grey and in colour images. Of an animation the first frame is read.

    Args:
        path: of the file.
        format: order of the channels, "BGR" (default) or "RGB".
        content: of the file, if it has been read already; `path` then only names it in messages. Default: None.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: the file does not exist, is not an image, is broken, or has values without a fixed white; the message names the file.
    """
    try:
        opened = _open(path) if content is None else io.BytesIO(content)
        with opened as file, Image.open(file) as image:
            pixels = _pixels(_upright(image), image.format, format)
    except FileNotFoundError:
        raise ImageError("there is no such file", path) from None
    except Image.UnidentifiedImageError:
        raise ImageError("it is no image of a format that Pillow reads", path) from None
    except ImageError as error:
        raise ImageError(error.reason, path) from None
    # For a broken file, Pillow's readers raise nearly any exception.
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise ImageError(f"it cannot be read: {reason}", path) from error
    return pixels


def to_pixels(image: Union[np.ndarray, str, Path, Image.Image]) -> np.ndarray:
    """The pixels of an image in any form that users have.

    Args:
        image: an array (H, W, 3) uint8 in BGR order, as cv2.imread returns it; a grey array (H, W) or (H, W, 1) uint8; the path of a file,
            see `read_image`; or a Pillow image, whose EXIF orientation is not applied.

    Returns:
        (H, W, 3) uint8 in BGR order.

    Raises:
        ImageError: the image has another form; the message says which, and what to do.
    """
    if image is None:
        raise ImageError("the image is None, which cv2.imread returns for a file that it cannot read: check the path")
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return _pixels(image, image.format, "BGR")
    if _is_tensor(image):
        raise ImageError(
            f"the image is a tensor of shape {tuple(image.shape)}: give a numpy array of shape (height, width, 3), uint8, in BGR order"
        )
    if not isinstance(image, np.ndarray):
        raise ImageError(f"the image is of type {type(image).__name__}: give a numpy array, a path or a Pillow image")
    if image.dtype != np.uint8:
        raise ImageError(f"the image has values of type {image.dtype}: {_TO_8_BITS} (uint8)")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
        raise ImageError(
            f"the image has the shape {image.shape}: (height, width, 3) is expected for colour, (height, width) for grey"
        )
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _pixels(image: Image.Image, file_format: Union[str, None], channels: str) -> np.ndarray:
    if 0 in image.size:
        raise ImageError("the image has no pixels")
    if image.mode in _16_BITS or (image.mode == "I" and file_format in _16_BITS_AT_MOST):
        # As Pillow converts colour; its conversion of grey clips at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ImageError(f"the image has {kind} as values, which have no fixed white: {_TO_8_BITS}")
    pixels = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(pixels if channels == "RGB" else pixels[:, :, ::-1])


def _open(path: Union[str, Path]) -> BinaryIO:
    if "://" not in str(path):
        return open(path, "rb")
    # An address of Detectron2's, such as detectron2://...
    from detectron2.utils.file_io import PathManager

    return PathManager.open(str(path), "rb")


def _upright(image: Image.Image) -> Image.Image:
    """The image, rotated by its EXIF orientation."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    # Pillow raises nearly any exception for broken EXIF data, whose image is intact.
    except Exception:
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of torch, which there can be only if torch is loaded."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)
