"""Images of users: what is read, and what is refused."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sharpmask_d2.app.photographs import decode_upload, find_examples, picture, read_photograph, thumbnail
from sharpmask_d2.errors import UserError


def _png(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def test_reads_pixels_in_bgr_order_and_rotates_them():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = (255, 10, 20)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    found = read_photograph(_png(pixels, exif=exif), "a.png", max_pixels=24)
    assert found.pixels.shape == (4, 6, 3)
    assert found.pixels[3, 5].tolist() == [20, 10, 255]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../etc/pass wd.png", "pass wd.png"),
        ("C:\\pictures\\a.jpg", "a.jpg"),
        ("<img onerror=x>.png", "_img onerror_x_.png"),
        ("...", "photograph"),
        ("", "photograph"),
        ("ü" * 300, "ü" * 100),
    ],
)
def test_keeps_the_safe_part_of_a_name(name, kept):
    assert read_photograph(_png(np.zeros((2, 2), np.uint8)), name, max_pixels=4).name == kept


def test_refuses_an_image_with_too_many_pixels_before_it_is_decoded():
    # A PNG file of 60,000 x 60,000 pixels that has no pixels at all.
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb = start + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(UserError, match="more than 16 million"):
        read_photograph(bomb, "bomb.png", max_pixels=16_000_000)
    with pytest.raises(UserError, match="3 x 2 pixels"):
        read_photograph(_png(np.zeros((2, 3), np.uint8)), "a.png", max_pixels=5)


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg></svg>"]
)
def test_refuses_what_is_no_image(content):
    with pytest.raises(UserError, match="no image of the formats"):
        read_photograph(content, "a.png", max_pixels=100)


def test_refuses_a_broken_image():
    content = _png(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    with pytest.raises(UserError, match="cannot be read"):
        read_photograph(content[: len(content) // 2], "a.png", max_pixels=10_000)


def test_decodes_a_data_url():
    url = "data:image/png;base64," + base64.b64encode(b"12345").decode()
    assert decode_upload(url, max_bytes=5) == b"12345"
    with pytest.raises(UserError, match="more than 1e-06 MB"):
        decode_upload(url, max_bytes=1)


@pytest.mark.parametrize(
    "data", [None, 5, {}, "", "http://example.org/a.png", "data:image/png,abc", "data:;base64,???", "/etc/passwd"]
)
def test_refuses_what_is_no_data_url(data):
    with pytest.raises(UserError, match="did not send an image"):
        decode_upload(data, max_bytes=100)


def test_makes_pictures_that_fit():
    content = picture(np.zeros((100, 4000, 3), np.uint8))
    assert Image.open(io.BytesIO(content)).size == (1600, 40)


def test_finds_the_photographs_of_scikit_image():
    pytest.importorskip("skimage")
    found = find_examples()
    assert len(found) == 3
    assert thumbnail(found[0]).startswith("data:image/jpeg;base64,")
