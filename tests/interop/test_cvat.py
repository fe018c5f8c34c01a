"""CVAT's libraries read the masks that are written for CVAT, and run the functions."""

import logging
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labelled import SIZE, differ_within, draw_masks, fill_holes, write_files
from PIL import Image
from pycocotools import mask as mask_utils
from sharpmask_d2.errors import UserError
from sharpmask_d2.interop import cvat, cvat_interaction
from sharpmask_d2.interop.cvat_files import mask_points
from sharpmask_d2.interop.export import export_masks
from sharpmask_d2.structures import TightMask, WindowMasks


@pytest.fixture
def drawn(tmp_path):
    return write_files(tmp_path)


@pytest.fixture(scope="module")
def masks_of_cvat():
    return pytest.importorskip("cvat_sdk.masks", reason="cvat-sdk encodes and decodes CVAT's masks")


@pytest.fixture(scope="module")
def photograph():
    """A disc and a square on noise."""
    pixels = np.random.default_rng(0).integers(60, 100, (120, 160, 3), dtype=np.uint8)
    ys, xs = np.mgrid[:120, :160]
    pixels[(ys - 60) ** 2 + (xs - 50) ** 2 < 900] = (240, 80, 40)
    pixels[30:80, 100:140] = (40, 200, 80)
    return Image.fromarray(pixels)


def export(drawn, output, **options):
    export_masks(str(drawn.results), to="cvat", output=str(output), annotations=str(drawn.annotations), **options)


def test_masks_are_encoded_as_by_cvat(masks_of_cvat):
    for bitmap in [*draw_masks(), np.ones(SIZE, bool)]:
        points = mask_points(TightMask.from_bitmap(bitmap))
        assert points == masks_of_cvat.encode_mask(bitmap)
        assert np.array_equal(masks_of_cvat.decode_mask(points, image_width=70, image_height=48), bitmap)


def test_window_masks_are_encoded_as_by_cvat(masks_of_cvat):
    generator = torch.Generator().manual_seed(0)
    logits = F.interpolate(torch.randn(20, 1, 5, 5, generator=generator), (14, 14), mode="bicubic")[:, 0] * 4
    corners = torch.rand(20, 2, generator=generator) * 60 - 20
    masks = WindowMasks(
        logits, torch.cat([corners, corners + 10 + 50 * torch.rand(20, 2, generator=generator)], 1), SIZE
    )
    encoded = [mask_points(mask) for mask in masks.tight_masks() if mask.bitmap.size]
    assert encoded == [masks_of_cvat.encode_mask(bitmap) for bitmap in masks.to_numpy() if bitmap.any()]
    assert len(encoded) > 10


def test_xml_holds_the_masks(masks_of_cvat, drawn, tmp_path):
    export(drawn, tmp_path / "o.xml")
    root = ElementTree.parse(tmp_path / "o.xml").getroot()
    images = root.findall("image")
    assert [image.get("name") for image in images] == ["1.png", "sub/2.jpg", "3.png"]
    assert [len(image) for image in images] == [5, 1, 0]
    for element, bitmap in zip(images[0], drawn.bitmaps):
        x, y, width, height = (int(element.get(key)) for key in ("left", "top", "width", "height"))
        points = [*map(int, element.get("rle").split(",")), x, y, x + width - 1, y + height - 1]
        assert np.array_equal(masks_of_cvat.decode_mask(points, image_width=70, image_height=48), bitmap)
    order = [int(element.get("z_order")) for element in images[0]]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("shape", ["mask", "polygon", "box"])
def test_datumaro_reads_the_xml(drawn, tmp_path, shape):
    datumaro = pytest.importorskip("datumaro", reason="datumaro, on which CVAT's import is built, reads CVAT's files")
    export(drawn, tmp_path / "annotations.xml", shape=shape)
    dataset = datumaro.Dataset.import_from(str(tmp_path / "annotations.xml"), "cvat")
    items = {item.id: item.annotations for item in dataset}
    assert {name: len(found) > 0 for name, found in items.items()} == {"1": True, "sub/2": True, "3": False}
    groups = {}
    for annotation in items["1"]:
        groups.setdefault(annotation.z_order, []).append(annotation)
    for order, bitmap in zip(range(4, -1, -1), drawn.bitmaps):
        if shape == "mask":
            assert np.array_equal(np.asarray(groups[order][0].image).astype(bool), bitmap)
        elif shape == "box":
            assert groups[order][0].points == [*TightMask.from_bitmap(bitmap).box]
        else:
            parts = [polygon_mask(part.points) for part in groups[order]]
            assert len(parts) == (2 if order == 2 else 1)
            assert differ_within(fill_holes(bitmap), np.any(parts, axis=0), 1)


def polygon_mask(points) -> np.ndarray:
    return mask_utils.decode(mask_utils.frPyObjects([points], *SIZE))[:, :, 0].astype(bool)


def annotate(function, photograph, monkeypatch, **options) -> list:
    """CVAT's own driver runs a function on a task of one image; returns the shapes that it would upload."""
    driver = pytest.importorskip("cvat_sdk.auto_annotation.driver", reason="cvat-sdk runs CVAT's functions")
    label = SimpleNamespace(id=31, name="object", type="any", sublabels=[], attributes=[])
    sample = SimpleNamespace(frame_index=5, frame_name="a.png", media=SimpleNamespace(load_image=lambda: photograph))
    dataset = SimpleNamespace(labels=[label], samples=[sample])
    monkeypatch.setattr(driver, "TaskDataset", lambda *args, **kwargs: dataset)
    uploaded = []
    api = SimpleNamespace(
        partial_update_annotations=lambda *args, patched_labeled_data_request: uploaded.extend(
            patched_labeled_data_request.shapes
        )
    )
    client = SimpleNamespace(logger=logging.getLogger("test"), tasks=SimpleNamespace(api=api))
    driver.annotate_task(client, 1, function, **options)
    return uploaded


def test_the_function_annotates_a_task(masks_of_cvat, photograph, monkeypatch):
    function = cvat.create(device="cpu", keep=5)
    shapes = annotate(function, photograph, monkeypatch)
    assert 2 <= len(shapes) <= 5
    assert {(shape.type.value, shape.frame, shape.label_id) for shape in shapes} == {("mask", 5, 31)}
    found = [masks_of_cvat.decode_mask(shape.points, image_width=160, image_height=120) for shape in shapes]
    square = np.zeros((120, 160), bool)
    square[30:80, 100:140] = True
    assert max((mask & square).sum() / (mask | square).sum() for mask in found) > 0.8

    polygons = annotate(function, photograph, monkeypatch, conv_mask_to_poly=True)
    assert {shape.type.value for shape in polygons} == {"polygon"}
    assert len(polygons) >= len(shapes)
    # A threshold of CVAT replaces the default.
    assert len(annotate(function, photograph, monkeypatch, conf_threshold=0.95)) < len(shapes)
    assert len(annotate(function, photograph, monkeypatch)) == len(shapes)


def prompt(positive=(), negative=(), box=None):
    return SimpleNamespace(pos_points=positive, neg_points=negative, bounding_box=box)


def test_the_interaction_function_answers_prompts(masks_of_cvat, photograph):
    cvataa = pytest.importorskip("cvat_sdk.auto_annotation", reason="cvat-sdk checks the shapes")
    if not hasattr(cvataa, "InteractionFunctionSpec"):
        pytest.skip("this cvat-sdk has no interaction functions")
    function = cvat_interaction.create(device="cpu")
    image = function.preprocess_image(None, photograph)
    square = np.zeros((120, 160), bool)
    square[30:80, 100:140] = True
    for given in (
        prompt(box=((100, 30), (140, 80))),
        prompt([(120, 55)], [(50, 60)]),
        prompt([(120, 55), (125, 60)], box=((140, 80), (100, 30))),
    ):
        (shape,) = function.detect(None, image, given)
        assert shape.type == "mask"
        assert 0 <= float(shape.attributes[0].value) <= 1
        mask = masks_of_cvat.decode_mask(shape.points, image_width=160, image_height=120)
        assert (mask & square).sum() / (mask | square).sum() > 0.7
    assert function.detect(None, image, prompt(negative=[(3, 3)])) == []
    # Beyond the edge.
    function.detect(None, image, prompt([(160.4, -0.2)]))


@pytest.mark.parametrize("module", [cvat, cvat_interaction])
def test_without_cvat_sdk_an_error_names_the_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "cvat_sdk", None)
    monkeypatch.setitem(sys.modules, "cvat_sdk.auto_annotation", None)
    with pytest.raises(UserError, match=r"cvat_sdk.* is not installed: run pip install 'sharpmask_d2\[interop\]'"):
        module.create(device="cpu")


def test_a_model_that_takes_no_prompts_is_refused(masks_of_cvat):
    with pytest.raises(UserError, match="prompts need a model on a feature pyramid"):
        cvat.create(model="sharpmask_lite0", device="cpu")
