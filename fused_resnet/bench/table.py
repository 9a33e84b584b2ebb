"""Tables for people: rows of measured figures, and the console that they are printed on."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .schema import Row

FILE_WIDTH = 160  # columns where the output is no terminal


def console() -> Console:
    """Standard output, without colours and wide enough for the tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)


def results_table(rows: Iterable[Row], title: str) -> Table:
    """A line a row; a row without figures shows its status in their place."""
    table = Table(title=title, title_justify="left")
    for head in ("case", "dtype", "batch", "shape", "impl"):
        table.add_column(head, no_wrap=True)
    for head in ("ms", "p10", "p90", "images/s", "TFLOP/s", "GB/s", "of copy", "of floor", "peak GB", "error"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("status")
    for row in rows:
        shape = "x".join(map(str, row.shape or ()))
        peak = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 1e9
        figures = (
            (row.median_ms, ",.4f"), (row.p10_ms, ",.4f"), (row.p90_ms, ",.4f"), (row.images_per_s, ",.1f"), (row.tflops, ",.2f"),
            (row.gbytes_per_s, ",.1f"), (row.copy_fraction, ".2f"), (row.roofline_fraction, ".2f"), (peak, ",.2f"),
            (row.max_rel_error, ".1e"),
        )  # fmt: skip
        told = ["" if value is None else format(value, form) for value, form in figures]
        table.add_row(row.case, row.dtype, str(row.batch or ""), shape, row.impl, *told, row.status)
    return table
