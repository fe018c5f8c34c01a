"""A report in a real browser: what is drawn, what the controls select, and that everything is reached with the keyboard."""

import json
import shutil

import numpy as np
import pytest
from drawing import compressed_rle, draw_dataset
from sharpmask_d2.report import write_report

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the browser test needs Chromium, such as Debian's package chromium"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("drawn"), num_images=30)


@pytest.fixture(scope="module")
def path(dataset, tmp_path_factory):
    """A report on two files: whole.json with the masks of all objects, and half.json with halves, and none in image 3."""
    folder = tmp_path_factory.mktemp("report")
    files = []
    for name in ("whole", "half"):
        results = []
        for image_id, masks in dataset.masks.items():
            for number, mask in enumerate(masks):
                part = mask.copy()
                if name == "half":
                    part[int(np.nonzero(mask)[0].mean()) :] = False
                if name == "whole" or image_id != 3:
                    score = round(0.9 - 0.2 * number - 0.01 * image_id, 3)
                    results.append({"image_id": image_id, "score": score, "segmentation": compressed_rle(part)})
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(results))
    output = folder / "report.html"
    write_report(files, output, annotations=dataset.annotations, image_root=dataset.image_root)
    return output


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, path):
    """The report in a window of 1280 x 900; at the end, it has asked for nothing and has reported no error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    messages = []
    page.on("console", lambda message: message.type == "error" and messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or messages.append(request.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert not messages


def drawn(page, selector: str) -> np.ndarray:
    """(H, W) bool, the pixels of a canvas that are not transparent."""
    values = page.eval_on_selector(
        selector,
        "c => [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3)]",
    )
    return np.array(values[2:]).reshape(values[1], values[0]) > 0


CARD = "[data-grid=gallery] .cards li:nth-child({}) .card"


def test_masks_are_drawn_when_a_card_is_pointed_at_or_focused(page, dataset):
    page.locator(CARD.format(1)).scroll_into_view_if_needed()
    page.wait_for_selector(f"{CARD.format(1)} canvas")
    assert not drawn(page, f"{CARD.format(1)} canvas").any()
    page.hover(CARD.format(1))
    expected = np.any(dataset.masks[1], axis=0)
    assert (drawn(page, f"{CARD.format(1)} canvas") == expected).all()
    page.mouse.move(0, 0)
    assert not drawn(page, f"{CARD.format(1)} canvas").any()
    page.focus(CARD.format(2))
    assert (drawn(page, f"{CARD.format(2)} canvas") == np.any(dataset.masks[2], axis=0)).all()


def test_pictures_are_loaded_when_they_are_visible(page):
    # At the top of the page, the tables are visible.
    page.wait_for_timeout(300)
    assert page.locator(".card").count() >= 48
    assert page.locator(".card img").count() == 0
    page.evaluate("document.querySelector('[data-grid=gallery] .cards li:last-child').scrollIntoView()")
    page.wait_for_selector("[data-grid=gallery] .cards li:last-child img")
    assert page.evaluate(
        "document.querySelector('[data-grid=gallery] .cards li:last-child img').decode().then(() => true)"
    )


def test_controls_select_sort_and_turn_pages(page):
    gallery = page.locator("[data-grid=gallery]")
    status, names = gallery.locator(".status"), gallery.locator(".name")
    assert status.inner_text() == "30 of 30 images; 1 to 24 are shown"
    gallery.get_by_text("Next page").click()
    assert names.all_inner_texts() == [f"{i}.png" for i in range(25, 31)]
    assert gallery.get_by_text("Next page").is_disabled()
    gallery.get_by_label("File name contains").fill("3")
    assert names.all_inner_texts() == ["3.png", "13.png", "23.png", "30.png"]
    gallery.get_by_label("Order").select_option("name")
    assert names.all_inner_texts() == ["13.png", "23.png", "3.png", "30.png"]
    gallery.get_by_label("File name contains").fill("nothing")
    assert status.inner_text() == "None of the 30 images fits the selection"
    gallery.get_by_label("File name contains").fill("")
    # Image i has the scores 0.9 - 0.01 i and less, so the highest ones are those of the first images.
    gallery.get_by_label("Order").select_option("")
    gallery.get_by_label("Lowest score").evaluate(
        "e => { e.value = 0.84; e.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    assert names.all_inner_texts() == [f"{i}.png" for i in range(1, names.count() + 1)]
    assert 5 <= names.count() <= 7
    gallery.get_by_label("Order").select_option("loss")
    assert names.first.inner_text() == "3.png"


def test_missed_objects_are_selected_by_file(page):
    misses = page.locator("[data-grid=misses]")
    everything = int(misses.locator(".status").inner_text().split(" of ")[1].split()[0])
    assert everything >= 3
    misses.get_by_label("Missed by").select_option("all")
    assert "None of the" in misses.locator(".status").inner_text()
    misses.get_by_label("Missed by").select_option("only 1")
    assert f"{everything} of {everything}" in misses.locator(".status").inner_text()


def test_viewer_is_used_with_the_keyboard_alone(page, dataset):
    page.focus(CARD.format(1))
    page.keyboard.press("Enter")
    dialog = page.locator("#viewer")
    assert dialog.is_visible()
    assert page.inner_text("#viewer-title") == "1.png"
    assert page.locator("#viewer figure").count() == 2
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-title") == "2.png"
    # The second mask of the list alone.
    page.focus("#viewer-masks button >> nth=1")
    assert (drawn(page, "#viewer figure:first-child canvas") == dataset.masks[2][1]).all()
    assert page.get_attribute("#viewer-masks button >> nth=1", "aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.querySelector('.name').textContent") == "1.png"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_both_schemes(browser, path, scheme):
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, color_scheme=scheme, is_mobile=True, has_touch=True
    )
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # Without a pointer, masks are drawn at once.
    page.locator(CARD.format(1)).scroll_into_view_if_needed()
    page.wait_for_selector(f"{CARD.format(1)} canvas")
    assert drawn(page, f"{CARD.format(1)} canvas").any()
    colors = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    text, ground = (sum(map(int, color[4:-1].split(","))) for color in colors)
    assert (text < ground) == (scheme == "light")
    page.tap(CARD.format(1))
    box = page.locator("#viewer").bounding_box()
    assert box["width"] <= 360
    context.close()
