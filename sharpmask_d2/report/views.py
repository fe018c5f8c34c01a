"""Parts of images in the size in which a page shows them: pictures as data URIs, and masks sampled at the pixels of the picture.

Shape letters:
    H, W: image height and width in pixels
    h, w: height and width of the picture in pixels
"""

import base64
from typing import NamedTuple, Optional

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from ..errors import UserError

# WebP needs two thirds of the bytes of JPEG for the same quality. All browsers since 2020 show it.
_QUALITY = 70


class View(NamedTuple):
    """A rectangle of an image and the size of its picture. The picture is never larger than the rectangle."""

    # x0, y0, x1, y1 in pixels of the image, whole numbers.
    region: tuple[int, int, int, int]
    # (h, w).
    size: tuple[int, int]


def whole_view(image_size: tuple[int, int], side: int) -> View:
    """View of a whole image.

    Args:
        image_size: (H, W).
        side: maximum of h and w.

    Returns:
        The view.
    """
    height, width = image_size
    return _view((0, 0, width, height), side)


def view_around(box: tuple[float, float, float, float], image_size: tuple[int, int], side: int) -> View:
    """View of an object with its surroundings: a square three times as large as the object, as far as it is in the image.

    Args:
        box: of the object, x, y, width and height in pixels.
        image_size: (H, W).
        side: maximum of h and w, and the minimum side of the square in the image is half of it.

    Returns:
        The view.
    """
    x, y, width, height = box
    extent = max(3 * max(width, height), side / 2)
    x0, x1 = _interval(x + width / 2, extent, image_size[1])
    y0, y1 = _interval(y + height / 2, extent, image_size[0])
    return _view((x0, y0, x1, y1), side)


def _interval(centre: float, extent: float, limit: int) -> tuple[int, int]:
    """The part of 0..limit of a length around a centre; it is moved inwards at the borders."""
    extent = min(round(extent), limit)
    start = min(max(round(centre - extent / 2), 0), limit - extent)
    return start, start + extent


def _view(region: tuple[int, int, int, int], side: int) -> View:
    x0, y0, x1, y1 = region
    scale = min(1.0, side / max(x1 - x0, y1 - y0))
    return View(region, (max(round((y1 - y0) * scale), 1), max(round((x1 - x0) * scale), 1)))


def picture(pixels: np.ndarray, view: View) -> str:
    """Encode the picture of a view.

    Args:
        pixels: (H, W, 3) uint8, BGR.
        view: the view.

    Returns:
        A data URI of a WebP image of the size (h, w).

    Raises:
        UserError: OpenCV was built without WebP.
    """
    x0, y0, x1, y1 = view.region
    height, width = view.size
    small = cv2.resize(pixels[y0:y1, x0:x1], (width, height), interpolation=cv2.INTER_AREA)
    done, content = cv2.imencode(".webp", small, [cv2.IMWRITE_WEBP_QUALITY, _QUALITY])
    if not done:
        raise UserError("the installed OpenCV cannot write WebP: install opencv-python-headless from PyPI")
    return "data:image/webp;base64," + base64.b64encode(content).decode("ascii")


def sample_mask(rle: dict, view: View) -> Optional[str]:
    """Sample a mask at the centres of the pixels of a picture. A picture that is as large as its region has the same pixels.

    Args:
        rle: mask of the size (H, W) as compressed RLE.
        view: the view.

    Returns:
        The counts of the compressed RLE of size (h, w); None if no pixel is set.
    """
    x0, y0, x1, y1 = view.region
    height, width = view.size
    rows = y0 + ((np.arange(height) + 0.5) * ((y1 - y0) / height)).astype(int)
    columns = x0 + ((np.arange(width) + 0.5) * ((x1 - x0) / width)).astype(int)
    sampled = mask_utils.decode(rle)[rows][:, columns]
    if not sampled.any():
        return None
    return mask_utils.encode(np.asfortranarray(sampled))["counts"].decode("ascii")
