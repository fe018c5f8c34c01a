"""A report says what the evaluation says, shows the masks of the files, and is one page that is safe and loads nothing."""

import base64
import hashlib
import json
import re
import sys
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from drawing import DrawnDataset, compressed_rle, draw_dataset
from pycocotools import mask as mask_utils
from report_page import ReportPage
from sharpmask_d2.cli.report import main
from sharpmask_d2.data.coco import load_annotations
from sharpmask_d2.errors import UserError
from sharpmask_d2.evaluation.proposal_evaluation import evaluate_proposal_json
from sharpmask_d2.report import write_report
from sharpmask_d2.visualization import rank_images

HOSTILE = "<script>alert(1)</script>&\"'.png"


def draw(folder):
    """Five images of 120 x 160, the last without objects; image 1 has a crowd."""
    return draw_dataset(folder, num_images=4, crowd=True, empty=True)


@pytest.fixture
def dataset(tmp_path):
    return draw(tmp_path)


def draw_results(dataset, keep: float, skip=()) -> list:
    """For each object that is not skipped, a result with the upper part `keep` of its mask, and one in a corner of the image."""
    results = []
    for image_id, masks in dataset.masks.items():
        for number, mask in enumerate(masks):
            ys, _ = np.nonzero(mask)
            part = mask.copy()
            part[ys.min() + int(keep * (np.ptp(ys) + 1)) :] = False
            corner = np.zeros_like(mask)
            corner[: 5 + number, : 9 + image_id] = True
            chosen = [(corner, 0.9 - 0.1 * number)]
            if (image_id, number) not in skip:
                chosen.append((part, 0.8 - 0.1 * number))
            for shape, score in chosen:
                results.append({"image_id": image_id, "score": score, "segmentation": compressed_rle(shape)})
    return results


def write_files(dataset, tmp_path) -> list:
    """Two result files: good.json, and poor.json with worse masks, which misses two objects altogether."""
    paths = []
    for name, keep, skip in (("good", 0.9, ()), ("poor", 0.8, ((2, 0), (3, 1)))):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(draw_results(dataset, keep, skip)))
        paths.append(path)
    return paths


@pytest.fixture
def files(dataset, tmp_path):
    return write_files(dataset, tmp_path)


class Compared(NamedTuple):
    """A report on both files, for the tests that only read it."""

    dataset: DrawnDataset
    files: list
    page: ReportPage


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Compared:
    folder = tmp_path_factory.mktemp("compared")
    dataset = draw(folder)
    files = write_files(dataset, folder)
    page = report(folder, files, annotations=dataset.annotations, image_root=dataset.image_root)
    return Compared(dataset, files, page)


def report(tmp_path, proposals, status=0, **options) -> ReportPage:
    path = tmp_path / "report.html"
    assert write_report(proposals, path, **options) == status
    return ReportPage(path)


def decode(item: dict, counts) -> np.ndarray:
    return mask_utils.decode({"size": [item["h"], item["w"]], "counts": counts}).astype(bool)


def test_figures_equal_those_of_the_evaluation(compared):
    dataset, files, page = compared
    figures = page.report["figures"]
    assert [file["name"] for file in figures["files"]] == ["good", "poor"]
    for path, file in zip(files, figures["files"]):
        expected = evaluate_proposal_json(dataset.annotations, path)
        for kind, values in expected.items():
            assert file["metrics"][kind] == {k: None if np.isnan(v) else v for k, v in values.items()}
        counts, curves = figures["axes"]["counts"], file["curves"]
        for count in (10, 100, 1000):
            at = counts.index(count)
            assert curves["average_recall"]["all"][at] == pytest.approx(expected["segm"][f"AR@{count}"])
            medium = curves["average_recall"]["medium"][at]
            assert medium == pytest.approx(expected["segm"][f"AR@{count}-medium"])
        for iou, value in zip(figures["axes"]["ious"], curves["recall"]["100"]["all"]):
            assert value == pytest.approx(expected["segm"][f"Recall@100-IoU{round(100 * iou)}"])
        assert f"{expected['segm']['AR@100']:.1f}" in page.text
    assert figures["files"][0]["metrics"]["segm"]["AR@10"] > figures["files"][1]["metrics"]["segm"]["AR@10"] > 0


def test_masks_have_the_pixels_of_the_file_best_first(compared):
    dataset, files, page = compared
    results = json.loads(files[0].read_text())
    for i, image_id in enumerate(dataset.masks):
        item = page.data[f"gallery-{i}"]
        assert (item["h"], item["w"]) == (120, 160)
        expected = [result for result in results if result["image_id"] == image_id]
        expected.sort(key=lambda result: -result["score"])
        assert len(item["sets"][0]) == len(expected)
        for (score, counts), result in zip(item["sets"][0], expected):
            assert score == pytest.approx(result["score"], abs=1e-4)
            assert (decode(item, counts) == mask_utils.decode(result["segmentation"])).all()
        # The order of objects is that of their categories.
        objects = {decode(item, counts).tobytes() for counts in item["objects"]}
        assert objects == {mask.tobytes() for mask in dataset.masks[image_id]}
        content = base64.b64decode(item["p"].removeprefix("data:image/webp;base64,"))
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        source = cv2.imread(str(dataset.image_root / f"{image_id}.png"))
        assert np.abs(picture.astype(int) - source).mean() < 8


def test_larger_images_are_sampled_at_the_centres_of_pixels(dataset, files, tmp_path):
    page = report(
        tmp_path, files[:1], annotations=dataset.annotations, image_root=dataset.image_root, thumbnail_size=64
    )
    item = page.data["gallery-0"]
    assert (item["h"], item["w"]) == (48, 64)
    results = [result for result in json.loads(files[0].read_text()) if result["image_id"] == 1]
    results.sort(key=lambda result: -result["score"])
    assert len(results) == len(item["sets"][0])
    for (_, counts), result in zip(item["sets"][0], results):
        mask = mask_utils.decode(result["segmentation"])
        expected = [[mask[int((y + 0.5) * 2.5), int((x + 0.5) * 2.5)] for x in range(64)] for y in range(48)]
        assert (decode(item, counts) == np.array(expected)).all()


def test_missed_objects_are_counted_and_shown(compared):
    dataset, files, page = compared
    misses = page.report["misses"]
    assert [miss["missedBy"] for miss in misses] == [[[1], [1]]] * 2
    assert {miss["image"] for miss in misses} == {"2.png", "3.png"}
    areas = [dataset.masks[2][0].sum(), dataset.masks[3][1].sum()]
    by_image = {2: dataset.masks[2][0], 3: dataset.masks[3][1]}
    # The largest is first.
    assert misses[0]["image"] == ("2.png" if areas[0] > areas[1] else "3.png")
    coco = load_annotations(dataset.annotations)
    for i, miss in enumerate(misses):
        image_id = int(miss["image"][0])
        mask = by_image[image_id]
        ys, xs = np.nonzero(mask)
        assert miss["size"] == f"{np.ptp(xs) + 1} x {np.ptp(ys) + 1} pixels"
        results = [r for r in json.loads(files[0].read_text()) if r["image_id"] == image_id]
        results.sort(key=lambda result: -result["score"])
        ious = mask_utils.iou([r["segmentation"] for r in results], [compressed_rle(mask)], [0])[:, 0]
        assert miss["ious"][0][0] == miss["ious"][1][0] == pytest.approx(ious.max(), abs=1e-4)
        assert miss["ranks"][0][0] == ious.argmax()
        # The picture shows the whole object, and the best mask within the same region.
        item = page.data[f"misses-{i}"]
        shown = decode(item, item["objects"][0])
        assert shown.sum() == mask.sum()
        best = decode(item, item["sets"][0][0])
        assert (best & shown).sum() / (best | shown).sum() == pytest.approx(ious.max(), abs=1e-4)
    recall = evaluate_proposal_json(coco, files[1])["segm"]["Recall@100-IoU50"]
    total = sum(len(masks) for masks in dataset.masks.values())
    assert total * (1 - recall / 100) == pytest.approx(2)
    assert f"2 ({100 * 2 / total:.1f}%)" in page.text


def test_the_worst_images_are_those_with_the_lowest_overlap(dataset, files, tmp_path):
    page = report(tmp_path, files[1:], annotations=dataset.annotations, image_root=dataset.image_root)
    ranked = rank_images(load_annotations(dataset.annotations), json.loads(files[1].read_text()))
    worst = page.report["worst"]
    assert [item["name"] for item in worst] == [f"{image.image_id}.png" for image in ranked[::-1]]
    assert [item["overlaps"][0] for item in worst] == pytest.approx([i.overlap for i in ranked[::-1]], abs=1e-4)
    # Without objects there is no overlap.
    assert page.report["gallery"]["overlaps"][0][4] is None
    for i, image in enumerate(ranked[::-1]):
        item = page.data[f"worst-{i}"]
        expected = {mask_utils.decode(rle).tobytes() if rle else None for rle in image.found}
        assert {decode(item, c).astype(np.uint8).tobytes() if c else None for _, c in item["sets"][0]} == expected


def test_page_is_whole_and_accessible(dataset, files, tmp_path):
    page = report(
        tmp_path, files, annotations=dataset.annotations, image_root=dataset.image_root, names=["a & b", "<i>"]
    )
    assert page.declaration == "DOCTYPE html"
    assert page.attributes("html") == [{"lang": "en"}]
    counts = page.count()
    assert counts["h1"] == counts["main"] == counts["title"] == counts["dialog"] == 1
    assert counts["table"] == counts["caption"] == 4
    assert "i" not in counts
    assert "a & b" in page.text
    assert "<i>" in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("aria-labelledby", "href", "xlink:href"):
            if key in attributes:
                assert attributes[key].removeprefix("#") in ids
        assert not any(key.startswith("on") for key in attributes)
    # Three rows of plots, for four ranges of areas.
    plots = [svg for svg in page.attributes("svg") if svg.get("role") == "img"]
    assert len(plots) == 12
    assert len({svg["aria-label"] for svg in plots}) == 12


def test_page_loads_nothing_and_runs_its_own_script_only(compared):
    page = compared.page
    assert not [attributes for _, attributes in page.elements if "src" in attributes]
    assert not page.attributes("link")
    assert not re.search(r"url\((?!#)|@import", page.style)
    (policy,) = (meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert sum(script.get("type") != "application/json" for script in page.attributes("script")) == 1
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(", page.script)


def test_file_names_are_text(compared, dataset, files, tmp_path):
    content = json.loads(dataset.annotations.read_text())
    content["images"][1]["file_name"] = HOSTILE.replace("/", "")
    content["categories"][0]["name"] = HOSTILE
    (dataset.image_root / "2.png").rename(dataset.image_root / HOSTILE.replace("/", ""))
    dataset.annotations.write_text(json.dumps(content))
    page = report(
        tmp_path, files, annotations=dataset.annotations, image_root=dataset.image_root, names=["</script><b>", "poor"]
    )
    assert page.count() == compared.page.count()
    assert page.report["gallery"]["names"][1] == HOSTILE.replace("/", "")
    assert HOSTILE in {miss["category"] for miss in page.report["misses"]}
    assert page.data["gallery-1"]["p"]
    raw = (tmp_path / "report.html").read_text()
    assert "alert(1)</script" not in raw
    assert "</script><b>" not in raw


def test_a_gallery_without_annotations_finds_images_by_the_names_of_the_results(dataset, tmp_path):
    results = [{**result, "file_name": f"{result['image_id']}.png"} for result in draw_results(dataset, 0.9)]
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps(results))
    page = report(tmp_path, [path], image_root=dataset.image_root)
    assert page.report["gallery"]["names"] == [f"{i}.png" for i in (1, 2, 3, 4)]
    assert page.report["gallery"]["overlaps"] is None
    assert page.report["misses"] == page.report["worst"] == []
    assert not any(svg.get("role") == "img" for svg in page.attributes("svg"))
    assert not page.data["gallery-0"]["objects"]
    assert len(page.data["gallery-0"]["sets"][0]) == 2 * len(dataset.masks[1])


def test_limits_are_said(compared, dataset, files, tmp_path):
    page = report(tmp_path, files, annotations=dataset.annotations, max_images=2, max_masks=3, max_misses=1)
    text = page.sentences()
    assert "The gallery shows the first 2 of 5 images (--max-images)." in text
    assert "Of each image it has the 3 masks of highest score; the others are left out (--max-masks)." in text
    assert "Pictures of 1 missed objects follow: for each number of proposals the 1 that most files miss" in text
    assert [key for key in page.data if key.startswith("gallery-")] == ["gallery-0", "gallery-1"]
    assert [len(masks) for masks in page.data["gallery-1"]["sets"]] == [3, 3]
    assert len(page.report["misses"]) == 1
    # Recall counts all images.
    assert page.report["figures"] == compared.page.report["figures"]


def test_images_that_cannot_be_read_are_named_and_shown_without_pictures(dataset, files, tmp_path, capsys):
    (dataset.image_root / "2.png").write_bytes(b"no image")
    cv2.imwrite(str(dataset.image_root / "3.png"), np.zeros((30, 40, 3), np.uint8))
    page = report(tmp_path, files, status=1, annotations=dataset.annotations, image_root=dataset.image_root)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cannot process")]
    assert len(errors) == 2
    assert "2.png" in errors[0] + errors[1]
    assert "it is of 40 x 30 pixels, its masks are of 160 x 120: is --image-root right?" in errors[0] + errors[1]
    assert [page.data[f"gallery-{i}"]["p"] is None for i in range(5)] == [False, True, True, False, False]
    assert page.data["gallery-1"]["sets"][0][0][1]
    assert page.data["failed"] == 2


def test_without_a_folder_of_images_masks_are_shown_alone(dataset, files, tmp_path):
    page = report(tmp_path, files, annotations=dataset.annotations)
    assert all(
        item["p"] is None for key, item in page.data.items() if key.startswith(("gallery-", "worst-", "misses-"))
    )
    assert page.data["gallery-0"]["sets"][0][0][1]
    assert page.data["failed"] == 0


def test_plots_are_written_and_the_page_is_the_same_each_time(dataset, files, tmp_path):
    pages = []
    for plots in (tmp_path / "plots", None):
        write_report(files, tmp_path / "r.html", annotations=dataset.annotations, plots=plots)
        pages.append((tmp_path / "r.html").read_bytes())
    assert pages[0] == pages[1]
    names = {
        f"{row}.{kind}"
        for row in ("recall_by_number", "recall_by_iou_100", "recall_by_iou_1000")
        for kind in ("png", "svg")
    }
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names
    picture = cv2.imread(str(tmp_path / "plots" / "recall_by_number.png"))
    assert picture.shape[1] > 1000
    assert ">poor<" in (tmp_path / "plots" / "recall_by_number.svg").read_text()


def test_a_failure_keeps_the_report_that_was_there(dataset, tmp_path):
    other = np.zeros((40, 50), bool)
    other[5:9] = True
    results = [{**result, "file_name": "1.png"} for result in draw_results(dataset, 0.9) if result["image_id"] == 1]
    # The masks of an image without annotations are compared when they are drawn.
    results.append({**results[0], "score": 0.1, "segmentation": compressed_rle(other)})
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps(results))
    output = tmp_path / "report.html"
    output.write_text("before")
    with pytest.raises(UserError, match=r"masks of image 1 have the sizes .* \(120, 160\) and \(40, 50\)"):
        write_report([path], output, image_root=dataset.image_root)
    assert output.read_text() == "before"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("good.json", "give --image-root, the folder of the images, or --annotations"),
        ("good.json --image-root images --plots p", "--plots needs --annotations"),
        ("good.json --image-root nowhere", "--image-root: there is no folder nowhere"),
        ("good.json --image-root images", "the results of image 1 have no file_name: give --annotations"),
        ("good.json none.json --annotations instances.json", "none.json"),
        ("good.json instances.json --annotations instances.json", "instances.json is not a COCO result file"),
        ("boxes.json --annotations instances.json", "boxes.json: its results have no segmentation"),
        ("good.json good.json --annotations instances.json", "two result files have the name 'good'"),
        ("good.json poor.json --name a --annotations instances.json", "--name is given 1 times for 2 result files"),
        ("a b c d e f g --annotations instances.json", "compares at most 6 result files, and 7 are given"),
        ("good.json --annotations good.json", "good.json is not a COCO annotation file"),
        ("named.json other.json --image-root images", "image 1 is 1.png in named.json but 2.png in other.json"),
        ("broken.json --annotations instances.json", "broken.json: result 0, of image 1, has the score nan"),
    ],
)
def test_mistakes_of_the_user_are_named(dataset, files, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    first = json.loads(files[0].read_text())[0]
    for name, change in (
        ("named", {"file_name": "1.png"}),
        ("other", {"file_name": "2.png"}),
        ("broken", {"score": float("nan")}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps([{**first, **change}]))
    (tmp_path / "boxes.json").write_text(json.dumps([{"image_id": 1, "score": 1, "bbox": [0, 0, 5, 5]}]))
    with pytest.raises((UserError, FileNotFoundError), match=re.escape(message)) as raised:
        main([*arguments.split(), "--output", "report.html"])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_an_input_is_not_replaced(dataset, files):
    with pytest.raises(UserError, match="is one of the inputs"):
        write_report(files, files[1], annotations=dataset.annotations)
    with pytest.raises(UserError, match="is one of the inputs"):
        write_report(
            files, dataset.image_root / "1.png", annotations=dataset.annotations, image_root=dataset.image_root
        )


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_a_missing_library_is_answered_with_the_extra(dataset, files, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module} is not installed: run pip install 'sharpmask_d2\[report\]'"):
        write_report(files, tmp_path / "report.html", annotations=dataset.annotations)
