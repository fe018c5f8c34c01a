"""What subcommands print: progress and status unless --quiet is given, JSON with --json, and at the end the next command, which works."""

import json
import shlex
from pathlib import Path

import pytest
from drawing import to_small_detector, write_with_weights
from labelled import write_files
from sharpmask_d2.evaluation.proposal_evaluation import evaluate_proposal_json, without_nan

import sharpmask_command

SMALL = "INPUT.MIN_SIZE_TEST 96 MODEL.DEVICE cpu"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder. Returns what it printed: the lines of stdout, and stderr."""
    monkeypatch.chdir(tmp_path)

    def main(line: str, status: int = 0) -> tuple[list[str], str]:
        capsys.readouterr()
        ended = 0
        try:
            sharpmask_command.main(shlex.split(line))
        except SystemExit as error:
            ended = error.code
        printed = capsys.readouterr()
        assert ended == status, printed.err
        return printed.out.splitlines(), printed.err

    return main


@pytest.fixture
def drawn(tmp_path):
    """results.json, images.json and the folder images/."""
    return write_files(tmp_path)


@pytest.fixture
def propose(tiny_cfg, tmp_path, photographs):
    """A command line for three photographs."""
    tiny_cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 12
    config = write_with_weights(tiny_cfg, tmp_path)
    return f"propose --input photographs --output p.json --config-file {config} --weights {tmp_path / 'model.pth'}"


def next_of(lines: list[str]) -> str:
    start, command = lines[-1].split(" ", 1)
    assert start == "next:"
    assert command.startswith("sharpmask ")
    return command.removeprefix("sharpmask ")


def test_the_commands_that_follow_one_another_work(run, propose):
    lines, errors = run(propose)
    assert lines[-2] == "wrote 36 proposals of 3 images: p.json"
    assert lines[-1] == "next: sharpmask report p.json --image-root photographs --output p.html"
    assert "proposals: 100%" in errors
    lines, errors = run(next_of(lines))
    assert "drawing: 100%" in errors
    assert lines[-2].startswith("wrote a report, ")
    assert lines[-2].endswith(" MB: p.html")
    assert lines[-1] == f"next: python -m webbrowser {Path('p.html').resolve().as_uri()}"


def test_images_of_several_folders_are_exported(run, propose):
    Path("other folder").mkdir()
    Path("photographs/2.png").rename("other folder/3.png")
    lines, _ = run(propose.replace("--input photographs", "--input photographs 'other folder/3.png'"))
    assert lines[-1] == "next: sharpmask export p.json --to cvat --output p.xml"
    lines, _ = run(next_of(lines))
    assert lines[-1] == "next: cvat-cli task import-dataset TASK_ID p.xml --format 'CVAT 1.1'"


def test_listed_images_are_reported_with_their_annotations(run, propose, drawn):
    lines, _ = run(propose.replace("--input photographs", "--annotations images.json --image-root images"))
    assert next_of(lines) == "report p.json --annotations images.json --image-root images --output p.html"
    run(next_of(lines))


def test_a_dataset_with_masks_is_exported(run, tmp_path, make_dataset):
    dataset = make_dataset(tmp_path, num_images=1, size=(96, 128))
    boxes = f"segment --boxes {dataset.annotations} --image-root {dataset.image_root} --output m.json {SMALL}"
    lines, _ = run(boxes)
    assert next_of(lines) == "export m.json --to cvat --output m.xml"
    run(next_of(lines))
    lines, _ = run(f"{boxes.replace('m.json', 'n.json')} --json --quiet")
    assert [json.loads(line) for line in lines] == [{"images": 1, "failed": 0, "results": 3, "output": "n.json"}]


def test_nothing_is_printed_with_quiet(run, propose, drawn):
    Path("photographs/notes.txt").write_text("of another kind")
    for line in (
        propose,
        "report p.json --image-root photographs --output p.html",
        "report results.json --annotations images.json --image-root images --output r.html",
        "export p.json --to coco --output c.json",
        "export p.json --to label-studio --output l.json",
    ):
        assert run(f"{line} --quiet") == ([], ""), line
    assert {"p.json", "p.html", "r.html", "c.json", "l.json"} <= {path.name for path in Path().iterdir()}


def test_errors_are_printed_with_quiet(run, propose):
    Path("photographs/1.png").write_text("no image")
    lines, errors = run(f"{propose} --quiet", status=1)
    assert not lines
    first, second = errors.splitlines()
    assert "1.png" in first
    assert second == "1 image could not be processed, see above"
    lines, errors = run(f"{propose} --json", status=1)
    # The status of the resumed run is not printed, and progress is.
    assert [json.loads(line) for line in lines] == [{"images": 2, "failed": 1, "results": 24, "output": "p.json"}]
    assert "proposals: 100%" in errors


def test_detections_end_in_a_report(run, tiny_cfg, tmp_path, photographs):
    to_small_detector(tiny_cfg, roi_heads="ProposalMaskROIHeads", num_classes=80)
    tiny_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = 6
    tiny_cfg.DATASETS.TRAIN = ("coco_2017_val",)
    detect = f"detect --input photographs --output out --config-file {write_with_weights(tiny_cfg, tmp_path)}"
    lines, _ = run(detect)
    assert lines[-2] == "wrote 18 detections of 3 images: out/detections.json"
    assert next_of(lines) == "report out/detections.json --image-root photographs --output out/detections.html"
    run(next_of(lines))
    assert run(f"{detect} --quiet") == ([], "")


def test_evaluations_are_tables_or_one_json_object(run, tmp_path, make_dataset):
    dataset = make_dataset(tmp_path, num_images=2)
    found = [
        {"image_id": annotation["image_id"], "score": 0.5, "bbox": annotation["bbox"]}
        for annotation in json.loads(dataset.annotations.read_text())["annotations"][1:]
    ]
    Path("p.json").write_text(json.dumps(found))
    line = f"evaluate --annotations {dataset.annotations} --proposals p.json"
    table, errors = run(line)
    assert "evaluating: 100%" in errors
    assert run(f"{line} --quiet") == (table, "")
    printed, errors = run(f"{line} --json --output m.json")
    assert "evaluating: 100%" in errors
    expected = without_nan(evaluate_proposal_json(dataset.annotations, found))
    assert [json.loads(text) for text in printed] == [expected] == [json.loads(Path("m.json").read_text())]
    assert None in expected["bbox"].values()


def test_analyses_are_tables_or_one_json_object(run, drawn):
    line = "analyze --annotations images.json --proposals results.json"
    table, _ = run(f"{line} --quiet")
    assert len(table) > 10
    printed, _ = run(f"{line} --json --output a.json")
    (content,) = (json.loads(text) for text in printed)
    assert content == json.loads(Path("a.json").read_text())
    assert "repetition" in content
