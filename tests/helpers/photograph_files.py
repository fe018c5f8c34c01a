"""A drawn photograph, as pixels and as a file."""

import io

import cv2
import numpy as np
from PIL import Image


def draw_photograph():
    """(96, 128, 3) uint8 BGR: a bright disc and a dark square on grey."""
    pixels = np.full((96, 128, 3), 110, np.uint8)
    cv2.circle(pixels, (40, 48), 26, (40, 60, 230), -1)
    cv2.rectangle(pixels, (84, 30), (116, 62), (60, 30, 20), -1)
    return pixels


def as_png(pixels):
    """The bytes of a PNG file of BGR pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, ::-1]).save(file, "PNG")
    return file.getvalue()
