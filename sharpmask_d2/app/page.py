"""Builds the page with Gradio.

Photographs and downloads travel inside of events, so that Gradio stores no files, and the state of a user is a secret token for `Sessions`.
"""

import base64
import itertools
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import gradio as gr

from ..data.images import read_image
from ..errors import UserError
from .downloads import FORMATS, write
from .drawing import choices, view
from .photographs import Photograph, decode_upload, read_photograph, thumbnail
from .sessions import BOX, EVERYTHING, LOWEST_SCORE, MAX_MASKS, POINT, Session, Sessions

_STATIC = Path(__file__).parent / "static"
# Computations of the network run one at a time: each uses all threads.
_EVENT: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "api_visibility": "private"}
_QUEUE = 20
# Seconds after which the session of a closed or idle page is forgotten.
_IDLE = 3600
CSS = """
.dark { --color-accent: var(--primary-400); }
.gradio-container { max-width: 1240px !important; }
.html-container { padding: 0 !important; }
button:focus-visible, input:focus-visible, [role=tab]:focus-visible { outline: 3px solid #0072B2 !important; outline-offset: 2px; }
"""


class Limits(NamedTuple):
    """What the page accepts."""

    max_bytes: int  # size of a file of an image
    max_pixels: int  # number of pixels of an image


def theme() -> gr.Theme:
    """A theme with the fonts of the user's system: the fonts of Gradio's themes are fetched from the internet."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="blue", **fonts).set(
        # Darker than Gradio's, for the contrast of text.
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
    )


def build_page(
    sessions: Sessions, models: Sequence[str], *, limits: Limits, examples: Sequence[Path] = (), model: str
) -> gr.Blocks:
    """Builds the page.

    Args:
        sessions: of the users.
        models: names of the packaged models to choose from.
        limits: of uploaded images.
        examples: image files that the page offers. They are read when they are chosen.
        model: the model that is chosen at first.

    Returns:
        The page, to be mounted with the theme of `theme` and CSS.
    """
    handlers = Handlers(sessions, limits, examples)
    thumbnails = [{"name": path.name, "thumbnail": thumbnail(path)} for path in examples]
    with gr.Blocks(title="SharpMask", analytics_enabled=False, delete_cache=(_IDLE, _IDLE)) as page:
        token = gr.State(partial(secrets.token_urlsafe, 18), time_to_live=_IDLE, delete_callback=sessions.forget)
        gr.Markdown("# SharpMask\nMasks of everything in a photograph, of a point, or of a box.")
        start = _html("start", {"max_bytes": limits.max_bytes, "examples": thumbnails})
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                viewer = _html("viewer", {"picture": ""}, elem_id="viewer")
            with gr.Column(scale=2, min_width=300):
                with gr.Tabs(elem_id="modes"):
                    with gr.Tab("Everything") as everything_tab:
                        count = gr.Slider(1, MAX_MASKS, 20, step=1, label="Maximum number of masks", elem_id="count")
                        score = gr.Slider(LOWEST_SCORE, 1, 0.45, step=0.01, label="Lowest score", elem_id="score")
                        gr.Markdown(
                            "Hover over a mask, or move through the legend with the arrow keys, to see it alone."
                        )
                    with gr.Tab("Point") as point_tab:
                        gr.Markdown("Click in the photograph, or type a place in pixels.")
                        with gr.Row():
                            xy = [gr.Number(label=name, elem_id=name, min_width=80) for name in ("x", "y")]
                        find_point = gr.Button("Find the mask of the point", variant="primary")
                    with gr.Tab("Box") as box_tab:
                        gr.Markdown("Drag a box in the photograph, or type two corners in pixels.")
                        with gr.Row():
                            corners = [
                                gr.Number(label=name, elem_id=name, min_width=80)
                                for name in ("left", "top", "right", "bottom")
                            ]
                        find_box = gr.Button("Find the mask of the box", variant="primary")
                choice = gr.Radio([], label="Mask of the prompt", visible=False, elem_id="choice")
                with gr.Row(visible=False) as keeping:
                    keep = gr.Button("Keep this mask", size="sm", min_width=130)
                    clear = gr.Button("Remove all", size="sm", min_width=130)
                chosen_model = gr.Dropdown(list(models), value=model, label="Model", filterable=False, elem_id="model")
                gr.Markdown("**Download the masks that are shown**")
                with gr.Row():
                    buttons = [gr.Button(name, size="sm", min_width=150) for name in FORMATS.values()]
                saved = gr.HTML(
                    value={}, html_template='<p role="status"></p>', js_on_load=_static("download.js"), elem_id="saved"
                )
        shown = [token, count, score]
        outputs = [viewer, choice, keeping]
        start.upload(handlers.upload, [*shown, chosen_model], outputs, **_EVENT)
        start.example(handlers.example, [*shown, chosen_model], outputs, **_EVENT)
        for tab, mode in ((everything_tab, EVERYTHING), (point_tab, POINT), (box_tab, BOX)):
            tab.select(partial(handlers.set_mode, mode), shown, outputs, show_progress="hidden", **_EVENT)
        for slider in (count, score):
            slider.input(handlers.show, shown, outputs, trigger_mode="always_last", show_progress="hidden", **_EVENT)
        viewer.point(handlers.click, shown, [*outputs, *xy], **_EVENT)
        viewer.box(handlers.drag, shown, [*outputs, *corners], **_EVENT)
        gr.on(
            [find_point.click, *(field.submit for field in xy)],
            partial(handlers.ask, POINT),
            [*shown, *xy],
            outputs,
            **_EVENT,
        )
        gr.on(
            [find_box.click, *(field.submit for field in corners)],
            partial(handlers.ask, BOX),
            [*shown, *corners],
            outputs,
            **_EVENT,
        )
        choice.input(handlers.choose, [*shown, choice], outputs, show_progress="hidden", **_EVENT)
        keep.click(handlers.keep, shown, outputs, **_EVENT)
        clear.click(handlers.clear, shown, outputs, **_EVENT)
        chosen_model.input(handlers.set_model, [*shown, chosen_model], outputs, **_EVENT)
        for button, form in zip(buttons, FORMATS):
            button.click(partial(handlers.download, form), shown, saved, **_EVENT)
    return page.queue(max_size=_QUEUE, default_concurrency_limit=1)


class Handlers:
    """What the page does on each event, without the page. `shown` is the number of masks and the lowest score of the sliders."""

    def __init__(self, sessions: Sessions, limits: Limits, examples: Sequence[Path]):
        self._sessions, self._limits, self._examples = sessions, limits, list(examples)
        self._numbers = itertools.count()

    def upload(self, token: str, count: int, score: float, model: str, event: gr.EventData) -> list[Any]:
        """Opens the photograph of the event, {"name", "data"}."""
        data = _event_data(event)

        def work(session: Session) -> None:
            content = decode_upload(data.get("data"), max_bytes=self._limits.max_bytes)
            self._open(
                session,
                read_photograph(content, str(data.get("name") or ""), max_pixels=self._limits.max_pixels),
                model,
            )

        return self._run(token, count, score, work)

    def example(self, token: str, count: int, score: float, model: str, event: gr.EventData) -> list[Any]:
        """Opens one of the photographs that the page offers, {"number"}."""
        number = _event_data(event).get("number")

        def work(session: Session) -> None:
            if not isinstance(number, int) or not 0 <= number < len(self._examples):
                raise UserError("There is no such photograph.")
            path = self._examples[number]
            self._open(session, Photograph(path.name, read_image(path)), model)

        return self._run(token, count, score, work)

    def show(self, token: str, count: int, score: float) -> list[Any]:
        """Shows the masks that the sliders leave."""
        return self._run(token, count, score)

    def set_mode(self, mode: str, token: str, count: int, score: float) -> list[Any]:
        """Changes between everything, points and boxes."""

        def work(session: Session) -> None:
            session.mode = mode
            if session.prompt is not None and session.prompt.kind != mode:
                session.prompt = None

        return self._run(token, count, score, work, optional=True)

    def set_model(self, token: str, count: int, score: float, model: str) -> list[Any]:
        """Changes the model."""

        def work(session: Session) -> None:
            session.set_model(model)
            if session.photograph is not None:
                session.everything()

        return self._run(token, count, score, work, optional=True)

    def ask(self, kind: str, token: str, count: int, score: float, *values: Optional[float]) -> list[Any]:
        """Finds the masks of a point or a box that was typed."""
        return self._run(token, count, score, lambda session: session.ask(kind, values))

    def click(self, token: str, count: int, score: float, event: gr.EventData) -> list[Any]:
        """Finds the masks of a point in the photograph, {"values"}, and fills in the fields of its numbers."""
        return self._ask_viewer(POINT, token, count, score, event)

    def drag(self, token: str, count: int, score: float, event: gr.EventData) -> list[Any]:
        """Finds the mask of a box in the photograph, {"values"}, and fills in the fields of its numbers."""
        return self._ask_viewer(BOX, token, count, score, event)

    def choose(self, token: str, count: int, score: float, number: Optional[int]) -> list[Any]:
        """Chooses among the masks of a prompt."""
        return self._run(token, count, score, lambda session: session.choose(number))

    def keep(self, token: str, count: int, score: float) -> list[Any]:
        """Keeps the mask of the prompt."""
        return self._run(token, count, score, Session.keep)

    def clear(self, token: str, count: int, score: float) -> list[Any]:
        """Removes the prompt and the masks that are kept."""
        return self._run(token, count, score, Session.clear)

    def download(self, form: str, token: str, count: int, score: float) -> dict[str, Any]:
        """Writes the masks that are shown."""
        session = self._sessions.get(token)
        try:
            masks = session.shown(count, score)
            assert session.photograph is not None
            file = write(form, session.photograph, masks)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        content = base64.b64encode(file.content).decode("ascii")
        # The number makes a second download of the same file a change.
        return {"name": file.name, "media_type": file.media_type, "content": content, "number": next(self._numbers)}

    def _ask_viewer(self, kind: str, token: str, count: int, score: float, event: gr.EventData) -> list[Any]:
        values = _event_data(event).get("values")
        size = 2 if kind == POINT else 4
        if not isinstance(values, list) or len(values) != size or not all(isinstance(v, (int, float)) for v in values):
            raise gr.Error("The page did not send a place.", print_exception=False)
        if kind == BOX:
            (x0, x1), (y0, y1) = sorted(values[0::2]), sorted(values[1::2])
            values = [x0, y0, x1, y1]
        return self.ask(kind, token, count, score, *values) + values

    def _open(self, session: Session, photograph: Photograph, model: str) -> None:
        session.set_model(model)
        session.open(photograph)
        # In every mode, so that a change of the mode never waits.
        session.everything()

    def _run(
        self,
        token: str,
        count: int,
        score: float,
        work: Optional[Callable[[Session], None]] = None,
        *,
        optional: bool = False,
    ) -> list[Any]:
        """Works on a session, and returns what the viewer, the choice of masks and the row of buttons become."""
        session = self._sessions.get(token)
        try:
            if work is not None:
                work(session)
            masks = [] if optional and session.photograph is None else session.shown(count, score)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        prompt = session.prompt if session.mode != EVERYTHING else None
        return [
            view(session, masks),
            gr.Radio(
                choices(prompt),
                value=prompt.chosen if prompt else None,
                visible=prompt is not None and len(prompt.masks) > 1,
            ),
            gr.Row(visible=session.mode != EVERYTHING and bool(prompt or session.kept)),
        ]


def _event_data(event: gr.EventData) -> dict[str, Any]:
    return event._data if isinstance(event._data, dict) else {}


def _html(name: str, value: dict[str, Any], **options: Any) -> gr.HTML:
    return gr.HTML(
        value=value,
        html_template=_static(f"{name}.html"),
        css_template=_static(f"{name}.css"),
        js_on_load=_static(f"{name}.js"),
        apply_default_css=False,
        **options,
    )


def _static(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")
