"""Label Studio's library reads the predictions that are written for it."""

import json

import numpy as np
import pytest
from labelled import SIZE, differ_within, draw_masks, fill_holes, read_drawn, write_files
from pycocotools import mask as mask_utils
from sharpmask_d2.interop.export import export_masks
from sharpmask_d2.interop.label_studio import encode_brush, label_studio_results, labelling_interface
from sharpmask_d2.structures import TightMask


@pytest.fixture(scope="module")
def brush():
    return pytest.importorskip("label_studio_sdk.converter.brush", reason="label-studio-sdk encodes and decodes masks")


@pytest.fixture(scope="module")
def interfaces():
    return pytest.importorskip("label_studio_sdk.label_interface", reason="label-studio-sdk checks predictions")


def export(drawn, output, **options) -> list:
    options = {"annotations": str(drawn.annotations), **options}
    export_masks(str(drawn.results), to="label-studio", output=str(output), **options)
    return json.loads(output.read_text())


def test_masks_are_encoded_as_by_label_studio(brush):
    rng = np.random.default_rng(0)
    bitmaps = [*draw_masks(), np.ones(SIZE, bool), rng.random(SIZE) < 0.5, np.ones((300, 400), bool)]
    bitmaps += [np.pad(np.ones((2, 2), bool), ((0, side), (side, 0))) for side in range(9)]
    for bitmap in bitmaps:
        encoded = encode_brush(TightMask.from_bitmap(bitmap), bitmap.shape)
        assert encoded == brush.mask2rle(bitmap.astype(np.uint8) * 255)
        decoded = brush.decode_rle(encoded).reshape(*bitmap.shape, 4)[:, :, 3]
        assert np.array_equal(decoded, bitmap * 255)


def decode_brush(encoded: list) -> np.ndarray:
    """The values of a brush's RLE, by the format's description: https://thi.ng/rle-pack."""
    bits = "".join(f"{byte:08b}" for byte in encoded)
    place = 0

    def read(size: int) -> int:
        nonlocal place
        place += size
        return int(bits[place - size : place], 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values = []
    while len(values) < total:
        repeats = read(1)
        length = read(sizes[read(2)]) + 1
        values += [read(word)] * length if repeats else [read(word) for _ in range(length)]
    assert len(bits) - place <= 8
    return np.array(values, np.uint8)


def test_masks_are_decoded_as_the_format_says():
    for bitmap in [*draw_masks(), np.ones((200, 300), bool)]:
        decoded = decode_brush(encode_brush(TightMask.from_bitmap(bitmap), bitmap.shape))
        assert np.array_equal(decoded.reshape(*bitmap.shape, 4), np.repeat(bitmap[..., None], 4, axis=2) * 255)


def test_label_studio_reads_the_masks(brush, interfaces, tmp_path, capsys):
    drawn = write_files(tmp_path)
    tasks = export(drawn, tmp_path / "o.json")
    assert [task["data"]["image"] for task in tasks] == [
        f"/data/local-files/?d={name}" for name in ("1.png", "sub/2.jpg", "3.png")
    ]
    interface = interfaces.LabelInterface(capsys.readouterr().out.splitlines()[-1].partition(": ")[2])
    for task in tasks:
        assert interface.validate_prediction(task["predictions"][0], return_errors=True) == []
    found = tasks[0]["predictions"][0]["result"]
    for result, bitmap in zip(found, drawn.bitmaps):
        # In the form of Label Studio's own exports.
        flat = {**result, **result["value"]}
        (layer,) = brush.decode_from_annotation("label", [flat]).values()
        assert np.array_equal(layer, bitmap * 255)
    assert tasks[0]["predictions"][0]["score"] == pytest.approx(0.7)
    assert tasks[2]["predictions"][0]["result"] == []


@pytest.mark.parametrize("shape", ["polygon", "box"])
def test_label_studio_reads_polygons_and_boxes(interfaces, tmp_path, shape):
    image = read_drawn(tmp_path).images[0]
    interface = interfaces.LabelInterface(labelling_interface({1: "a & b"}, shape=shape))
    assert next(iter(interface.labels)).keys() == {"a & b"}
    found = label_studio_results(image, {1: "a & b"}, shape=shape)
    assert interface.validate_prediction({"result": found}, return_errors=True) == []
    percent = np.array([SIZE[1], SIZE[0]]) / 100
    for number, bitmap in enumerate(draw_masks()):
        parts = [result["value"] for result in found if result["id"].startswith(f"{number}-")]
        if shape == "box":
            (part,) = parts
            box = [part[key] for key in ("x", "y", "width", "height")] * np.tile(percent, 2)
            x0, y0, x1, y1 = TightMask.from_bitmap(bitmap).box
            assert box == pytest.approx([x0, y0, x1 - x0, y1 - y0])
        else:
            assert len(parts) == (2 if number == 2 else 1)
            polygons = [(np.array(part["points"]) * percent).ravel() for part in parts]
            filled = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, *SIZE)))
            assert differ_within(fill_holes(bitmap), filled.astype(bool), 1)


def test_images_have_urls(tmp_path):
    tasks = export(write_files(tmp_path), tmp_path / "o.json", image_url="https://example.org/a b/".replace(" ", "%20"))
    assert tasks[1]["data"]["image"] == "https://example.org/a%20b/sub/2.jpg"
