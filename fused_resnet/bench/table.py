"""Tables for people: rows of measured figures, and the console that they are printed on."""

import sys
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table

from . import convolutions
from .schema import Row
from .steps import OURS

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


#: (head, a text for each line, whether they are figures)
Column = tuple[str, list[str], bool]
#: What a fused convolution is measured by: the framework's, with a pass before and behind.
PASSES = ("ours:passes_cuda", "ours:passes_cpu", "ours:passes_triton")


def columns(rows: Sequence[Row]) -> list[Column]:
    """A line a row: every column that tells something."""
    told = [(head, [tell(row) for row in rows], figure) for head, tell, figure in COLUMNS]
    return [column for column in told if any(column[1])]


def by_shape(rows: Sequence[Row]) -> list[Column]:
    """A line a case and shape: the floor's ms, and each implementation's, with the fraction of the floor that it reaches."""
    lines = list(_by_case(rows).values())
    found = [(head, [tell(next(iter(line.values()))) for line in lines], figure) for head, tell, figure in COLUMNS[:4]]
    found.append(("floor, ms", [number(_floor_ms(line.values())) for line in lines], True))
    for impl in dict.fromkeys(row.impl for row in rows):
        found.append((f"{impl}, ms", [_figure(line.get(impl)) for line in lines], True))
    return [column for column in found if any(column[1])]


def _floor_ms(rows: Iterable[Row]) -> float | None:
    return next((row.roofline_fraction * row.median_ms for row in rows if row.roofline_fraction is not None), None)


def _figure(row: Row | None) -> str:
    if row is None or row.status != "ok":
        return row.status.partition(":")[0] if row else ""
    return number(row.median_ms) + ("" if row.roofline_fraction is None else f" ({row.roofline_fraction:.2f})")


def _by_case(rows: Sequence[Row]) -> dict[tuple, dict[str, Row]]:
    """The rows of each case and shape by implementation."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.case, row.dtype, row.batch, tuple(row.shape or ())), {})[row.impl] = row
    return found


def slower_than_passes(rows: Sequence[Row]) -> list[str]:
    """A line for each shape at which the measured choice, or a kernel of its own, is slower than the faster of the passes.

    By more than the spreads: its 10th percentile is above the passes' 90th.
    """
    found = []
    for (case, dtype, batch, shape), line in _by_case(rows).items():
        passes = [line[impl] for impl in PASSES if impl in line and line[impl].status == "ok"]
        fastest = min(passes, key=lambda row: row.median_ms, default=None)
        for impl in ("ours", *OURS):
            row = line.get(impl)
            if fastest and row and impl not in PASSES and row.status == "ok" and row.p10_ms > fastest.p90_ms:
                times = f"{impl} {number(row.median_ms)} ms, {fastest.impl} {number(fastest.median_ms)} ms"
                found.append(f"{case}, {dtype}, batch {batch}, {'×'.join(map(str, shape))}: {times}")
    return found


def tables(rows: Sequence[Row]) -> tuple[list[list[Column]], list[str]]:
    """(the tables of a file, what is to be said below them): a line a row, but of convolutions a line a shape."""
    shapes = [row for row in rows if row.case.partition(" ")[0] in convolutions.NAMES]
    others = [row for row in rows if row not in shapes]
    found = [make(some) for make, some in ((columns, others), (by_shape, shapes)) if some]
    notes = [
        f"{row.case}, {row.dtype}, batch {row.batch}, {'×'.join(map(str, row.shape))}, {row.impl}: {row.status}"
        for row in shapes if row.status != "ok"
    ]  # fmt: skip
    timed = {row.impl for row in shapes if row.status == "ok"}
    if timed & set(PASSES) and (kernels := [impl for impl in ("ours", *OURS) if impl in timed and impl not in PASSES]):
        slower = slower_than_passes(shapes)
        notes += [f"Slower than the passes: {words}" for words in slower] or [f"Nowhere slower than the passes: {', '.join(kernels)}"]
    return found, notes


def rich_table(found: Sequence[Column], title: str) -> Table:
    """For a console."""
    table = Table(title=title, title_justify="left")
    for head, _, figure in found:
        table.add_column(head, justify="right" if figure else "left", no_wrap=head != "status")
    for cells in zip(*(texts for _, texts, _ in found), strict=True):
        table.add_row(*cells)
    return table


def results_table(rows: Sequence[Row], title: str) -> Table:
    """A line a row, for a console."""
    return rich_table(columns(rows), title)
