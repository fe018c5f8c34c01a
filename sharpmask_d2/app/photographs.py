"""Reads photographs that users send, and finds those that the page offers.

Shape letters: H W image.
"""

import base64
import os
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
from PIL import Image, ImageOps

from ..data.images import to_pixels
from ..errors import UserError

# Readers of rare formats are not offered to strangers' files.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Photographs that come with scikit-image.
_EXAMPLES = ("coffee.png", "chelsea.png", "astronaut.png")
# Longer side of a thumbnail, and of the picture that the browser shows, in pixels.
_THUMBNAIL = 160
_PICTURE = 1600


class Photograph(NamedTuple):
    """A photograph of a user."""

    name: str  # of its file, without a folder
    pixels: np.ndarray  # (H, W, 3) uint8, BGR


def read_photograph(content: bytes, name: str, *, max_pixels: int) -> Photograph:
    """Reads an image file that is in memory. Its size is checked before its pixels are decoded.

    Args:
        content: of the file.
        name: of the file, from the user.
        max_pixels: maximum number of pixels.

    Returns:
        The image, rotated by its EXIF orientation; of an animation the first frame.

    Raises:
        UserError: the content is no image of the formats in FORMATS, is broken, or has too many pixels.
    """
    try:
        with Image.open(BytesIO(content), formats=_known_formats()) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return Photograph(_safe_name(name), to_pixels(ImageOps.exif_transpose(image)))
    except Image.UnidentifiedImageError:
        raise UserError(f"This file is no image of the formats {', '.join(_known_formats())}.") from None
    except Image.DecompressionBombError:
        raise UserError(f"This image has more than {max_pixels / 1e6:g} million pixels: make it smaller.") from None
    # For a broken file, Pillow's readers raise nearly any exception.
    except Exception as error:
        raise UserError(f"This image cannot be read: {error}") from error
    raise UserError(
        f"This image has {width} x {height} pixels, more than {max_pixels / 1e6:g} million: make it smaller."
    )


def decode_upload(data: object, *, max_bytes: int) -> bytes:
    """The content of a file that the page sends as a data URL.

    Args:
        data: "data:TYPE;base64,CONTENT".
        max_bytes: maximum size of the file.

    Raises:
        UserError: the text is no such URL, or the file is too large.
    """
    head, comma, text = data.partition(",") if isinstance(data, str) else ("", "", "")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise UserError("The page did not send an image.")
    if len(text) * 3 // 4 > max_bytes + 2:
        raise UserError(f"This file has more than {max_bytes / 1e6:g} MB: make it smaller.")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise UserError("The page did not send an image.") from None


def find_examples() -> list[Path]:
    """The photographs of scikit-image that are installed; none without it."""
    found = find_spec("skimage")
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parent / "data"
    return [folder / name for name in _EXAMPLES if (folder / name).exists()]


def thumbnail(path: Union[str, os.PathLike]) -> str:
    """A small picture of an image file as a data URL."""
    with Image.open(path) as image:
        small = ImageOps.exif_transpose(image).convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return "data:image/jpeg;base64," + base64.b64encode(_jpeg(small)).decode("ascii")


def picture(pixels: np.ndarray) -> bytes:
    """What the browser shows of an image: a JPEG file, at most 1600 pixels wide and high.

    Args:
        pixels: (H, W, 3) uint8, BGR.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))
    image.thumbnail((_PICTURE, _PICTURE))
    return _jpeg(image)


def _jpeg(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", quality=88)
    return file.getvalue()


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _safe_name(name: str) -> str:
    """The last part of a name, with the characters that are safe in a file name."""
    last = str(name).replace("\\", "/").rpartition("/")[2]
    kept = "".join(c if c.isalnum() or c in "._- " else "_" for c in last).strip(" .")
    return kept[-100:] or "photograph"
