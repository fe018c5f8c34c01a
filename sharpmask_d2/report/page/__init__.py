"""The HTML page of a report: its template, style and script, and the function that fills them."""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sharpmask_d2

from ...extras import REPORT, import_extra

_FOLDER = Path(__file__).resolve().parent
# Dash patterns in the legends of plots, in the order of `plots.SERIES_COLORS`.
_DASHES = ["none", "8 3", "2 2.5", "8 2.5 1.6 2.5", "13 3", "5 2 1.5 2 1.5 2"]


def render(context: dict[str, Any]) -> Iterator[str]:
    """Fill the template.

    Args:
        context: what the template `report.html.jinja` uses. "report" is written as JSON, and "pictures" are pairs of a kind and an iterator
            of what is written as JSON for each picture of this kind; "plots" have SVG elements.

    Yields:
        The page in pieces. The iterators are advanced while the page is written.

    Raises:
        UserError: Jinja2 is not installed.
    """
    jinja2, markup = import_extra("jinja2", requirement=REPORT), import_extra("markupsafe", requirement=REPORT).Markup
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    plots = [{**row, "svgs": [markup(svg) for svg in row["svgs"]]} for row in context["plots"]]
    pictures = [(kind, (markup(script_json(item)) for item in items)) for kind, items in context["pictures"]]
    return environment.get_template("report.html.jinja").generate(
        **{**context, "plots": plots, "pictures": pictures, "report": markup(script_json(context["report"]))},
        style=markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
        script=markup(script),
        script_hash=digest,
        version=sharpmask_d2.__version__,
        dashes=_DASHES,
    )


def script_json(content: Any) -> str:
    """Write JSON that can stand in a `<script>` element of HTML.

    Args:
        content: nested dicts, lists, text and numbers without nan.

    Returns:
        JSON without the character "<", so that neither the element can be ended nor a comment begun by what text contains.
    """
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
