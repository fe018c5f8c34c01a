"""Lists of images and results of bulk runs, without Ray."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import sys

import cv2
import numpy as np
import pytest
from sharpmask_d2.cli import bulk
from sharpmask_d2.cli.command import run
from sharpmask_d2.data.images import ImageError
from sharpmask_d2.errors import UserError


@pytest.fixture
def pa():
    return pytest.importorskip("pyarrow", reason="needs Arrow: pip install -e '.[ray]'")


@pytest.fixture
def write(pa, tmp_path):
    """A function that writes columns as a Parquet file and returns its path."""
    from pyarrow import parquet

    def write(columns: dict, name: str = "list.parquet") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table(columns), path)
        return str(path)

    return write


def test_a_folder_of_lists_is_one_list(write, tmp_path):
    from sharpmask_d2.bulk.images import read_list

    write({"image_id": [7, 3], "uri": ["a.jpg", "s3://bucket/b.jpg"], "more": [1, 2]}, "lists/a.parquet")
    write({"uri": ["c.jpg"], "image_id": np.array([5], np.int32)}, "lists/deep/b.parquet")
    for path in (str(tmp_path / "lists"), f"file://{tmp_path / 'lists'}"):
        assert read_list(path).to_pydict() == {
            "image_id": [7, 3, 5],
            "uri": ["a.jpg", "s3://bucket/b.jpg", "c.jpg"],
            "file_name": [None] * 3,
        }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1], "uri": ["a"]}, "there is no column image_id; it has id, uri"),
        ({"image_id": [1.5], "uri": ["a"]}, "image_id is of type double: whole numbers or text"),
        ({"image_id": [1, None], "uri": ["a", "b"]}, "an image_id or a uri is missing in 1 rows"),
        ({"image_id": ["x", "y", "x"], "uri": ["a", "b", "c"]}, "image_id x is there more than once"),
    ],
)
def test_a_list_with_a_mistake_is_named(write, columns, message):
    from sharpmask_d2.bulk.images import read_list

    path = write(columns)
    with pytest.raises(UserError, match=message) as raised:
        read_list(path)
    assert path in str(raised.value)


def test_images_keep_their_ids_when_others_are_added(pa):
    from sharpmask_d2.bulk.images import check_extends

    old = pa.table({"image_id": [1, 2], "uri": ["a", "b"]})
    check_extends(old, pa.table({"image_id": [0, 2, 1], "uri": ["c", "b", "a"]}), "results")
    with pytest.raises(UserError, match="results has results of image 2, b, which is c now"):
        check_extends(old, pa.table({"image_id": [1, 2], "uri": ["a", "c"]}), "results")
    with pytest.raises(UserError, match="image 1, a, which is missing now"):
        check_extends(old, pa.table({"image_id": [2], "uri": ["b"]}), "results")


def test_images_are_read_by_their_uris(pa, tmp_path):
    from sharpmask_d2.bulk.images import read_uri

    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), image)
    for uri in (str(path), f"file://{path}"):
        np.testing.assert_array_equal(read_uri(uri), image)
    path.write_bytes(b"no image")
    for uri in (str(path), f"file://{path}"):
        with pytest.raises(ImageError, match="no image of a format that Pillow reads"):
            read_uri(uri)
    for uri in (f"{path}.none", f"file://{path}.none"):
        with pytest.raises(ImageError, match="there is no such file"):
            read_uri(uri)
    with pytest.raises(UserError, match=r"nowhere://a\.jpg: no file system is known"):
        read_uri("nowhere://a.jpg")


def test_a_run_that_is_not_finished_is_not_converted(write, tmp_path):
    from sharpmask_d2.bulk.results import finished_ids, to_coco
    from sharpmask_d2.bulk.storage import open_folder

    with pytest.raises(UserError, match="has no results of `sharpmask bulk`"):
        to_coco(str(tmp_path), str(tmp_path / "out.json"))
    write({"image_id": [1, 2, 3], "uri": ["a", "b", "c"], "file_name": ["a", "b", "c"]}, "images.parquet")
    write({"image_id": [2]}, "proposals/0.parquet")
    assert finished_ids(open_folder(str(tmp_path))) == {2}
    with pytest.raises(UserError, match="2 of 3 images have no result, such as 1: finish the run"):
        to_coco(str(tmp_path), str(tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()


def test_without_arrow_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in [name for name in sys.modules if name.startswith("sharpmask_d2.bulk.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit):
        run(lambda: bulk.main(["--input", ".", "--output", "results"]))
    assert capsys.readouterr().err == "pyarrow is not installed: run pip install 'sharpmask_d2[ray]'\n"
