"""pycocotools, Detectron2 and supervision read the COCO datasets that are written."""

import json

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from labelled import differ_within, fill_holes, write_files
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from sharpmask_d2.data.coco import load_annotations
from sharpmask_d2.interop.export import export_masks


@pytest.fixture
def drawn(tmp_path):
    return write_files(tmp_path)


def export(drawn, output, **options):
    export_masks(str(drawn.results), to="coco", output=str(output), annotations=str(drawn.annotations), **options)


def test_pycocotools_reads_the_masks(drawn, tmp_path):
    export(drawn, tmp_path / "o.json")
    coco = COCO(str(tmp_path / "o.json"))
    assert coco.getImgIds() == [1, 2, 3]
    annotations = coco.imgToAnns[1]
    for annotation, bitmap in zip(annotations, drawn.bitmaps):
        assert np.array_equal(coco.annToMask(annotation).astype(bool), bitmap)
        assert annotation["area"] == bitmap.sum()
        ys, xs = np.nonzero(bitmap)
        assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
    assert [annotation["score"] for annotation in annotations] == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert coco.imgToAnns[3] == []
    assert coco.loadCats(1)[0]["name"] == "object"


def test_detectron2_reads_the_polygons(drawn, tmp_path):
    export(drawn, tmp_path / "o.json", shape="polygon")
    # Refuses what is not valid.
    load_annotations(tmp_path / "o.json")
    records = load_coco_json(str(tmp_path / "o.json"), str(drawn.image_root))
    assert [len(record["annotations"]) for record in records] == [5, 1, 0]
    for annotation, bitmap in zip(records[0]["annotations"], drawn.bitmaps):
        rle = mask_utils.merge(mask_utils.frPyObjects(annotation["segmentation"], *bitmap.shape))
        assert differ_within(fill_holes(bitmap), mask_utils.decode(rle).astype(bool), 1)


def test_boxes_have_no_segmentation(drawn, tmp_path):
    export(drawn, tmp_path / "o.json", shape="box", keep=1)
    annotations = json.loads((tmp_path / "o.json").read_text())["annotations"]
    assert [annotation["bbox"] for annotation in annotations] == [[18, 8, 25, 25]] * 2
    assert not any("segmentation" in annotation for annotation in annotations)


def test_supervision_reads_the_masks(drawn, tmp_path):
    supervision = pytest.importorskip("supervision", reason="supervision reads COCO datasets")
    export(drawn, tmp_path / "o.json")
    dataset = supervision.DetectionDataset.from_coco(str(drawn.image_root), str(tmp_path / "o.json"), force_masks=True)
    found = {path: detections for path, _, detections in dataset}
    detections = found[str(drawn.image_root / "1.png")]
    assert np.array_equal(detections.mask, drawn.bitmaps)
    assert len(found[str(drawn.image_root / "3.png")]) == 0
    assert dataset.classes == ["object"]
