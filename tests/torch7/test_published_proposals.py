"""Conversion of published proposals, JSON chunks and .t7 files of MultiPath, to this package's proposal files."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import contextlib
import io
import json
import pickle
import runpy
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import BoxMode
from drawing import ROOT, compressed_rle
from pycocotools.coco import COCO
from sharpmask_d2.torch7 import published_proposals
from sharpmask_d2.torch7.published_proposals import convert_proposals, list_files, read_proposals
from torch7_writer import dumps

TOOL = ROOT / "tools" / "convert_proposals.py"

# y1, x1, y2, x2; within an image all numbers differ, so that no mix-up goes unseen.
BOXES = {139: [[10, 20, 41.5, 93], [3, 5, 60, 17]], 285: [], 632: [[1, 2, 30, 90.25]]}
SCORES = {139: [0.25, 0.75], 285: [], 632: [0.5]}
NAMES = ["COCO_val2014_000000000139.jpg", "COCO_val2014_000000000285.jpg", "COCO_val2014_000000000632.jpg"]


def _segment(image_id, mask, score) -> dict:
    return {"category_id": 1, "image_id": image_id, "score": score, "segmentation": compressed_rle(mask)}


def _box(image_id, score=0.5, box=(1, 2, 30, 4)) -> dict:
    return {"category_id": 1, "image_id": image_id, "score": score, "bbox": list(box)}


def _write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def _write_t7(path, content) -> str:
    path.write_bytes(dumps(content))
    return str(path)


def _arrays(per_image: dict) -> list:
    return [np.array(of_image, np.float32) for of_image in per_image.values()]


def _torch7(**changes) -> dict:
    """The table of a file with some entries changed, or removed if they are None."""
    content = {"images": NAMES, "boxes": _arrays(BOXES), "scores": _arrays(SCORES), **changes}
    return {key: value for key, value in content.items() if value is not None}


def _tight_box(mask) -> list:
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def _dicts(image_ids) -> list:
    return [{"image_id": i, "file_name": "x", "height": 120, "width": 160} for i in image_ids]


@pytest.fixture
def drawn(make_dataset, tmp_path):
    """A drawn dataset, and a folder with its masks in two chunks, of image 1 and of images 2 and 3; scores rise within an image."""
    dataset = make_dataset(tmp_path / "data")
    folder = tmp_path / "chunks"
    folder.mkdir()
    elements = {
        i: [_segment(i, mask, 0.1 + 0.2 * k) for k, mask in enumerate(masks)] for i, masks in dataset.masks.items()
    }
    _write(folder / "props-1-1.json", elements[1])
    _write(folder / "props-2-3.json", elements[2] + elements[3])
    return dataset, folder


# ------------------------------------------------------------------ what is read


def test_segments_become_results_that_coco_and_detectron2_load(drawn, tmp_path, capsys):
    dataset, folder = drawn
    output, pkl = tmp_path / "out" / "proposals.json", tmp_path / "pickles" / "proposals.pkl"
    convert_proposals(input=[str(folder)], output=str(output), pkl=str(pkl))
    assert f"wrote 9 proposals of 3 images: {output}, {pkl}" in capsys.readouterr().out
    with contextlib.redirect_stdout(io.StringIO()):
        results = COCO(str(dataset.annotations)).loadRes(str(output))
    loaded = {d["image_id"]: d for d in load_proposals_into_dataset(_dicts(dataset.masks), str(pkl))}
    for image_id, masks in dataset.masks.items():
        best_first = masks[::-1]
        annotations = results.imgToAnns[image_id]
        np.testing.assert_array_equal([results.annToMask(a) for a in annotations], best_first)
        assert {a["category_id"] for a in annotations} == {1}
        np.testing.assert_array_equal([a["bbox"] for a in annotations], [_tight_box(m) for m in best_first])
        assert [a["score"] for a in annotations] == pytest.approx([0.5, 0.3, 0.1])
        boxes = BoxMode.convert(
            loaded[image_id]["proposal_boxes"], loaded[image_id]["proposal_bbox_mode"], BoxMode.XYWH_ABS
        )
        np.testing.assert_array_equal(boxes, [_tight_box(m) for m in best_first])
        probabilities = 1 / (1 + np.exp(-loaded[image_id]["proposal_objectness_logits"]))
        np.testing.assert_allclose(probabilities, [0.5, 0.3, 0.1], rtol=1e-5)
    assert sorted(p.name for p in output.parent.iterdir()) == ["proposals.json"]


def test_box_chunks_keep_their_boxes_and_the_best_come_first(tmp_path):
    chunk = [_box(7, 0.2, [1, 2, 3, 4]), _box(7, 0.9, [5.5, 6, 7, 8]), _box(7, 0.2, [9, 9, 0, 1]), _box("b", 1)]
    path = _write(tmp_path / "boxes.json", chunk)
    assert list(read_proposals(path)) == [(7, [chunk[1], chunk[0], chunk[2]]), ("b", [chunk[3]])]
    convert_proposals(input=[path], output=str(tmp_path / "out.json"), num_proposals=2)
    assert json.loads((tmp_path / "out.json").read_text()) == [chunk[1], chunk[0], chunk[3]]


def test_count_is_read_and_written_as_counts(tmp_path):
    mask = np.zeros((9, 14), bool)
    mask[2:4, 5:12] = True
    element = _segment(3, mask, 0.5)
    element["segmentation"]["count"] = element["segmentation"].pop("counts")
    ((_, (result,)),) = read_proposals(_write(tmp_path / "p.json", [element]))
    assert set(result["segmentation"]) == {"size", "counts"}
    np.testing.assert_array_equal(coco_mask.decode(result["segmentation"]), mask)
    assert result["bbox"] == [5, 2, 7, 2]


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("column", [True, False])
def test_torch7_boxes_are_converted_to_x_y_width_height(tmp_path, scored, column):
    scores = [np.array(s, np.float32).reshape(-1, 1) if column and s else np.array(s) for s in SCORES.values()]
    path = _write_t7(tmp_path / "val.t7", _torch7(scores=scores if scored else None))
    output, pkl = tmp_path / "out.json", tmp_path / "out.pkl"
    convert_proposals(input=[path], output=str(output), pkl=str(pkl))
    first, second = ([3, 5, 60, 17], [10, 20, 41.5, 93]) if scored else ([10, 20, 41.5, 93], [3, 5, 60, 17])
    found = [(r["image_id"], r["bbox"], r["score"]) for r in json.loads(output.read_text())]
    expected = [(139, first), (139, second), (632, [1, 2, 30, 90.25])]
    expected = [(i, [x1, y1, x2 - x1, y2 - y1]) for i, (y1, x1, y2, x2) in expected]
    assert [r[:2] for r in found] == expected
    assert [r[2] for r in found] == ([0.75, 0.25, 0.5] if scored else [0, 0, 0])
    content = pickle.loads(pkl.read_bytes())
    assert [boxes.shape for boxes in content["boxes"]] == [(2, 4), (0, 4), (1, 4)]
    loaded = {d["image_id"]: d["proposal_boxes"].tolist() for d in load_proposals_into_dataset(_dicts(BOXES), str(pkl))}
    xyxy = {i: [[x1, y1, x2, y2] for y1, x1, y2, x2 in boxes] for i, boxes in BOXES.items()}
    assert loaded[285] == []
    assert loaded[632] == xyxy[632]
    # Detectron2 decides the order of equal scores.
    assert loaded[139] == xyxy[139][::-1] if scored else sorted(loaded[139]) == sorted(xyxy[139])


def test_annotations_give_the_ids_of_torch7_names(tmp_path):
    path = _write_t7(tmp_path / "val.t7", _torch7(images=["b.jpg", "folder/a.jpg", "c1.jpg"]))
    images = [{"file_name": name, "id": i} for i, name in [(5, "val/a.jpg"), ("six", "b.jpg"), (7, "c1.jpg")]]
    annotations = _write(tmp_path / "instances.json", {"images": images})
    convert_proposals(
        input=[path], output=str(tmp_path / "o.json"), pkl=str(tmp_path / "o.pkl"), annotations=annotations
    )
    assert pickle.loads((tmp_path / "o.pkl").read_bytes())["ids"] == ["six", 5, 7]


def test_files_of_a_folder_are_in_natural_order(tmp_path):
    names = ["props-1-500.json", "props-501-1000.json", "props-1001-1500.json", "props-10001-10500.json", "val.t7"]
    for name in sorted(names) + ["README.md"]:
        (tmp_path / name).touch()
    assert [path.name for path in list_files([tmp_path])] == names
    given = [str(tmp_path / names[2]), str(tmp_path / names[0])]
    assert [str(path) for path in list_files(given)] == given


@pytest.mark.parametrize("piece", [1, 7, 100])
@pytest.mark.parametrize("indent", [None, 2])
def test_elements_may_lie_across_the_pieces_that_are_read(tmp_path, monkeypatch, piece, indent):
    chunk = [_box(i, 0.5 - k / 8) for i in (1, 2) for k in range(3)]
    path = _write(tmp_path / "p.json", json.dumps(chunk, indent=indent) + "\n")
    monkeypatch.setattr(published_proposals, "_PIECE", piece)
    assert [result for _, results in read_proposals(path) for result in results] == chunk
    for empty in ("[]", "[\n]\n"):
        assert list(read_proposals(_write(tmp_path / "e.json", empty))) == []


def test_a_chunk_is_read_as_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(published_proposals, "_PIECE", 5000)
    text = json.dumps([_box(k // 20) for k in range(10000)])[:-1]
    proposals = read_proposals(_write(tmp_path / "p.json", text))
    tracemalloc.start()
    try:
        assert [next(proposals)[0] for _ in range(400)] == list(range(400))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(text) / 4
    with pytest.raises(ValueError, match=f"not whole JSON: it ends at character {len(text)};"):
        list(proposals)


# ------------------------------------------------------------------ runs that stop


def test_a_stopped_run_is_resumed(drawn, tmp_path, capsys):
    _, folder = drawn
    whole = tmp_path / "whole.json"
    convert_proposals(input=[str(folder)], output=str(whole), pkl=str(tmp_path / "whole.pkl"))
    second = folder / "props-2-3.json"
    text = second.read_text()
    second.write_text(text[:-100])
    again = {"input": [str(folder)], "output": str(tmp_path / "again.json"), "pkl": str(tmp_path / "again.pkl")}
    with pytest.raises(ValueError, match=r"props-2-3\.json is not whole JSON"):
        convert_proposals(**again)
    assert not list(tmp_path.glob("again.json")) + list(tmp_path.glob("again.pkl"))
    lines = (tmp_path / "again.json.partial").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines[1:]] == [1, 2]
    second.write_text(text)
    with pytest.raises(
        ValueError,
        match=r"again\.json\.partial was written with other settings: --num-proposals was not set and is 1\.",
    ):
        convert_proposals(**again, num_proposals=1)
    capsys.readouterr()
    convert_proposals(**again)
    out = capsys.readouterr().out
    assert "2 images are done already" in out
    assert "wrote 9 proposals of 3 images" in out
    assert (tmp_path / "again.json").read_text() == whole.read_text()
    assert (tmp_path / "again.pkl").read_bytes() == (tmp_path / "whole.pkl").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_an_image_that_occurs_twice_is_named(tmp_path):
    one, two = (_write(tmp_path / f"{i}.json", [_box(i), _box(9)]) for i in (1, 2))
    scattered = _write(tmp_path / "scattered.json", [_box(4), _box(5), _box(4)])
    with pytest.raises(ValueError, match=r"scattered\.json: image 4 occurs a second time"):
        list(read_proposals(scattered))
    output = str(tmp_path / "out.json")
    for _ in range(2):  # a resumed run fails as well
        with pytest.raises(ValueError, match=r"2\.json: image 9 is also in .*1\.json"):
            convert_proposals(input=[one, two], output=output)


# ------------------------------------------------------------------ what is refused

WHOLE = json.dumps([_box(8)])
MASK = np.pad(np.ones((3, 5), bool), ((1, 6), (2, 4)))


def _with(segmentation: dict, **changes) -> dict:
    changed = {**segmentation, **changes}
    return {**_box(8), "segmentation": {key: value for key, value in changed.items() if value is not None}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"does not begin with '\['"),
        ('{"images": []}', r"does not begin with '\['"),
        ("[", "is not whole JSON: it ends at character 1"),
        (WHOLE[:-1], rf"is not whole JSON: it ends at character {len(WHOLE) - 1}; was it downloaded"),
        (WHOLE[:-20], "is not whole JSON"),
        (WHOLE + "x", f"the list ends at character {len(WHOLE)}, but not the file"),
        (WHOLE[:-1] + " " + WHOLE[1:], rf"'{{' instead of ',' or '\]' at character {len(WHOLE)}"),
        ("[" * 100_000, "is nested too deeply"),
        ("[" + "1" * 5000 + "]", "is not a JSON list of COCO results: Exceeds"),
        ([_box(8, float("nan"))], "has score nan, not a probability"),
        ([_box(8, 1, [1, 2, float("inf"), 4])], r"of image 8, has bbox \[1, 2, inf, 4\]"),
        ([_box(8), 3], "result 1 is not a COCO result but '3'"),
        ([_box(None)], "result 0 has no image_id"),
        ([{"score": 1, "bbox": [0, 0, 1, 1]}], "result 0 has no image_id"),
        ([_box(8), {"image_id": 8, "bbox": [0, 0, 1, 1]}], "result 1, of image 8, has no score"),
        ([_box(8, 1.5)], "result 0, of image 8, has score 1.5, not a probability"),
        ([_box(8, -0.1)], "has score -0.1, not a probability"),
        ([_box(8, "1")], "has score '1', not a probability"),
        ([{"image_id": 8, "score": 1}], "of image 8, has neither bbox nor segmentation"),
        ([_box(8, 1, [1, 2, 3])], r"of image 8, has bbox \[1, 2, 3\]"),
        ([_box(8, 1, [1, 2, -3, 4])], r"of image 8, has bbox \[1, 2, -3, 4\]"),
        ([_box(8, 1, [1, 2, "3", 4])], "of image 8, has bbox"),
        ([_box(8), _segment(8, MASK, 1)], "only some results of image 8 have a segmentation"),
        ([{**_box(8), "segmentation": [[1, 2, 3, 4, 5, 6]]}], "image 8 has a segmentation that is not RLE"),
        ([_with(compressed_rle(MASK), size=None)], "image 8 has an RLE with size None"),
        ([_with(compressed_rle(MASK), size=[10])], r"image 8 has an RLE with size \[10\]"),
        ([_with(compressed_rle(MASK), size=[-10, -11])], r"image 8 has an RLE with size \[-10, -11\]"),
        ([_with(compressed_rle(MASK), counts=None)], "image 8 has an RLE without counts"),
        ([_with(compressed_rle(MASK), counts=[1, 109])], "only compressed RLE can be read"),
        ([_with(compressed_rle(MASK), counts="")], "image 8 has an RLE without counts"),
        ([_with(compressed_rle(MASK), counts="hello world")], "image 8 has a broken RLE: counts 'hello world'"),
        ([_with(compressed_rle(MASK), counts=compressed_rle(MASK)["counts"][:-1])], "image 8 has a broken RLE"),
        ([_with(compressed_rle(MASK), size=[11, 11])], "do not fill an image of 11 x 11 pixels"),
    ],
)
def test_wrong_chunks_are_refused(tmp_path, content, message):
    path = _write(tmp_path / "props-1-500.json", content)
    with pytest.raises(ValueError, match=message) as raised:
        list(read_proposals(path))
    assert str(raised.value).startswith(path)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes(json.dumps([_with(compressed_rle(MASK))]).encode().replace(b'"counts": "', b'"counts": "\xff'))
    with pytest.raises(ValueError, match="image 8 has a broken RLE"):
        list(read_proposals(path))


def _first_boxes(array) -> list:
    return [np.asarray(array, np.float32), np.zeros(0), np.ones((1, 4))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "has no images: .* this one has"),
        (5, "does not hold a table"),
        (_torch7(images=None), r"has no images: .* this one has \['boxes', 'scores'\]"),
        (_torch7(boxes=None), "has no boxes"),
        (_torch7(boxes=3), "boxes is not a list"),
        (_torch7(boxes={1: np.zeros(0), 3: np.zeros(0)}), "boxes is not a list without gaps"),
        (_torch7(images=NAMES[:2]), "have different lengths: 2, 3 and 3"),
        (_torch7(scores=[np.array([0.5])]), "have different lengths: 3, 3 and 1"),
        (_torch7(images=[4, 5, 6]), "images has 4.0 where a file name is expected"),
        (_torch7(images=["holiday.jpg", *NAMES[1:]]), r"the name of image holiday\.jpg does not end in its id"),
        (_torch7(images=[NAMES[0], NAMES[0], NAMES[2]]), "image 139 occurs a second time"),
        (_torch7(boxes=_first_boxes([[1, 2, 3, 4, 5]] * 2)), r"139\.jpg: boxes are of shape \(2, 5\)"),
        (_torch7(boxes=_first_boxes([1, 2, 3, 4])), r"139\.jpg: boxes are of shape \(4,\)"),
        (_torch7(boxes=["x", "y", "z"]), r"139\.jpg: boxes are of type str"),
        (_torch7(boxes=_first_boxes([[0, 0, 1, 1], [1, 5, 3, 4]])), r"139\.jpg: box 2 is \[1\.0, 5\.0, 3\.0, 4\.0\]"),
        (_torch7(boxes=_first_boxes([[3, 2, 1, 4], [0, 0, 1, 1]])), r"139\.jpg: box 1 is \[3\.0, 2\.0, 1\.0, 4\.0\]"),
        (_torch7(boxes=_first_boxes([[1, 2, np.nan, 4]] * 2)), "139.jpg: box 1 is"),
        (_torch7(boxes=_first_boxes([[1, 2, np.inf, 4]] * 2)), "139.jpg: box 1 is"),
        (_torch7(scores=_arrays({**SCORES, 139: [0.5]})), r"139\.jpg: 1 scores for 2 boxes"),
        (_torch7(scores=_arrays({**SCORES, 285: [0.5]})), r"285\.jpg: 1 scores for 0 boxes"),
        (_torch7(scores=["x"] * 3), "139.jpg: type str scores for 2 boxes"),
        (_torch7(scores=_arrays({**SCORES, 139: [0.5, 1.5]})), r"139\.jpg: score 1\.5 is not a probability"),
        (_torch7(scores=_arrays({**SCORES, 139: [0.5, -1]})), r"139\.jpg: score -1\.0 is not a probability"),
        (_torch7(scores=_arrays({**SCORES, 139: [np.nan, 0.5]})), r"139\.jpg: score nan is not a probability"),
    ],
)
def test_wrong_torch7_files_are_refused(tmp_path, content, message):
    path = _write_t7(tmp_path / "val.t7", content)
    with pytest.raises(ValueError, match=message) as raised:
        list(read_proposals(path))
    assert str(raised.value).startswith(path)


def test_a_broken_torch7_file_is_refused(tmp_path):
    path = tmp_path / "val.t7"
    path.write_bytes(dumps(_torch7())[:-3])
    with pytest.raises(ValueError, match=r"val\.t7 is not a whole Torch7 file"):
        list(read_proposals(path))


def test_wrong_inputs_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    text, output = _write(tmp_path / "notes.txt", "x"), str(tmp_path / "out.json")
    good = _write(tmp_path / "good.json", [_box(1)])
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere\.json"):
        convert_proposals(input=[str(tmp_path / "nowhere.json")], output=output)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        list(read_proposals(tmp_path / "nowhere.json"))
    with pytest.raises(FileNotFoundError, match=r"empty has no \.json or \.t7"):
        convert_proposals(input=[str(tmp_path / "empty")], output=output)
    with pytest.raises(ValueError, match=r"notes\.txt is neither"):
        convert_proposals(input=[good, text], output=output)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        convert_proposals(input=[good], output=output, num_proposals=0)
    for targets in ({"output": good}, {"output": output, "pkl": good}):
        with pytest.raises(ValueError, match=r"good\.json is one of the inputs"):
            convert_proposals(input=[good], **targets)
    assert not Path(output + ".partial").exists()
    assert json.loads(Path(good).read_text()) == [_box(1)]
    segments = _write(tmp_path / "segments.json", [_segment(2, MASK, 1)])
    with pytest.raises(ValueError, match=r"segments\.json: image 2 has segments, but the images before it have boxes"):
        convert_proposals(input=[good, segments], output=output)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("[1, 2", r"instances\.json is not JSON: .* a COCO annotation file is expected"),
        ("[1, 2]", r"instances\.json is not a COCO annotation file"),
        ({"images": [{"id": 1}]}, r"instances\.json: image 1 .* has no file_name"),
        ({"images": [{"id": 1, "file_name": "1.jpg"}]}, r"val\.t7: image COCO_.*139\.jpg is not in the annotations"),
        (
            {"images": [{"id": 1, "file_name": "a/1.jpg"}, {"id": 2, "file_name": "b/1.jpg"}]},
            r"images 1 and 2 are both named 1\.jpg",
        ),
    ],
)
def test_wrong_annotations_are_named(tmp_path, annotations, message):
    path = _write(tmp_path / "instances.json", annotations)
    inputs = [_write_t7(tmp_path / "val.t7", _torch7())]
    with pytest.raises(ValueError, match=message):
        convert_proposals(input=inputs, output=str(tmp_path / "o.json"), annotations=path)


# ------------------------------------------------------------------ the tool


def _run_tool(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [TOOL.name, *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_the_tool_converts(tmp_path, monkeypatch):
    chunk = _write(tmp_path / "p.json", [_box(1, 0.25), _box(1, 0.5)])
    torch7 = _write_t7(tmp_path / "val.t7", _torch7())
    images = [{"file_name": name, "id": i} for i, name in enumerate(NAMES, start=20)]
    annotations = _write(tmp_path / "instances.json", {"images": images})
    output, pkl = tmp_path / "o.json", tmp_path / "o.pkl"
    options = ["--annotations", annotations, "--num-proposals", 1, "--pkl", pkl]
    _run_tool(monkeypatch, "--input", chunk, torch7, "--output", output, *options)
    found = [(r["image_id"], r["score"]) for r in json.loads(output.read_text())]
    assert found == [(1, 0.5), (20, 0.75), (22, 0.5)]
    assert pickle.loads(pkl.read_bytes())["ids"] == [1, 20, 21, 22]


@pytest.mark.parametrize("name", ["broken.json", "nowhere.json"])
def test_the_tool_ends_with_a_message(tmp_path, monkeypatch, capsys, name):
    _write(tmp_path / "broken.json", "[{")
    with pytest.raises(SystemExit) as ended:
        _run_tool(monkeypatch, "--input", tmp_path / name, "--output", tmp_path / "o.json")
    assert ended.value.code == 2
    assert name in capsys.readouterr().err.splitlines()[-1]
