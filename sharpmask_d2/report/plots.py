"""Draws the curves of a report with Matplotlib: as SVG for the page, one small plot per size of the objects, and as files.

The plots are static, because a reader of a report compares few lines whose figures are in tables beside them: SVG has a hundredth of the
bytes of an interactive library, is printed, and is shown without JavaScript.
"""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..evaluation.recall import AREA_RANGES
from ..extras import REPORT, import_extra
from ..io.outputs import write_output
from .curves import IOU_COUNTS, axes_of_curves

# Colours of Okabe and Ito, which people with any form of colour blindness can tell apart on white and on black; lines also differ in their
# dashes and markers. The first colours of both lists belong together.
SERIES_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
# Stand for the colours of the page's text and of its lines.
_INK, _GRID = "#010203", "#0a0b0c"
_RC = {"svg.fonttype": "none", "svg.hashsalt": "sharpmask_d2", "font.family": "sans-serif", "font.size": 9}


class PlotRow(NamedTuple):
    """A row of plots, one per area range."""

    # Part of the names of files.
    key: str
    title: str
    # Labels of the axes.
    x_label: str
    y_label: str
    # Values of the horizontal axis.
    x: list
    # Whether the horizontal axis is logarithmic.
    log: bool
    # Area range -> one curve per file, in percent; None where no object counts.
    lines: dict[str, list[list[Optional[float]]]]

    def top(self) -> int:
        """Upper end of the vertical axis, in percent: the next multiple of ten above all curves."""
        values = [value for lines in self.lines.values() for line in lines for value in line if value is not None]
        return min(10 * math.ceil((max(values, default=100) + 1) / 10), 100)


def plot_rows(all_curves: Sequence[dict[str, Any]]) -> list[PlotRow]:
    """Arrange curves in rows.

    Args:
        all_curves: the result of `curves.curves` of each file; None instead of nan is accepted.

    Returns:
        Average recall against the number of proposals, then recall against IoU at each of `curves.IOU_COUNTS`.
    """
    axes = axes_of_curves()
    rows = [
        PlotRow(
            "recall_by_number",
            "Average recall against the number of proposals",
            "proposals per image",
            "AR in %",
            axes["counts"],
            True,
            {area: [c["average_recall"][area] for c in all_curves] for area in AREA_RANGES},
        )
    ]
    for count in IOU_COUNTS:
        rows.append(
            PlotRow(
                f"recall_by_iou_{count}",
                f"Recall against IoU at {count} proposals per image",
                "IoU threshold",
                "recall in %",
                axes["ious"],
                False,
                {area: [c["recall"][str(count)][area] for c in all_curves] for area in AREA_RANGES},
            )
        )
    return rows


def draw_svg(row: PlotRow, area: str) -> str:
    """Draw one plot for a page. Its colours are variables of the page, so that it is legible on light and on dark.

    Args:
        row: a row of plots.
        area: a key of `AREA_RANGES`.

    Returns:
        An `<svg>` element. It uses the CSS variables --grid and --series-0, --series-1, ...
    """
    matplotlib, figure = (
        import_extra("matplotlib", requirement=REPORT),
        import_extra("matplotlib.figure", requirement=REPORT).Figure(figsize=(3.1, 2.5)),
    )
    with matplotlib.rc_context(_RC):
        axes = figure.add_subplot()
        _draw(axes, row, area, ink=_INK, grid=_GRID)
        figure.subplots_adjust(left=0.19, right=0.96, bottom=0.17, top=0.91)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page sets the width; ids are unique among all plots of the page.
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    prefix = f"{row.key}-{area}-"
    svg = re.sub(r' id="', f' id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for i, color in enumerate(SERIES_COLORS):
        svg = svg.replace(color, f"var(--series-{i})")
    label = f"{row.title}, {area} objects. The table below has the figures."
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def write_plots(rows: Sequence[PlotRow], names: Sequence[str], folder: Path) -> list[Path]:
    """Write each row of plots as PNG and as SVG.

    Args:
        rows: the rows of plots.
        names: of the files.
        folder: output folder; it is created.

    Returns:
        Paths of the written files.

    Raises:
        OutputError: a file cannot be written.
    """
    matplotlib, figure_module = (
        import_extra("matplotlib", requirement=REPORT),
        import_extra("matplotlib.figure", requirement=REPORT),
    )
    paths = []
    for row in rows:
        with matplotlib.rc_context(_RC):
            figure = figure_module.Figure(figsize=(11, 3.2))
            all_axes = figure.subplots(1, len(AREA_RANGES), sharey=True)
            for axes, area in zip(all_axes, AREA_RANGES):
                _draw(axes, row, area, ink="black", grid="#dddddd")
            handles = all_axes[0].get_lines()
            labels = [_plain(name) for name in names]
            figure.legend(handles, labels, loc="lower center", ncols=len(names), frameon=False, handlelength=4)
            figure.suptitle(row.title, fontsize=11)
            figure.subplots_adjust(left=0.05, right=0.99, bottom=0.24, top=0.82, wspace=0.18)
            for suffix in ("png", "svg"):
                content = io.BytesIO()
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(content, format=suffix, dpi=150, metadata=metadata)
                path = folder / f"{row.key}.{suffix}"
                write_output(path, content.getvalue())
                paths.append(path)
    return paths


def _draw(axes: Any, row: PlotRow, area: str, *, ink: str, grid: str) -> None:
    ticker = import_extra("matplotlib.ticker", requirement=REPORT)
    for i, values in enumerate(row.lines[area]):
        style = i % len(SERIES_COLORS)
        axes.plot(
            row.x,
            [math.nan if value is None else value for value in values],
            color=SERIES_COLORS[style],
            linestyle=_DASHES[style],
            marker=_MARKERS[style],
            markersize=4,
            markevery=max(len(row.x) // 6, 1) if row.log else 1,
            linewidth=1.6,
        )
    axes.set_title(f"{area} objects", fontsize=10, color=ink)
    axes.set_xlabel(row.x_label, color=ink)
    axes.set_ylabel(row.y_label, color=ink)
    if row.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_ylim(0, row.top())
    axes.grid(color=grid, linewidth=0.6)
    axes.tick_params(which="both", colors=ink)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(ink)


def _plain(name: str) -> str:
    """A text that Matplotlib shows as it is: "$" begins a formula, and a label that begins with "_" is hidden."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
