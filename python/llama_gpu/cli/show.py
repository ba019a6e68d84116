"""Sizes, tables and JSON as the commands print them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

# Piped output is as wide as it needs to be; a terminal folds it.
_UNBOUNDED = 160


def size(count: int | None) -> str:
    """Bytes as a person reads them: ``12.3 GiB``; ``-`` for unknown."""
    if count is None:
        return "-"
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(amount) < 1024:  # noqa: PLR2004
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_json_line(value: Any) -> None:
    """One JSON document on a line of its own, at once."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def print_lines(*lines: str) -> None:
    """Plain lines on standard output."""
    console().print("\n".join(lines), markup=False, highlight=False)


def console() -> Console:
    """Standard output."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else _UNBOUNDED)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a ``table``."""
    console().print(table(columns, rows, title))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A table; columns whose name begins with ``>`` are set to the right. ``Text`` keeps its colours."""
    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        made.add_row(*(_cell(cell) for cell in row))
    return made


def _cell(cell: object) -> Text | str:
    if isinstance(cell, Text):
        return cell
    return "-" if cell is None else escape(str(cell))
