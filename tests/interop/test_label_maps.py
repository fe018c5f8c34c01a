"""Pillow and scikit-image read the maps of labels that are written."""

import numpy as np
import pytest
from drawing import compressed_rle
from labelled import SIZE, read_drawn, write_files
from PIL import Image
from sharpmask_d2.interop.export import export_masks
from sharpmask_d2.interop.label_maps import label_map
from sharpmask_d2.interop.labelled_images import LabelledImage, LabelledMask


def test_better_masks_cover_others(tmp_path):
    drawn = write_files(tmp_path)
    export_masks(str(drawn.results), to="png", output=str(tmp_path / "o"), annotations=str(drawn.annotations))
    with Image.open(tmp_path / "o/1.png") as file:
        assert file.mode == "L"
        labels = np.asarray(file)
    rest = np.ones(SIZE, bool)
    for number, bitmap in enumerate(drawn.bitmaps, start=1):
        assert np.array_equal(labels == number, bitmap & rest)
        rest &= ~bitmap
    assert np.array_equal(labels == 0, rest)
    assert not np.asarray(Image.open(tmp_path / "o/3.png")).any()
    assert (tmp_path / "o/sub/2.png").exists()


def test_more_than_255_masks_need_16_bits(tmp_path):
    skimage = pytest.importorskip("skimage", reason="scikit-image reads PNG files of 16 bits")
    masks = []
    for number in range(300):
        bitmap = np.zeros((20, 30), bool)
        bitmap.flat[number] = True
        masks.append(LabelledMask(compressed_rle(bitmap), 1, 0.5))
    image = LabelledImage(1, "1.png", (20, 30), masks)
    assert label_map(image._replace(masks=masks[:255])).dtype == np.uint8
    path = tmp_path / "map.png"
    Image.fromarray(label_map(image)).save(path)
    read = skimage.io.imread(path)
    assert read.dtype == np.uint16
    assert np.array_equal(read.ravel(), np.r_[1:301, np.zeros(300)])


def test_an_image_without_masks_is_background(tmp_path):
    image = read_drawn(tmp_path).images[2]
    assert not label_map(image).any()
    with pytest.raises(ValueError, match="keep fewer"):
        label_map(image._replace(masks=[None] * 70_000))
