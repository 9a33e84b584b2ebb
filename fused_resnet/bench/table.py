"""Tables for people: rows of measured figures, and the console that they are printed on."""

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from .schema import Row

FILE_WIDTH = 180  # columns where the output is no terminal


def console() -> Console:
    """Standard output, without colours and wide enough for the tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)


def number(value: float | None) -> str:
    """Four significant digits, thousands apart; nothing for null."""
    if value is None:
        return ""
    places = max(0, 3 - len(str(int(abs(value)))) + (abs(value) < 1)) if abs(value) < 1000 else 0
    return f"{value:,.{places + 1 if 0 < abs(value) < 1000 else 0}f}"


def scaled(field: str, scale: float = 1.0) -> Callable[[Row], str]:
    """Tells a figure of a row."""

    def tell(row: Row) -> str:
        value = getattr(row, field)
        return number(None if value is None else value * scale)

    return tell


#: Head of a column, what it tells of a row, and whether it is a figure. `columns` drops what is empty in all rows.
COLUMNS: tuple[tuple[str, Callable[[Row], str], bool], ...] = (
    ("case", lambda row: row.case, False),
    ("dtype", lambda row: row.dtype, False),
    ("batch", lambda row: "" if row.batch is None else str(row.batch), True),
    ("C×H×W", lambda row: "×".join(map(str, row.shape or ())), True),
    ("impl", lambda row: row.impl, False),
    ("ms", scaled("median_ms"), True),
    ("p10", scaled("p10_ms"), True),
    ("p90", scaled("p90_ms"), True),
    ("images/s", scaled("images_per_s"), True),
    ("TFLOP/s", scaled("tflops"), True),
    ("GB/s", scaled("gbytes_per_s"), True),
    ("of copy", scaled("copy_fraction"), True),
    ("of floor", scaled("roofline_fraction"), True),
    ("peak GB", scaled("peak_memory_bytes", 1e-9), True),
    ("error", lambda row: "" if row.max_rel_error is None else f"{row.max_rel_error:.1e}", True),
    ("status", lambda row: "" if row.status == "ok" else row.status, False),
)


def columns(rows: Sequence[Row]) -> list[tuple[str, list[str], bool]]:
    """(head, a text for each row, whether they are figures) of every column that tells something."""
    told = [(head, [tell(row) for row in rows], figure) for head, tell, figure in COLUMNS]
    return [column for column in told if any(column[1])]


def results_table(rows: Sequence[Row], title: str) -> Table:
    """A line a row."""
    table = Table(title=title, title_justify="left")
    found = columns(rows)
    for head, _, figure in found:
        table.add_column(head, justify="right" if figure else "left", no_wrap=head != "status")
    for cells in zip(*(texts for _, texts, _ in found), strict=True):
        table.add_row(*cells)
    return table
