"""Tables of figures: printed for people, and as JSON for programs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tabulate import tabulate


class Table(NamedTuple):
    """A table: a short name for programs, a title for people, names of the columns, and rows with one entry a column."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence]

    def text(self) -> str:
        """Title and table as Markdown, figures with one decimal; a figure that is not known is nan."""
        return f"{self.title}\n\n{tabulate(self.rows, self.header, tablefmt='pipe', floatfmt='.1f')}"

    def records(self) -> list:
        """A dict for each row, from the names of the columns to what is in them."""
        return [dict(zip(self.header, row)) for row in self.rows]


def percent(values) -> float:
    """The mean of values from 0 to 1, or of bools, in percent; nan of none."""
    values = np.asarray(values, dtype=np.float64)
    return 100 * float(values.mean()) if values.size else float("nan")
