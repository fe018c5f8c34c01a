"""`sharpmask export`: what it writes, and what it says where it cannot."""

import json

import pytest
from labelled import write_files
from sharpmask_d2.interop.export import FORMATS

import sharpmask_command


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path)


def export(*arguments) -> None:
    sharpmask_command.main(["export", *map(str, arguments)])


def refused(capsys, *arguments) -> str:
    """The line in which a command ends that is refused."""
    with pytest.raises(SystemExit) as ended:
        export(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_written_twice_alike(drawn, tmp_path, capsys, name):
    arguments = ["results.json", "--to", name, "--output", "o", "--annotations", "images.json", "--keep", "4"]
    export(*arguments)
    *_, wrote, following = capsys.readouterr().out.splitlines()
    assert wrote == "wrote 5 masks of 3 images: o"
    assert following.startswith("next: ")

    def contents() -> dict:
        paths = [tmp_path / "o", *(tmp_path / "o").rglob("*")]
        return {path: path.read_bytes() for path in paths if path.is_file()}

    first = contents()
    assert first
    export(*arguments)
    assert contents() == first
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


@pytest.mark.parametrize("name", FORMATS)
def test_files_without_masks_are_written(drawn, tmp_path, name):
    drawn.results.write_text("[]")
    export("results.json", "--to", name, "--output", "o", "--annotations", "images.json")
    assert (tmp_path / "o").exists()


def test_scores_and_labels_are_options(drawn, tmp_path, capsys):
    export("results.json", "--to", "coco", "--output", "o.json", "--min-score", "0.75", "--label", "thing")
    content = json.loads((tmp_path / "o.json").read_text())
    assert [annotation["score"] for annotation in content["annotations"]] == [0.9, 0.8]
    assert content["categories"] == [{"id": 1, "name": "thing"}]


def test_mistakes_are_named(drawn, tmp_path, capsys):
    assert "invalid choice: 'voc'" in refused(capsys, "results.json", "--to", "voc", "--output", "o")
    assert "--keep: 0 is less than 1" in refused(capsys, "results.json", "--to", "coco", "--output", "o", "--keep", "0")
    assert "none.json" in refused(capsys, "none.json", "--to", "coco", "--output", "o.json")
    line = refused(capsys, "results.json", "--to", "png", "--output", "o", "--shape", "box")
    assert line == "--shape box: the format png has mask only"
    line = refused(capsys, "results.json", "--to", "coco", "--output", "results.json")
    assert "--output: results.json is one of the inputs" in line
    line = refused(capsys, "results.json", "--to", "coco", "--output", "o.json", "--image-root", "none")
    assert line == "--image-root: there is no folder none"
    line = refused(capsys, "results.json", "--to", "yolo", "--output", "images.json")
    assert "images.json is not a folder" in line
    assert not (tmp_path / "o").exists()


def test_no_image_is_replaced(drawn, capsys):
    before = (drawn.image_root / "1.png").read_bytes()
    arguments = ["results.json", "--to", "png", "--output", "images", "--image-root", "images"]
    assert "image 1: images/1.png is one of the inputs" in refused(capsys, *arguments)
    assert (drawn.image_root / "1.png").read_bytes() == before


def test_two_images_of_one_name_are_refused(drawn, tmp_path, capsys):
    results = json.loads(drawn.results.read_text())
    for result in results:
        result["file_name"] = "a.jpg" if result["image_id"] == 1 else "a.png"
    drawn.results.write_text(json.dumps(results))
    line = refused(capsys, "results.json", "--to", "labelme", "--output", "o")
    assert "image 2: o/a.json is also written by --output, image 1" in line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["../1.png", "/tmp/1.png", "a/../../1.png"])
def test_no_file_is_written_outside_of_the_folder(drawn, tmp_path, capsys, name):
    results = json.loads(drawn.results.read_text())
    results[-1]["file_name"] = results[0]["file_name"] = name
    drawn.results.write_text(json.dumps(results))
    line = refused(capsys, "results.json", "--to", "png", "--output", "o/p")
    assert "results.json: image 1 has the file_name" in line
    assert not (tmp_path / "o").exists()
