"""The page in Chromium, driven by Playwright: with a mouse, with the keyboard alone, and on a phone."""

import json
import shutil

import cv2
import numpy as np
import pytest
from photograph_files import as_png, draw_photograph
from pycocotools import mask as mask_utils

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="tests in a browser need Playwright, which .venv/app has")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="tests in a browser need Chromium (Debian's package chromium)")
# Chromium asks its maker's servers for many things by itself.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, site):
    """A function that opens the page in a window of its own."""
    contexts, problems = [], []

    def opened(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if _is_outside(request.url, site) else None)
        page.goto(f"http://{site}/")
        page.locator(".upload").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def _is_outside(url, site):
    return not url.startswith((f"http://{site}/", "data:", "blob:"))


def _upload(page, pixels=None, name="disc.png"):
    content = as_png(draw_photograph() if pixels is None else pixels)
    page.locator(".upload input").set_input_files([{"name": name, "mimeType": "image/png", "buffer": content}])


def _entries(page, count=None):
    """The entries of the legend, once there are so many."""
    entries = page.locator("#viewer .entry")
    if count is None:
        entries.first.wait_for()
    else:
        sync_api.expect(entries).to_have_count(count)
    return entries


def _mode(page, name):
    page.get_by_role("tab", name=name).click()
    page.locator(f"#viewer .frame.{name.lower()}").wait_for()
    page.locator("#viewer .frame").scroll_into_view_if_needed()
    return page.locator("#viewer .masks").bounding_box()


def _masks(page):
    """The masks of the COCO file that the page offers."""
    with page.expect_download() as download:
        page.get_by_role("button", name="COCO JSON").click()
    return json.loads(download.value.path().read_text())["annotations"]


def test_everything_by_keyboard_and_by_mouse(open_page):
    page = open_page()
    _upload(page)
    entries = _entries(page)
    lowest = page.locator("#score input[type=range]")
    lowest.focus()
    lowest.press("Home")
    page.locator("#count input[type=range]").press("Home")
    _entries(page, 1)
    page.locator("#count input[type=range]").press("ArrowRight")
    _entries(page, 2)
    status = page.locator("#viewer .status")
    entries.nth(0).focus()
    page.keyboard.press("ArrowRight")
    sync_api.expect(status).to_contain_text("Mask 2: score 0.")
    sync_api.expect(page.locator("#viewer .mask.on")).to_have_attribute("data-number", "2")
    page.keyboard.press("Home")
    sync_api.expect(status).to_contain_text("Mask 1: score 0.")
    page.locator("#score input[type=range]").focus()
    sync_api.expect(status).to_contain_text("2 of ")
    # The mask with the smaller area lies above.
    page.locator("#viewer .mask").last.locator(".fill").hover(force=True)
    sync_api.expect(status).to_contain_text("Mask ")
    assert len(_masks(page)) == 2


def test_point_and_choice_and_kept_masks(open_page):
    page = open_page()
    _upload(page)
    _entries(page)
    area = _mode(page, "Point")
    page.mouse.click(area["x"] + area["width"] * 40 / 128, area["y"] + area["height"] * 48 / 96)
    page.locator("#choice input").first.wait_for()
    assert page.locator("#x input").input_value().startswith(("39", "40"))
    labels = page.locator("#choice label").all_inner_texts()
    assert [label.split()[0] for label in labels] == ["part", "object", "group"][: len(labels)]
    page.locator("#choice input").last.check()
    sync_api.expect(page.locator("#viewer .status")).to_contain_text("Mask 1")
    page.get_by_role("button", name="Keep this mask").click()
    sync_api.expect(page.locator("#viewer .status")).to_contain_text("1 masks are kept")
    page.get_by_role("button", name="Remove all").click()
    _entries(page, 0)


def test_a_dragged_box_and_a_typed_box_give_one_mask(open_page):
    page = open_page()
    _upload(page)
    _entries(page)
    area = _mode(page, "Box")
    corners = [
        (area["x"] + area["width"] * x / 128, area["y"] + area["height"] * y / 96) for x, y in ((82, 28), (118, 64))
    ]
    page.mouse.move(*corners[1])
    page.mouse.down()
    page.mouse.move(*corners[0], steps=3)
    page.mouse.up()
    _entries(page, 1)
    (dragged,) = _masks(page)
    square = np.zeros((96, 128), np.uint8)
    cv2.rectangle(square, (84, 30), (116, 62), 1, -1)
    truth = [mask_utils.encode(np.asfortranarray(square))]
    assert mask_utils.iou([dragged["segmentation"]], truth, [0])[0, 0] > 0.6
    # By keyboard: the fields follow one another, and Enter in the last one asks.
    page.locator("#left input").focus()
    for value in ("82", "28", "118", "64"):
        page.keyboard.press("Control+A")
        page.keyboard.type(value)
        page.keyboard.press("Tab")
    page.locator("#bottom input").press("Enter")
    sync_api.expect(page.locator("#viewer rect.prompt").first).to_have_attribute("x", "82")
    (typed,) = _masks(page)
    assert mask_utils.iou([typed["segmentation"]], [dragged["segmentation"]], [0])[0, 0] > 0.9


def test_on_a_phone_nothing_is_wider_than_the_screen(open_page):
    page = open_page(390, 844, has_touch=True, is_mobile=True)
    _upload(page)
    _entries(page)
    for name in ("Everything", "Box", "Point"):
        area = _mode(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert area["width"] > 300
    page.touchscreen.tap(area["x"] + area["width"] * 40 / 128, area["y"] + area["height"] * 48 / 96)
    page.locator("#choice input").first.wait_for()


def test_two_users_see_their_own_photographs(open_page):
    pages = [open_page(), open_page()]
    for page, name in zip(pages, ("first.png", "second.png")):
        _upload(page, name=name)
    for page, name in zip(pages, ("first.png", "second.png")):
        _entries(page)
        assert page.locator("#viewer .photograph").get_attribute("alt") == f"Photograph {name}"


def test_says_what_is_wrong_with_a_file(open_page):
    page = open_page()
    page.locator(".upload input").set_input_files(
        [{"name": "a.png", "mimeType": "image/png", "buffer": b"0" * 300_001}]
    )
    sync_api.expect(page.locator(".problem")).to_contain_text("more than 0.3 MB")
    page.locator(".upload input").set_input_files([{"name": "a.png", "mimeType": "image/png", "buffer": b"no image"}])
    sync_api.expect(page.get_by_text("no image of the formats")).to_be_visible()
