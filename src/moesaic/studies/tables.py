"""Markdown tables and the numbers in their cells."""

import math
from collections.abc import Sequence

from moesaic.statistics import Interval

__all__ = ["bounds", "markdown_table", "number"]


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    rules = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join(_line(cells) for cells in (columns, rules, *lines))


def bounds(difference: Interval) -> str:
    """Return a difference with its sign and its interval, "-" without values."""
    if difference.n < 2:
        return f"{difference.mean:+.4f} (n=1)" if difference.n else "-"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def number(value: float, form: str) -> str:
    """Return a number in this format, "-" for nan."""
    return "-" if math.isnan(value) else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
