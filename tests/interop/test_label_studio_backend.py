"""The backend answers Label Studio's requests, and Label Studio's library decodes the masks."""

import importlib
import sys

import cv2
import numpy as np
import pytest
from sharpmask_d2.errors import UserError

NAME = "sharpmask_d2.interop.label_studio_backend"
SQUARE = np.s_[30:80, 100:140]
BRUSH = """<View><Image name="photo" value="$picture"/>
<BrushLabels name="tag" toName="photo"><Label value="object"/><Label value="thing"/></BrushLabels></View>"""
BOXES = """<View><Image name="photo" value="$picture"/>
<RectangleLabels name="tag" toName="photo"><Label value="thing"/></RectangleLabels></View>"""


@pytest.fixture(scope="module")
def backend_class():
    pytest.importorskip("label_studio_ml.model", reason="label-studio-ml has the base class")
    backend = importlib.import_module(NAME).SharpMaskBackend

    class Local(backend):
        device = "cpu"

        def get_local_path(self, url, **kwargs):
            return url

    return Local


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(60, 100, (120, 160, 3), dtype=np.uint8)
    cv2.circle(pixels, (50, 60), 30, (40, 80, 240), -1)
    pixels[SQUARE] = (80, 200, 40)
    path = tmp_path_factory.mktemp("images") / "a.png"
    cv2.imwrite(str(path), pixels)
    return {"id": 3, "data": {"picture": str(path)}}


def fits(mask) -> float:
    """The IoU of a mask with the square."""
    square = np.zeros((120, 160), bool)
    square[SQUARE] = True
    return (mask & square).sum() / (mask | square).sum()


def decode(result) -> np.ndarray:
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="label-studio-sdk decodes masks")
    return brush.decode_rle(result["value"]["rle"]).reshape(120, 160, 4)[:, :, 3] > 0


def test_masks_of_a_whole_image(backend_class, task):
    (prediction,) = backend_class(label_config=BRUSH).predict([task])
    found = prediction["result"]
    assert {(result["from_name"], result["to_name"], result["type"]) for result in found} == {
        ("tag", "photo", "brushlabels")
    }
    assert found[0]["value"]["brushlabels"] == ["object"]
    assert max(fits(decode(result)) for result in found) > 0.8


def test_boxes_where_the_interface_asks_for_boxes(backend_class, task):
    (prediction,) = backend_class(label_config=BOXES).predict([task])
    assert {result["type"] for result in prediction["result"]} == {"rectanglelabels"}
    assert prediction["result"][0]["value"]["rectanglelabels"] == ["thing"]


def test_smart_tools(backend_class, task):
    backend = backend_class(label_config=BRUSH)

    def point(x, y, positive):
        value = {"x": x / 1.6, "y": y / 1.2, "keypointlabels": ["thing"]}
        return {"type": "keypointlabels", "is_positive": positive, "value": value}

    box = {"x": 100 / 1.6, "y": 30 / 1.2, "width": 40 / 1.6, "height": 50 / 1.2}
    rectangle = {"type": "rectanglelabels", "value": {**box, "rectanglelabels": ["thing"]}}
    for prompts in ([point(120, 55, 1), point(50, 60, 0)], [rectangle]):
        (prediction,) = backend.predict([task], context={"result": prompts})
        (result,) = prediction["result"]
        assert result["value"]["brushlabels"] == ["thing"]
        assert fits(decode(result)) > 0.7
    (prediction,) = backend.predict([task], context={"result": [point(3, 3, 0)]})
    assert prediction["result"] == []


def test_an_interface_without_labels_for_regions_is_refused(backend_class, task):
    config = (
        """<View><Image name="i" value="$picture"/><Choices name="c" toName="i"><Choice value="a"/></Choices></View>"""
    )
    with pytest.raises(UserError, match="BrushLabels, PolygonLabels, RectangleLabels"):
        backend_class(label_config=config).predict([task])


def test_without_label_studio_ml_an_error_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setitem(sys.modules, "label_studio_ml", None)
    monkeypatch.setitem(sys.modules, "label_studio_ml.model", None)
    with pytest.raises(UserError, match=r"label_studio_ml.* run pip install 'label-studio-ml'"):
        importlib.import_module(NAME)
