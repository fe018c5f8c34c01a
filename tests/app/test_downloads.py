"""The files that the page offers, read back."""

import io
import json
import zipfile

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from sharpmask_d2.app.downloads import FORMATS, write
from sharpmask_d2.app.sessions import Mask
from sharpmask_d2.errors import UserError


@pytest.fixture
def bitmaps():
    large, small = np.zeros((2, 96, 128), np.uint8)
    large[10:60, 20:90] = 1
    large[30:40, 40:50] = 0
    small[50:70, 80:100] = 1
    return [large, small]


@pytest.fixture
def masks(bitmaps):
    return [Mask(mask_utils.encode(np.asfortranarray(bitmap)), 0.75 - 0.25 * i) for i, bitmap in enumerate(bitmaps)]


def test_coco_is_a_dataset_with_equal_masks(photograph, masks, bitmaps):
    file = write("coco", photograph, masks)
    coco = COCO()
    coco.dataset = json.loads(file.content)
    coco.createIndex()
    annotations = coco.loadAnns(coco.getAnnIds(1))
    assert file.name == "disc_coco.json"
    assert coco.imgs[1] == {"id": 1, "file_name": "disc.png", "height": 96, "width": 128}
    for annotation, bitmap in zip(annotations, bitmaps):
        np.testing.assert_array_equal(coco.annToMask(annotation), bitmap)
        assert annotation["area"] == bitmap.sum()
    assert annotations[1]["bbox"] == [80, 50, 20, 20]
    assert [annotation["score"] for annotation in annotations] == [0.75, 0.5]


def test_labelme_has_the_outlines(photograph, masks, bitmaps):
    content = json.loads(write("labelme", photograph, masks).content)
    assert (content["imagePath"], content["imageHeight"], content["imageWidth"]) == ("disc.png", 96, 128)
    assert [shape["group_id"] for shape in content["shapes"]] == [1, 2]
    filled = bitmaps[0].copy()
    filled[30:40, 40:50] = 1
    for shape, bitmap in zip(content["shapes"], [filled, bitmaps[1]]):
        polygon = np.array(shape["points"]).ravel().tolist()
        read = mask_utils.frPyObjects([polygon], 96, 128)
        assert mask_utils.iou(read, [mask_utils.encode(np.asfortranarray(bitmap))], [0])[0, 0] > 0.97


def test_png_holds_the_numbers_of_the_masks(photograph, masks, bitmaps):
    labels = cv2.imdecode(np.frombuffer(write("png", photograph, masks).content, np.uint8), cv2.IMREAD_UNCHANGED)
    expected = bitmaps[0].copy()
    expected[bitmaps[1] > 0] = 2
    np.testing.assert_array_equal(labels, expected)
    many = cv2.imdecode(np.frombuffer(write("png", photograph, masks * 150).content, np.uint8), cv2.IMREAD_UNCHANGED)
    assert many.dtype == np.uint16
    assert many.max() == 300


def test_cutouts_are_transparent_outside_of_the_mask(photograph, masks, bitmaps):
    file = write("cutouts", photograph, masks)
    with zipfile.ZipFile(io.BytesIO(file.content)) as archive:
        assert archive.namelist() == ["disc_001.png", "disc_002.png"]
        cutout = cv2.imdecode(np.frombuffer(archive.read("disc_001.png"), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(cutout[..., 3], bitmaps[0][10:60, 20:90] * 255)
    np.testing.assert_array_equal(cutout[..., :3], photograph.pixels[10:60, 20:90])


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_to_download_is_said(photograph, form):
    with pytest.raises(UserError, match="no mask to download"):
        write(form, photograph, [])
