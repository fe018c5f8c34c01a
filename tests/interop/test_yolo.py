"""supervision reads the text files that are written for YOLO."""

import cv2
import numpy as np
import pytest
import yaml
from labelled import SIZE, differ_within, fill_holes, write_files
from sharpmask_d2.interop.export import export_masks
from sharpmask_d2.interop.yolo import join_polygons


@pytest.fixture
def drawn(tmp_path):
    return write_files(tmp_path)


def export(drawn, output, **options):
    export_masks(str(drawn.results), to="yolo", output=str(output), annotations=str(drawn.annotations), **options)


def read(drawn, folder):
    supervision = pytest.importorskip("supervision", reason="supervision reads YOLO's files")
    dataset = supervision.DetectionDataset.from_yolo(
        str(drawn.image_root), str(folder / "labels"), str(folder / "data.yaml")
    )
    assert dataset.classes == ["object"]
    return {path: detections for path, _, detections in dataset}


def test_supervision_reads_the_polygons(drawn, tmp_path):
    export(drawn, tmp_path / "o")
    found = read(drawn, tmp_path / "o")
    detections = found[str(drawn.image_root / "1.png")]
    for mask, bitmap in zip(detections.mask, drawn.bitmaps):
        # Without the bridge between two parts, which is a line of one pixel.
        opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)).astype(bool)
        assert differ_within(fill_holes(bitmap), mask if bitmap.sum() == 1 else opened, 1)
    assert len(found[str(drawn.image_root / "3.png")]) == 0


def test_supervision_reads_the_boxes(drawn, tmp_path):
    export(drawn, tmp_path / "o", shape="box")
    detections = read(drawn, tmp_path / "o")[str(drawn.image_root / "1.png")]
    for box, bitmap in zip(detections.xyxy, drawn.bitmaps):
        ys, xs = np.nonzero(bitmap)
        assert box == pytest.approx([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], abs=1e-3)


def test_files_have_one_line_per_mask(drawn, tmp_path):
    export(drawn, tmp_path / "o")
    lines = (tmp_path / "o/labels/1.txt").read_text().splitlines()
    assert len(lines) == 5
    for line in lines:
        number, *values = line.split()
        assert number == "0"
        points = np.array(values, float).reshape(-1, 2)
        assert len(points) >= 3
        assert ((points >= 0) & (points <= 1)).all()
    assert (tmp_path / "o/labels/sub/2.txt").read_text().count("\n") == 1
    assert (tmp_path / "o/labels/3.txt").read_text() == ""
    assert yaml.safe_load((tmp_path / "o/data.yaml").read_text())["names"] == ["object"]


def test_joined_polygons_fill_what_the_polygons_fill():
    rng = np.random.default_rng(0)
    centres = np.stack(np.meshgrid([12, 36, 60], [8, 24, 40]), axis=-1).reshape(-1, 2)
    polygons = [centre + rng.uniform(2, 7) * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) for centre in centres]
    joined = join_polygons(polygons)
    filled, separate = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    cv2.fillPoly(filled, [joined.round().astype(np.int32)], 1)
    for polygon in polygons:
        cv2.fillPoly(separate, [polygon.round().astype(np.int32)], 1)
    assert not (separate & ~filled).any()
    # Eight bridges, each there and back.
    assert len(joined) == sum(map(len, polygons)) + 2 * 8
    extra = filled.astype(bool) & ~separate.astype(bool)
    assert extra.sum() <= 8 * 12
