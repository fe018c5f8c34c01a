"""A table of figures, printed as Markdown and written as JSON."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from tabulate import tabulate


class Table(NamedTuple):
    """A table of figures."""

    # Key of the table in JSON.
    name: str
    # What the figures are, for readers.
    title: str
    # Names of the columns.
    header: Sequence[str]
    # Rows, each with one entry per column.
    rows: Sequence[Sequence[Any]]

    def text(self) -> str:
        """Format title and table as Markdown; figures have one decimal, and an unknown figure is nan.

        Returns:
            The text, without a final newline.
        """
        return f"{self.title}\n\n{tabulate(self.rows, self.header, tablefmt='pipe', floatfmt='.1f')}"

    def records(self) -> list[dict[str, Any]]:
        """Convert the rows for JSON.

        Returns:
            One dict per row, from column name to entry.
        """
        return [dict(zip(self.header, row)) for row in self.rows]


def percent(values: ArrayLike) -> float:
    """Compute a mean in percent.

    Args:
        values: numbers from 0 to 1, or bools.

    Returns:
        The mean in percent; nan without values.
    """
    values = np.asarray(values, dtype=np.float64)
    return 100 * float(values.mean()) if values.size else float("nan")
