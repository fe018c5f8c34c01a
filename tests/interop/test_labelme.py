"""labelme and supervision read the JSON files that are written for labelme."""

import base64
import io
import json

import cv2
import numpy as np
import pytest
from labelled import differ_within, fill_holes, write_files
from PIL import Image
from sharpmask_d2.interop.export import export_masks


@pytest.fixture
def drawn(tmp_path):
    return write_files(tmp_path)


def export(drawn, output, **options):
    options = {"annotations": str(drawn.annotations), "image_root": str(drawn.image_root), **options}
    export_masks(str(drawn.results), to="labelme", output=str(output), **options)


@pytest.fixture(scope="module")
def labelme():
    return pytest.importorskip("labelme", minversion="6.3", reason="labelme reads its files")


def shapes_as_masks(labelme, path, size) -> list:
    shapes = labelme.LabelFile(str(path)).shapes
    return [labelme.utils.shapes_to_label(size, [shape], {"object": 1})[1] > 0 for shape in shapes]


def test_labelme_reads_the_masks(labelme, drawn, tmp_path):
    export(drawn, tmp_path / "o")
    found = shapes_as_masks(labelme, tmp_path / "o/1.json", drawn.bitmaps[0].shape)
    assert np.array_equal(found, drawn.bitmaps)
    labels = labelme.LabelFile(str(tmp_path / "o/sub/2.json"))
    # The image beside which the file was not written.
    image = cv2.imdecode(np.frombuffer(labels.image_data, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(image, cv2.imread(str(drawn.image_root / "sub/2.jpg")))
    assert [shape["description"] for shape in labels.shapes] == ["0.400"]
    assert labelme.LabelFile(str(tmp_path / "o/3.json")).shapes == []


def test_masks_are_png_files_of_their_boxes(drawn, tmp_path):
    export(drawn, tmp_path / "o")
    content = json.loads((tmp_path / "o/1.json").read_text())
    assert (content["imageHeight"], content["imageWidth"]) == drawn.bitmaps[0].shape
    for shape, bitmap in zip(content["shapes"], drawn.bitmaps):
        (x0, y0), (x1, y1) = shape["points"]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))))
        assert np.array_equal(pixels > 0, bitmap[y0 : y1 + 1, x0 : x1 + 1])
        assert np.count_nonzero(pixels) == bitmap.sum()


def test_labelme_reads_the_polygons(labelme, drawn, tmp_path):
    export(drawn, tmp_path / "o", shape="polygon")
    content = json.loads((tmp_path / "o/1.json").read_text())
    masks = shapes_as_masks(labelme, tmp_path / "o/1.json", drawn.bitmaps[0].shape)
    for number, bitmap in enumerate(drawn.bitmaps, start=1):
        parts = [mask for mask, shape in zip(masks, content["shapes"]) if shape["group_id"] == number]
        assert len(parts) == (2 if number == 3 else 1)
        assert differ_within(fill_holes(bitmap), np.any(parts, axis=0), 1)


def test_labelme_reads_the_boxes(labelme, drawn, tmp_path):
    export(drawn, tmp_path / "o", shape="box")
    (disc, *_) = shapes_as_masks(labelme, tmp_path / "o/1.json", drawn.bitmaps[0].shape)
    assert disc[8:33, 18:43].all()


def test_supervision_reads_the_polygons(drawn, tmp_path):
    supervision = pytest.importorskip("supervision", minversion="0.30", reason="supervision reads labelme's files")
    export(drawn, tmp_path / "o", shape="polygon")
    dataset = supervision.DetectionDataset.from_labelme(str(drawn.image_root), str(tmp_path / "o"))
    found = {path: detections for path, _, detections in dataset}
    detections = found[str(drawn.image_root / "1.png")]
    # Parts with one group_id are one object.
    assert len(detections) == 5
    for mask, bitmap in zip(detections.mask, drawn.bitmaps):
        assert differ_within(fill_holes(bitmap), mask, 1)


def test_files_beside_the_images_name_them(drawn):
    export(drawn, drawn.image_root, image_root=None)
    assert json.loads((drawn.image_root / "sub/2.json").read_text())["imagePath"] == "2.jpg"
    export(drawn, drawn.image_root)
    assert json.loads((drawn.image_root / "sub/2.json").read_text())["imagePath"] == "2.jpg"
