"""Outputs of the tools: checked before a run, complete or missing, written by one run at a time; failing images; runs that are resumed."""

import errno
import json
import os
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from drawing import ROOT, write_with_weights
from PIL import Image
from sharpmask_d2.checkpoint import save_packed
from sharpmask_d2.evaluation.proposal_evaluation import write_json
from sharpmask_d2.inference import detect
from sharpmask_d2.inference import propose as compute
from sharpmask_d2.inference.image_files import InputImage, list_inputs, process_images
from sharpmask_d2.io import outputs
from sharpmask_d2.io.outputs import OutputError, check_outputs, open_locked, open_output, write_output
from sharpmask_d2.io.proposal_files import ProposalWriter, write_pickle
from sharpmask_d2.torch7.conversion import Torch7Model, save_torch7_model
from sharpmask_d2.visualization import name_pictures, write_picture
from stub_predictor import StubPredictor


def draw(path, seed=0, size=(30, 40)) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def content(folder: Path) -> dict:
    """Path -> bytes of all files, None of a folder."""
    return {p.relative_to(folder): None if p.is_dir() else p.read_bytes() for p in folder.rglob("*")}


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """`compute_proposals` with the stub, and a config file whose settings and weights a test may change."""
    monkeypatch.setattr(compute, "ProposalPredictor", StubPredictor)
    StubPredictor.seen = []
    weights, config = tmp_path / "w.pth", tmp_path / "c.yaml"
    weights.write_bytes(b"weights")
    config.write_text(f"MODEL:\n  META_ARCHITECTURE: SharpMaskProposalNetwork\n  WEIGHTS: {weights}\n")

    def run(*, stop_after=None, **options) -> int:
        """Returns the exit status. After `stop_after` images the user stops the run."""
        StubPredictor.seen = []
        if stop_after is not None:
            predict = StubPredictor.__call__

            def stopping(self, pixels):
                if len(StubPredictor.seen) == stop_after:
                    raise KeyboardInterrupt
                return predict(self, pixels)

            with monkeypatch.context() as patch:
                patch.setattr(StubPredictor, "__call__", stopping)
                with pytest.raises(KeyboardInterrupt):
                    compute.compute_proposals(config_file=str(config), **options)
            return 130
        return compute.compute_proposals(config_file=str(config), **options)

    return run


@pytest.fixture
def photos(tmp_path):
    for i in range(4):
        draw(tmp_path / "photos" / f"{i}.png", seed=i)
    return tmp_path / "photos"


@pytest.fixture
def full_disk(monkeypatch):
    """A function after whose call nothing can be written to the disk."""

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", fail)


def run_tool(monkeypatch, name, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__")


# ------------------------------------------------------------------ refused before the work


@pytest.mark.parametrize(
    ("files", "folders", "message"),
    [
        ({"--output": "a.json"}, {}, r"--output: .*a\.json is one of the inputs"),
        ({"--output": "link.json"}, {}, r"--output: .*link\.json is one of the inputs"),
        ({"--output": "hard.json"}, {}, r"--output: .*hard\.json is one of the inputs"),
        ({"--output": "photos/0.png"}, {}, r"--output: .*0\.png is one of the inputs"),
        (
            {"--output": "new.json", "--pkl": "photos/../new.json"},
            {},
            r"--pkl: .*new\.json is also written by --output",
        ),
        ({"--output": "new.json", "--pkl": "new.json.tmp"}, {}, r"--pkl: .*new\.json\.tmp is also written by --output"),
        ({"--output": "new.json", "--pkl": "new.json.partial"}, {}, r"--pkl: .* is also written by --output"),
        ({"--output": "b.json"}, {}, r"--output: .*b\.json is one of the inputs"),
        ({"--output": "photos"}, {}, r"--output: .*photos is a folder"),
        ({"--output": "pipe"}, {}, r"--output: .*pipe is not a regular file"),
        ({"--output": "a.json/new.json"}, {}, r"--output: cannot write .*a\.json/new\.json"),
        ({"--output": "x" * 300}, {}, r"--output: cannot write .*xxx: File name too long"),
        ({}, {"--visualize": "photos"}, r"--visualize: .*photos is, or lies in, the input folder"),
        ({}, {"--visualize": "photos/new"}, r"--visualize: .*photos/new is, or lies in, the input folder"),
        ({}, {"--visualize": "other"}, r"--visualize: the input .*other/1\.png is in"),
        ({}, {"--visualize": "a.json"}, r"--visualize: cannot write into the folder .*a\.json"),
    ],
)
def test_invalid_outputs_are_refused_and_no_file_changes(photos, tmp_path, files, folders, message):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json.tmp").symlink_to("a.json")
    (tmp_path / "link.json").symlink_to("a.json")
    os.link(tmp_path / "a.json", tmp_path / "hard.json")
    os.mkfifo(tmp_path / "pipe")
    image = draw(tmp_path / "other" / "1.png")
    before = sorted(tmp_path.rglob("*"))
    files, folders = ({option: tmp_path / path for option, path in part.items()} for part in (files, folders))
    images = [photos, *photos.iterdir(), image]
    with pytest.raises(OutputError, match=message):
        check_outputs(files, inputs=[tmp_path / "a.json", None], folders=folders, images=images)
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_folders_of_valid_outputs_are_created(photos, tmp_path):
    files = {"--output": tmp_path / "new" / "deep" / "a.json", "--pkl": None}
    check_outputs(files, inputs=[], folders={"--visualize": tmp_path / "pictures"}, images=[photos])
    assert content(tmp_path / "new") == {Path("deep"): None}
    assert content(tmp_path / "pictures") == {}


@pytest.mark.parametrize(
    "options",
    [
        {"output": "p.json", "visualize": "photos"},
        {"output": "photos/0.png"},
        {"output": "p.json", "pkl": "p.json"},
        {"output": "c.yaml"},
        {"output": "w.pth"},
        {"output": "photos"},
    ],
)
def test_compute_proposals_refuses_before_any_work(stub, photos, tmp_path, options):
    before = content(tmp_path)
    options = {option: str(tmp_path / path) for option, path in options.items()}
    with pytest.raises(OutputError):
        stub(input=[str(photos)], **options)
    assert StubPredictor.seen == []
    assert content(tmp_path) == before


def test_compute_proposals_does_not_replace_its_annotations(stub, make_dataset, tmp_path):
    drawn = make_dataset(tmp_path / "data")
    before = content(tmp_path)
    with pytest.raises(OutputError, match=r"instances\.json is one of the inputs"):
        stub(annotations=str(drawn.annotations), image_root=str(drawn.image_root), output=str(drawn.annotations))
    assert content(tmp_path) == before


def test_the_demo_does_not_write_into_its_input_folder(photos, monkeypatch):
    monkeypatch.setattr(detect, "DetectionPredictor", None)
    before = content(photos)
    with pytest.raises(OutputError, match="the input folder"):
        detect.detect(input=[str(photos)], output=str(photos))
    with pytest.raises(OutputError, match=r"the input .*0\.png is in"):
        detect.detect(input=[str(photos / "0.png")], output=str(photos))
    assert content(photos) == before


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("convert_torch7.py", ["a.pth", "--output", "a.pth"]),
        ("convert_torch7.py", ["a.yaml", "--output", "a.pth"]),
        ("package_model.py", ["a.pth", "b.pth", "--output", "b.pth"]),
        ("evaluate_proposals.py", ["--annotations", "a.json", "--proposals", "b.json", "--output", "b.json"]),
        ("evaluate_proposals.py", ["--annotations", "a.json", "--proposals", "b.json", "--output", "."]),
        ("selective_search.py", ["--annotations", "a.json", "--image-root", ".", "--output", "a.json"]),
        ("convert_proposals.py", ["--input", "b.json", "--annotations", "a.json", "--output", "a.json"]),
        ("benchmarks", ["growth", "--config-file", "a.yaml", "--plot", "a.yaml"]),
        ("benchmarks", ["evaluation", "--output", "."]),
    ],
)
def test_tools_refuse_before_any_work(tmp_path, monkeypatch, capsys, tool, arguments):
    pytest.importorskip("cv2.ximgproc")
    monkeypatch.chdir(tmp_path)
    for name in ("a.pth", "b.pth", "a.yaml"):
        Path(name).write_bytes(b"")
    Path("a.json").write_text(json.dumps({"images": [], "annotations": []}))
    Path("b.json").write_text("[]")
    before = content(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_tool(monkeypatch, tool, *arguments)
    assert ended.value.code in (1, 2)
    assert ": choose another output" in (error := capsys.readouterr().err) or "is a folder" in error
    assert content(tmp_path) == before


# ------------------------------------------------------------------ complete or missing


def _torch7_model():
    from detectron2.config import get_cfg
    from sharpmask_d2 import add_sharpmask_config

    cfg = get_cfg()
    add_sharpmask_config(cfg)
    return Torch7Model(cfg, {})


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.bin", lambda path: write_output(path, b"new")),
        ("a.json", lambda path: write_json({"new": 1}, path)),
        ("a.jpg", lambda path: write_picture(path, np.zeros((5, 5, 3), np.uint8))),
        ("a.pkl", lambda path: write_pickle([], path)),
        ("a.pth", lambda path: save_packed({"new": torch.zeros(1)}, path)),
        ("a.pth", lambda path: save_torch7_model(_torch7_model(), path)),
    ],
)
def test_on_a_full_disk_the_former_file_stays(tmp_path, full_disk, name, write):
    path = tmp_path / name
    path.write_text("old")
    full_disk()
    with pytest.raises(OutputError, match=rf"cannot write .*{name}: No space left"):
        write(path)
    assert content(tmp_path) == {Path(name): b"old"}


def test_the_converters_config_is_complete_or_missing(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("old")
    replace = os.replace

    def fail_for_config(source, target):
        if str(target).endswith(".yaml"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_config)
    with pytest.raises(OutputError, match=r"cannot write .*a\.yaml"):
        save_torch7_model(_torch7_model(), tmp_path / "a.pth")
    assert (tmp_path / "a.yaml").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.yaml"]


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_file_that_does_not_fit_is_an_error(tmp_path, size):
    path = tmp_path / "a.bin"
    path.write_text("old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limit[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*a\.bin: File too large"):
            write_output(path, b"x" * size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert content(tmp_path) == {Path("a.bin"): b"old"}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").symlink_to("a")
    write_output(tmp_path / "b", b"new")
    assert (tmp_path / "b").is_symlink()
    assert (tmp_path / "a").read_text() == "new"


def test_a_disk_that_fills_up_stops_the_run_and_keeps_its_results(stub, photos, tmp_path, monkeypatch):
    output = tmp_path / "p.json"
    add, limit = ProposalWriter.add, resource.getrlimit(resource.RLIMIT_FSIZE)

    def add_to_full_disk(self, key, results):
        if len(self.done) == 2:
            size = self.partial.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limit[1]))
        add(self, key, results)

    with monkeypatch.context() as patch:
        patch.setattr(ProposalWriter, "add", add_to_full_disk)
        try:
            with pytest.raises(
                OutputError,
                match=r"cannot write .*p\.json\.partial: File too large; it keeps the images",
            ):
                stub(input=[str(photos)], output=str(output))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert stub(input=[str(photos)], output=str(output)) == 0
    assert len(StubPredictor.seen) == 2
    assert [r["image_id"] for r in json.loads(output.read_text())] == [1, 2, 3, 4]


# ------------------------------------------------------------------ one run at a time


def test_a_second_run_on_an_output_is_refused(stub, photos, tmp_path):
    output = str(tmp_path / "p.json")
    with ProposalWriter(output, {"a": 1}) as first:
        first.add(1, [])
        with pytest.raises(OutputError, match=r"p\.json\.partial is being written by another run"):
            stub(input=[str(photos)], output=output)
        assert StubPredictor.seen == []
        first.add(2, [])
        first.finish()
    assert stub(input=[str(photos)], output=output) == 0


def test_a_second_writer_of_a_file_is_refused(tmp_path):
    with open_output(tmp_path / "a") as file:
        file.write(b"first")
        with pytest.raises(OutputError, match="another run"):
            write_output(tmp_path / "a", b"second")
        with pytest.raises(OutputError, match="another run"):
            check_outputs({"--output": tmp_path / "a"}, inputs=[])
    assert content(tmp_path) == {Path("a"): b"first"}


def test_a_dead_process_leaves_no_lock(tmp_path):
    program = f"""
import sys, time, types
from pathlib import Path
# Without what the package imports when it starts.
sys.modules["sharpmask_d2"] = types.ModuleType("sharpmask_d2")
sys.modules["sharpmask_d2"].__path__ = [{str(Path(outputs.__file__).parent.parent)!r}]
from sharpmask_d2.io.outputs import open_locked
file = open_locked(Path({str(tmp_path / "a")!r}))
print("locked", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match="another run"):
            open_locked(tmp_path / "a")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    open_locked(tmp_path / "a").close()


# ------------------------------------------------------------------ images that cannot be processed


def _process(images, tmp_path, work, **options):
    with ProposalWriter(str(tmp_path / "p.json"), {}) as writer:
        finished, failed = process_images(images, writer, work, desc="", **options)
        writer.finish(images=finished, keep_partial=len(failed) > 0)
    return [r["image_id"] for r in json.loads((tmp_path / "p.json").read_text())], failed.status()


def _of_size(image, pixels):
    return [{"image_id": image.image_id, "size": list(pixels.shape)}]


def test_the_output_is_that_of_json_dumps(tmp_path):
    images = [
        InputImage(i, draw(tmp_path / f"{i}.png", seed=i), 'ä, {\t"image_id": ', {"file_name": "ä,\t"})
        for i in range(4)
    ]
    results = {
        0: [
            {"image_id": 0, "file_name": "ä,\t", "score": 0.1, "more": [{"image_id": 7}, {"b": ",\t"}]},
            {"image_id": 0},
        ],
        1: [],
        # Entries that the run replaces, and in another order.
        2: [{"score": 1e-7, "image_id": 99}, {"image_id": 2, "file_name": "b", "x": float("inf")}],
        3: [{"image_id": 3, "file_name": "ä,\t"}],
    }
    with ProposalWriter(str(tmp_path / "p.json"), {}) as writer:
        finished, _ = process_images(images, writer, lambda image, pixels: results[image.image_id], desc="")
        assert writer.finish(images=finished) == 5
        assert writer.counts == {0: 2, 1: 0, 2: 2, 3: 1}
    rows = [{**row, "image_id": i, "file_name": "ä,\t"} for i in range(4) for row in results[i]]
    expected = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
    assert (tmp_path / "p.json").read_text() == expected


def test_an_image_that_fails_is_named_and_the_others_are_processed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    paths = [draw(tmp_path / f"{name}.png", size=size) for name, size in [("good", (9, 9)), ("bomb", (99, 99))]]
    paths += [draw(tmp_path / "strange.png", seed=1, size=(3, 5)), tmp_path / "text.png", tmp_path / "missing.png"]
    paths += [draw(tmp_path / "cut.png", seed=2, size=(20, 20)), draw(tmp_path / "last.png", seed=3, size=(9, 9))]
    paths[3].write_text("no image")
    paths[5].write_bytes(paths[5].read_bytes()[:300])
    images = [InputImage(i, path, path.name, {}) for i, path in enumerate(paths, start=11)]

    def work(image, pixels):
        if len(pixels) == 3:
            raise RuntimeError("the network\nhas its own error")
        return _of_size(image, pixels)

    for _ in range(2):  # started again, it does not die either
        assert _process(images, tmp_path, work) == ([11, 17], 1)
        error = capsys.readouterr().err
        for number, cause in [
            (12, "it cannot be read: Image size"),
            (13, "RuntimeError: the network;"),
            (14, "it is no image"),
            (15, "No such file or directory;"),
            (16, "it cannot be read: image file is truncated"),
        ]:
            assert f"cannot process image {number}, {paths[number - 11]}: {cause}" in error
        assert "BufferedReader" not in error
        assert "5 images could not be processed" in error


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
def test_memory_errors_and_ctrl_c_end_the_run(photos, tmp_path, kind):
    def work(image, pixels):
        raise kind

    with pytest.raises(kind):
        _process(list_inputs([photos]), tmp_path, work)


def test_long_thin_images_do_not_end_the_run(tiny_cfg, tmp_path):
    tiny_cfg.INPUT.MIN_SIZE_TEST, tiny_cfg.INPUT.MAX_SIZE_TEST = 60, 80
    tiny_cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 3
    config = write_with_weights(tiny_cfg, tmp_path)
    draw(tmp_path / "photos" / "a.png", size=(1, 2000))
    draw(tmp_path / "photos" / "b.png", size=(60, 80))
    output = tmp_path / "p.json"
    options = {"config_file": str(config), "opts": ["MODEL.DEVICE", "cpu"]}
    status = compute.compute_proposals(input=[str(tmp_path / "photos")], output=str(output), **options)
    ids = {r["image_id"] for r in json.loads(output.read_text())}
    assert 2 in ids
    assert status == int(1 not in ids)


def test_a_broken_image_does_not_end_selective_search(tmp_path, monkeypatch, capsys):
    pytest.importorskip("cv2.ximgproc")
    draw(tmp_path / "2.png", size=(60, 60))
    (tmp_path / "1.png").write_text("no image")
    images = [{"id": i, "file_name": f"{i}.png"} for i in (1, 2)]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": []}))
    arguments = ["--annotations", tmp_path / "a.json", "--image-root", tmp_path, "--output", tmp_path / "o.json"]
    with pytest.raises(SystemExit) as ended:
        run_tool(monkeypatch, "selective_search.py", *arguments)
    assert ended.value.code == 1
    assert f"image 1, {tmp_path / '1.png'}: " in capsys.readouterr().err
    assert {r["image_id"] for r in json.loads((tmp_path / "o.json").read_text())} == {2}


def test_a_broken_image_does_not_end_the_pictures_of_an_evaluation(tmp_path, monkeypatch, capsys, make_dataset):
    drawn = make_dataset(tmp_path / "data", num_images=2)
    (drawn.image_root / "1.png").write_text("no image")
    (tmp_path / "p.json").write_text("[]")
    arguments = [
        "--annotations",
        drawn.annotations,
        "--image-root",
        drawn.image_root,
        "--proposals",
        tmp_path / "p.json",
    ]
    with pytest.raises(SystemExit) as ended:
        run_tool(monkeypatch, "evaluate_proposals.py", *arguments, "--pictures", tmp_path / "pictures")
    assert ended.value.code == 1
    assert f"image 1, {drawn.image_root / '1.png'}: it is no image" in capsys.readouterr().err
    assert len(list((tmp_path / "pictures").iterdir())) == 2


# ------------------------------------------------------------------ runs that are resumed


def test_a_resumed_run_processes_only_images_that_changed(stub, photos, tmp_path, capsys):
    options = {"input": [str(photos)], "output": str(tmp_path / "p.json"), "pkl": str(tmp_path / "p.pkl")}
    stub(stop_after=3, **options)
    draw(photos / "0a.png", seed=9)  # added, so that the images after it get other numbers
    draw(photos / "1.png", seed=10)  # replaced
    (photos / "2.png").unlink()
    os.utime(photos / "0.png", (1, 1))  # the same content
    capsys.readouterr()
    assert stub(**options) == 0
    assert "1 of 4 images are done already" in capsys.readouterr().out
    assert len(StubPredictor.seen) == 3
    found = (tmp_path / "p.json").read_bytes(), (tmp_path / "p.pkl").read_bytes()
    results = json.loads(found[0])
    assert [(r["image_id"], r["file_name"]) for r in results] == [
        (1, "0.png"),
        (2, "0a.png"),
        (3, "1.png"),
        (4, "3.png"),
    ]
    assert pickle.loads(found[1])["ids"] == [1, 2, 3, 4]
    # Equal to the results of a run that was not stopped.
    assert stub(**options) == 0
    assert len(StubPredictor.seen) == 4
    assert found == ((tmp_path / "p.json").read_bytes(), (tmp_path / "p.pkl").read_bytes())


def test_a_resumed_run_uses_new_image_ids(stub, photos, tmp_path):
    images = [{"id": i + 50, "file_name": f"{i}.png"} for i in range(4)]
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps({"images": images}))
    options = {"annotations": str(annotations), "image_root": str(photos), "output": str(tmp_path / "p.json")}
    stub(stop_after=3, **options)
    annotations.write_text(json.dumps({"images": [{**image, "id": image["id"] + 100} for image in images]}))
    assert stub(**options) == 0
    assert len(StubPredictor.seen) == 1
    assert [r["image_id"] for r in json.loads((tmp_path / "p.json").read_text())] == [150, 151, 152, 153]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opts": ["INPUT.MIN_SIZE_TEST", "640"]}, r"INPUT\.MIN_SIZE_TEST was 800 and is 640\. Set them back"),
        ({"opts": ["TEST.DETECTIONS_PER_IMAGE", "7"]}, r"TEST\.DETECTIONS_PER_IMAGE was 100 and is 7\."),
        ({"dtype": "bfloat16"}, "--dtype was float32 and is bfloat16"),
        ({"num_proposals": 5}, r"MODEL\.SHARPMASK\.TEST\.NUM_PROPOSALS was \d+ and is 5"),
        ({}, r"MODEL\.WEIGHTS was content \w+ and is content \w+\. Set them back .*remove the file.* another output"),
    ],
)
def test_a_run_with_other_settings_is_refused_and_the_key_is_named(stub, photos, tmp_path, options, message):
    inputs = {"input": [str(photos)], "output": str(tmp_path / "p.json")}
    stub(stop_after=2, **inputs)
    before = (tmp_path / "p.json.partial").read_bytes()
    # Weights that were moved are the same; only their content counts.
    if not options:
        (tmp_path / "w.pth").write_bytes(b"others")
    with pytest.raises(OutputError, match=message):
        stub(**inputs, **options)
    assert (tmp_path / "p.json.partial").read_bytes() == before
    assert StubPredictor.seen == []


def test_weights_may_have_moved(stub, photos, tmp_path):
    options = {"input": [str(photos)], "output": str(tmp_path / "p.json")}
    stub(stop_after=2, **options)
    shutil.copy(tmp_path / "w.pth", tmp_path / "copy.pth")
    assert stub(**options, weights=str(tmp_path / "copy.pth")) == 0
    assert len(StubPredictor.seen) == 2


def test_a_run_that_fails_before_its_first_image_leaves_nothing(stub, photos, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("no such model")

    monkeypatch.setattr(compute, "ProposalPredictor", fail)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="no such model"):
        stub(input=[str(photos)], output=str(tmp_path / "p.json"))
    assert content(tmp_path) == before


def test_a_file_that_is_not_a_partial_file_stays_unchanged(tmp_path):
    partial = tmp_path / "p.json.partial"
    partial.write_text("my notes\n")
    with pytest.raises(OutputError, match=r"p\.json\.partial is not the partial file of a stopped run"):
        ProposalWriter(str(tmp_path / "p.json"), {})
    assert partial.read_text() == "my notes\n"


def test_incomplete_lines_after_a_power_cut_are_dropped(tmp_path):
    with ProposalWriter(str(tmp_path / "p.json"), {}) as writer:
        writer.add("a", [{"image_id": 1}])
    with open(writer.partial, "ab") as file:
        file.write(bytes(100) + b"\n")
    with ProposalWriter(str(tmp_path / "p.json"), {}) as writer:
        assert writer.done == {"a"}
        writer.add("b", [{"image_id": 2}])
    with ProposalWriter(str(tmp_path / "p.json"), {}) as writer:
        assert writer.done == {"a", "b"}


# ------------------------------------------------------------------ pictures


def _named(*names):
    return name_pictures([InputImage(i, Path(name), name, {}) for i, name in enumerate(names, start=1)])


def test_pictures_have_distinct_names():
    assert _named("a.png", "sub/a.png", "b.tif") == ["a.jpg", "sub/a.jpg", "b.jpg"]
    assert _named("photo.bmp", "photo.webp", "c.png") == ["photo.bmp.jpg", "photo.webp.jpg", "c.jpg"]
    assert _named("1.png", "1.png") == ["1.png.1.jpg", "1.png.2.jpg"]
    assert _named("../up.png", "/root.png") == ["up.jpg", "root.jpg"]
    for names in (["A.png", "a.png"], ["a.png", "a.bmp", "a.png.gif"], ["a.png", "a.png", "a.png.1.gif"]):
        assert len({name.lower() for name in _named(*names)}) == len(names)


def test_images_with_equal_stems_have_separate_pictures(stub, tmp_path):
    for i, name in enumerate(["a/1.png", "b/1.png", "a/1.bmp"]):
        draw(tmp_path / name, seed=i)
    pictures = tmp_path / "pictures"
    inputs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert stub(input=inputs, output=str(tmp_path / "p.json"), visualize=str(pictures)) == 0
    assert len(list(pictures.iterdir())) == 3


def test_a_picture_that_cannot_be_written_is_an_error_of_its_image(stub, photos, tmp_path, capsys, monkeypatch):
    options = {"input": [str(photos)], "output": str(tmp_path / "p.json"), "visualize": str(tmp_path / "pictures")}
    replace = os.replace
    with monkeypatch.context() as patch:

        def fail_for_a_picture(source, target):
            if str(target).endswith("1.jpg"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        patch.setattr(os, "replace", fail_for_a_picture)
        assert stub(**options) == 1
    error = capsys.readouterr().err
    assert "image 2" in error
    assert "1.png" in error
    assert "No space left" in error
    # Its proposals are there, and when there is room only the picture is left to make.
    assert [r["image_id"] for r in json.loads((tmp_path / "p.json").read_text())] == [1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["0.jpg", "2.jpg", "3.jpg"]
    assert stub(**options) == 0
    assert StubPredictor.seen == []
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


def test_a_resumed_run_writes_all_pictures(stub, photos, tmp_path):
    pictures = tmp_path / "pictures"
    options = {"input": [str(photos)], "output": str(tmp_path / "p.json")}
    stub(stop_after=2, **options)
    # Pictures were not asked for before, and one of another run lies there.
    pictures.mkdir()
    (pictures / "0.jpg").write_text("of another run")
    stub(stop_after=1, **options, visualize=str(pictures))
    (pictures / "1.jpg").unlink()
    assert stub(**options, visualize=str(pictures)) == 0
    assert len(StubPredictor.seen) == 1
    assert all(cv2.imread(str(pictures / f"{i}.jpg")) is not None for i in range(4))
    # Equal to those of a run that was not stopped.
    again = tmp_path / "again"
    assert stub(input=[str(photos)], output=str(tmp_path / "q.json"), visualize=str(again)) == 0
    assert content(again) == content(pictures)


# ------------------------------------------------------------------ folders


def test_folders_are_searched_and_ignored_files_are_reported(tmp_path, capsys):
    folder = tmp_path / "f"
    for name in ("b.png", "a.gif", "sub/deep/c.jpg", ".hidden.png", ".cache/x.png", "sub/.png"):
        draw(folder / name) if not name.endswith("/.png") else (folder / name).write_bytes(b"")
    for name in ("notes.txt", "sub/more.txt", "README"):
        (folder / name).write_text("x")
    (folder / "sub" / "loop").symlink_to(folder)
    images = list_inputs([folder])
    assert [(i.image_id, i.name) for i in images] == [(1, "a.gif"), (2, "b.png"), (3, "sub/deep/c.jpg")]
    assert [i.extra["file_name"] for i in images] == [i.name for i in images]
    assert "2 .txt, 1 no suffix" in capsys.readouterr().out
    # Named twice, an image counts once; a hidden one that is named counts.
    images = list_inputs([folder / "b.png", folder, folder / ".hidden.png"])
    assert [i.name for i in images] == ["b.png", "a.gif", "sub/deep/c.jpg", ".hidden.png"]


def test_gif_and_avif_are_images(stub, tmp_path):
    draw(tmp_path / "f" / "a.gif")
    names = ["a.gif"]
    if ".avif" in Image.registered_extensions():
        draw(tmp_path / "f" / "b.avif")
        names.append("b.avif")
    assert stub(input=[str(tmp_path / "f")], output=str(tmp_path / "p.json")) == 0
    assert [r["file_name"] for r in json.loads((tmp_path / "p.json").read_text())] == names
