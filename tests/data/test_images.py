"""Images from files of many formats, and the forms of images that predictors accept."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import detection_utils
from drawing import EXIF_ORIENTATION
from PIL import Image
from sharpmask_d2.data.images import ImageError, read_image, to_pixels
from sharpmask_d2.inference.predictor import ProposalPredictor

COLOUR = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
GREY = COLOUR[:, :, 0]
ALPHA = np.full(GREY.shape, 200, np.uint8)


def save_16_bits(pixels, path):
    # OpenCV writes 16-bit colour, which Pillow does not.
    cv2.imwrite(str(path), pixels.astype(np.uint16) * 256 + 77)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_of_16_bits_the_upper_eight_are_kept(pixels, suffix, tmp_path):
    save_16_bits(pixels, tmp_path / f"deep{suffix}")
    cv2.imwrite(str(tmp_path / "plain.png"), pixels)
    deep = read_image(tmp_path / f"deep{suffix}")
    assert (deep.dtype, deep.shape) == (np.uint8, (24, 32, 3))
    assert np.array_equal(deep, read_image(tmp_path / "plain.png"))


def test_16_bit_grey_is_rotated_by_its_exif_orientation(tmp_path):
    tags = Image.Exif()
    tags[EXIF_ORIENTATION] = 6
    Image.fromarray(GREY.astype(np.uint16) * 256).save(tmp_path / "deep.png", exif=tags)
    assert np.array_equal(read_image(tmp_path / "deep.png")[:, :, 0], np.rot90(GREY, -1))


@pytest.mark.parametrize("format", ["BGR", "RGB"])
@pytest.mark.parametrize("kind", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "turned"])
def test_other_files_are_read_as_detectron2_reads_them(kind, format, tmp_path):
    image, suffix, options = Image.fromarray(COLOUR), ".png", {}
    if kind == "turned":
        tags = Image.Exif()
        tags[EXIF_ORIENTATION] = 8
        options["exif"] = tags
    else:
        if "A" in kind:
            image.putalpha(Image.fromarray(ALPHA))
        image = image.convert("RGB").convert(kind) if kind in ("CMYK", "YCbCr", "LAB") else image.convert(kind)
        suffix = {"CMYK": ".jpg", "YCbCr": ".jpg", "LAB": ".tif"}.get(kind, suffix)
    path = tmp_path / f"image{suffix}"
    image.save(path, **options)
    found = read_image(path, format)
    assert found.flags.c_contiguous
    assert np.array_equal(found, detection_utils.read_image(str(path), format))


@pytest.mark.parametrize("kind", ["float", "integers", "text", "cut", "bomb", "missing", "folder"])
def test_a_file_that_is_no_image_is_named_with_the_cause(kind, tmp_path, monkeypatch):
    path = tmp_path / "image.tif"
    expected = {
        "float": "floating-point numbers .* no fixed white: convert it to 8 bits",
        "integers": "32-bit integers .* no fixed white: convert it to 8 bits",
        "text": "no image of a format that Pillow reads",
        "cut": "cannot be read",
        "bomb": "cannot be read.* decompression bomb",
        "missing": "no such file",
        "folder": "cannot be read: Is a directory",
    }[kind]
    if kind in ("float", "integers"):
        Image.fromarray(GREY.astype(np.float32 if kind == "float" else np.int32)).save(path)
    elif kind == "text":
        path.write_text("no image")
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        Image.fromarray(COLOUR).save(path, "PNG")
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-400])
    elif kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=rf"image\.tif: .*{expected}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_grey_arrays_paths_and_pillow_images_are_accepted(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(COLOUR).save(path)
    for image in (path, str(path), Image.open(path), COLOUR[:, :, ::-1]):
        assert np.array_equal(to_pixels(image), COLOUR[:, :, ::-1])
    for image in (GREY, GREY[:, :, None], Image.fromarray(GREY)):
        assert np.array_equal(to_pixels(image), np.dstack([GREY] * 3))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "the image is None, which cv2.imread returns for a file that it cannot read"),
        (COLOUR / np.float32(255), "values of type float32: convert it to 8 bits"),
        (np.full((5, 5, 3), np.nan), "values of type float64: convert it to 8 bits"),
        (COLOUR.astype(np.uint16), "values of type uint16: convert it to 8 bits"),
        (torch.from_numpy(COLOUR), r"a tensor of shape \(24, 32, 3\): give a numpy array"),
        ([1, 2], "of type list: give a numpy array, a path or a Pillow image"),
        (np.dstack([COLOUR, ALPHA]), r"the shape \(24, 32, 4\): \(height, width, 3\) is expected"),
        (COLOUR[:0], r"the shape \(0, 32, 3\)"),
        (COLOUR.transpose(2, 0, 1), r"the shape \(3, 24, 32\)"),
        (Image.fromarray(GREY.astype(np.float32)), "floating-point numbers"),
    ],
)
def test_an_object_that_is_no_image_is_named_by_its_type(image, message):
    with pytest.raises(ImageError, match=message):
        to_pixels(image)


def test_predictors_accept_all_forms_of_images(tiny_cfg, tmp_path):
    torch.manual_seed(0)
    predictor = ProposalPredictor(tiny_cfg)
    cv2.imwrite(str(tmp_path / "image.png"), COLOUR)
    from_file, from_array = predictor.of_batch([tmp_path / "image.png", COLOUR])
    assert torch.equal(from_file.objectness_logits, from_array.objectness_logits)
    with pytest.raises(ImageError, match="float64"):
        predictor(COLOUR / 255)
