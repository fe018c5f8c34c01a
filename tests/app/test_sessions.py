"""What the users of the page work on."""

import threading

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from sharpmask_d2.app.drawing import choices, outline, view
from sharpmask_d2.app.sessions import BOX, EVERYTHING, MAX_MASKS, POINT, Mask, Session, Sessions
from sharpmask_d2.errors import UserError


def _mask(bitmap, score=0.5):
    return Mask(mask_utils.encode(np.asfortranarray(bitmap, np.uint8)), score)


@pytest.fixture
def session(models, photograph):
    opened = Session(models)
    opened.open(photograph)
    return opened


def test_sliders_choose_among_the_best_masks(session):
    found = session.everything()
    assert 0 < len(found) <= MAX_MASKS
    scores = [mask.score for mask in found]
    assert scores == sorted(scores, reverse=True)
    middle = scores[len(scores) // 2]
    assert session.shown(MAX_MASKS, middle) == [mask for mask in found if mask.score >= middle]
    assert session.shown(1, 0) == found[:1]
    assert session.shown(MAX_MASKS, 1.01) == []


def test_a_point_has_masks_of_several_sizes(session, photograph):
    session.mode = POINT
    session.ask(POINT, [40, 48])
    masks = session.prompt.masks
    assert [mask.area for mask in masks] == sorted(mask.area for mask in masks)
    assert session.prompt.chosen == int(np.argmax([mask.score for mask in masks]))
    assert session.shown(1, 1) == [masks[session.prompt.chosen]]
    assert [label.split(" ")[0] for label, _ in choices(session.prompt)] == ["part", "object", "group"][: len(masks)]
    assert masks[session.prompt.chosen].bitmap()[48, 40] == 1
    session.choose(0)
    assert session.shown(1, 1) == [masks[0]]
    session.choose(99)
    assert session.prompt.chosen == 0


def test_the_mask_of_a_box_fits_the_drawn_square(session, photograph):
    session.mode = BOX
    session.ask(BOX, [118, 64, 82, 28])  # any two corners
    assert session.prompt.values == (82, 28, 118, 64)
    square = np.zeros((96, 128), np.uint8)
    square[30:63, 84:117] = 1
    (mask,) = session.shown(1, 1)
    assert mask_utils.iou([mask.rle], [_mask(square).rle], [0])[0, 0] > 0.6


def test_kept_masks_stay_and_are_cleared(session):
    with pytest.raises(UserError, match="no mask to keep"):
        session.keep()
    session.mode = BOX
    session.ask(BOX, [82, 28, 118, 64])
    session.keep()
    session.ask(BOX, [10, 20, 70, 76])
    assert len(session.shown(1, 1)) == 2
    session.set_model("deepmask_lite0")
    assert len(session.shown(1, 1)) == 1
    session.clear()
    assert session.shown(1, 1) == []


def test_a_new_photograph_forgets_the_masks(session, photograph):
    session.ask(POINT, [40, 48])
    session.keep()
    before = session.picture_id
    session.open(photograph)
    assert session.kept == []
    assert session.prompt is None
    assert session.picture_id != before


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (POINT, [None, 3], "x and y"),
        (POINT, [3, float("nan")], "x and y"),
        (POINT, [200, 3], "outside of the photograph of 128 x 96"),
        (BOX, [1, 2, 3], "both corners"),
        (BOX, [200, 200, 300, 300], "no area"),
        (BOX, [5, 5, 5, 50], "no area"),
    ],
)
def test_names_what_is_wrong_with_a_prompt(session, kind, values, message):
    with pytest.raises(UserError, match=message):
        session.ask(kind, values)


def test_models_on_an_image_pyramid_show_everything_and_refuse_prompts(session):
    session.set_model("deepmask_lite0")
    assert all(0.3 <= mask.score <= 1 for mask in session.everything())
    with pytest.raises(UserError, match="choose sharpmask_bifpn_lite0"):
        session.ask(POINT, [40, 48])
    with pytest.raises(UserError, match="no packaged model"):
        session.set_model("../weights.pkl")


def test_offers_the_models_that_make_proposals(models):
    assert models.names() == ["sharpmask_bifpn_lite0", "deepmask_lite0", "sharpmask_lite0"]
    assert models.get("sharpmask_bifpn_lite0") is models.get("sharpmask_bifpn_lite0")


def test_without_a_photograph_says_so(models):
    with pytest.raises(UserError, match="choose one"):
        Session(models).shown(1, 0.5)


def test_sessions_are_bounded_and_apart(models, photograph):
    sessions = Sessions(models, capacity=2)
    first = sessions.get("a")
    first.open(photograph)
    sessions.get("b")
    assert sessions.picture(first.picture_id) == first.picture
    assert sessions.picture("") is None  # the secret name of a session without a photograph
    assert sessions.get("a") is first
    sessions.get("c")
    assert len(sessions) == 2
    assert sessions.get("a") is first  # b was unused for longer
    sessions.forget("a")
    assert sessions.picture(first.picture_id) is None


def test_users_at_once_get_the_masks_of_their_own_photographs(models, photograph):
    mirrored = photograph._replace(pixels=np.ascontiguousarray(photograph.pixels[:, ::-1]))
    sessions = Sessions(models, capacity=2)
    boxes = {}

    def work(token, opened, box):
        session = sessions.get(token)
        session.open(opened)
        session.ask(BOX, box)
        boxes[token] = session.prompt.masks[0].box

    users = [
        threading.Thread(target=work, args=("a", photograph, [82, 28, 118, 64])),
        threading.Thread(target=work, args=("b", mirrored, [10, 28, 46, 64])),
    ]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert boxes["a"][0] >= 82
    assert boxes["b"][0] + boxes["b"][2] <= 46


def test_draws_masks_with_holes_numbers_and_distinct_looks(models, photograph):
    session = Session(models)
    assert view(session, []) == {"picture": ""}
    session.open(photograph)
    ring = np.zeros((96, 128), np.uint8)
    ring[10:40, 10:40] = 1
    ring[20:30, 20:30] = 0
    masks = [_mask(ring)] * 21
    drawn = view(session, masks)["masks"]
    assert [mask["number"] for mask in drawn] == list(range(1, 22))
    assert len({(mask["colour"], mask["style"]) for mask in drawn}) == 21
    assert outline(masks[0]).count("M") == 2
    assert ring[int(drawn[0]["y"]), int(drawn[0]["x"])] == 1
    assert view(session, masks)["mode"] == EVERYTHING
