"""Tables for people and for programs: rows of measured figures, and the console that they are printed on."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import convolutions
from .schema import Row
from .steps import OURS

FILE_WIDTH = 180  # columns where the output is no terminal


def console() -> Console:
    """Standard output; where it is no terminal, without colours and as wide as COLUMNS says, else wide enough for the tables."""
    named = os.environ.get("COLUMNS", "")
    width = None if sys.stdout.isatty() else int(named) if named.isdigit() else FILE_WIDTH
    return Console(width=width, highlight=False)


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
#: (title, columns)
Titled = tuple[str, Sequence[Column]]
#: Heads of columns that a title may stand for.
SAID_ONCE = ("dtype", "batch", "C×H×W")
#: What speed-ups are over: the first that a case has.
BASES = ("eager_nhwc", "eager")
#: What a fused convolution is measured by: the framework's, with a pass before and behind.
PASSES = ("ours:passes_cuda", "ours:passes_cpu", "ours:passes_triton")


def columns(rows: Sequence[Row]) -> list[Column]:
    """A line a row: every column that tells something."""
    told = [(head, [tell(row) for row in rows], figure) for head, tell, figure in COLUMNS]
    faster = speed_ups(rows)
    told.insert(6, ("speed-up", [f"{faster[id(row)]:.2f}" if id(row) in faster else "" for row in rows], True))
    return [column for column in told if any(column[1])]


def speed_ups(rows: Sequence[Row]) -> dict[int, float]:
    """How many times as fast as PyTorch's eager mode (`BASES`) each row is, by its id; of rows whose case has such a time."""
    found = {}
    for line in _by_case(rows).values():
        base = next((line[impl] for impl in BASES if impl in line and line[impl].status == "ok"), None)
        found |= {id(row): base.median_ms / row.median_ms for row in line.values()
                  if base and row is not base and row.status == "ok" and row.median_ms}  # fmt: skip
    return found


def mean_speed_ups(rows: Sequence[Row]) -> list[str]:
    """A line an implementation: the geometric mean of its speed-ups over the cases, where there are several."""
    rows = [row for row in rows if ":" not in row.case]
    faster, by_impl = speed_ups(rows), {}
    for row in rows:
        if id(row) in faster:
            by_impl.setdefault(row.impl, []).append(faster[id(row)])
    return [f"{impl}: {geometric_mean(values):.2f} times as fast as PyTorch's eager mode, geometric mean of {len(values)} cases"
            for impl, values in by_impl.items() if len(values) > 1]  # fmt: skip


def without_unsupported(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """(rows without those of implementations that can't be had at all, a line for each of these)."""
    reasons: dict[str, set[str]] = {}
    for row in rows:
        reasons.setdefault(row.impl, set()).add(row.status)
    never = {impl: one for impl, (one, *more) in reasons.items() if not more and one.startswith("unsupported")}
    if len(never) == len(reasons):
        never.popitem()  # a table with nothing in it says less
    count = {impl: sum(row.impl == impl for row in rows) for impl in never}
    never = {impl: reason for impl, reason in never.items() if count[impl] > 1}
    return [row for row in rows if row.impl not in never], [f"{impl}: {reason}" for impl, reason in never.items()]


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
    rows, notes = without_unsupported(rows)
    shapes = [row for row in rows if row.case.partition(" ")[0] in convolutions.NAMES]
    others = [row for row in rows if row not in shapes]
    found = [make(some) for make, some in ((columns, others), (by_shape, shapes)) if some]
    notes += [
        f"{row.case}, {row.dtype}, batch {row.batch}, {'×'.join(map(str, row.shape))}, {row.impl}: {row.status}"
        for row in shapes if row.status != "ok"
    ]  # fmt: skip
    timed = {row.impl for row in shapes if row.status == "ok"}
    if timed & set(PASSES) and (kernels := [impl for impl in ("ours", *OURS) if impl in timed and impl not in PASSES]):
        slower = slower_than_passes(shapes)
        notes += [f"Slower than the passes: {words}" for words in slower] or [f"Nowhere slower than the passes: {', '.join(kernels)}"]
    return found, notes + mean_speed_ups(rows)


def rich_table(found: Sequence[Column], title: str) -> Table:
    """For a console. Texts are folded where there is no room; figures never are."""
    table = Table(title=Text(title), title_justify="left")
    for head, _, figure in found:
        table.add_column(Text(head), justify="right" if figure else "left", no_wrap=figure, overflow="fold")
    for cells in zip(*(texts for _, texts, _ in found), strict=True):
        table.add_row(*map(Text, cells))
    return table


def results_table(rows: Sequence[Row], title: str) -> Table:
    """A line a row, for a console."""
    return rich_table(columns(rows), title)


def _width(column: Column) -> int:
    head, texts, _ = column
    return max(len(line) for text in (head, *texts) for line in text.split("\n"))


def stacked(found: Sequence[Column], width: int) -> tuple[list[list[Column]], str]:
    """(the columns as one table, or as several of at most `width`; what is the same in all lines, which they then leave out).

    Each of several has the columns that name its lines: all texts at the left.
    """
    keys = next((i for i, (_, _, figure) in enumerate(found) if figure), len(found))
    names, figures = list(found[:keys]), list(found[keys:])
    if sum(map(_width, found)) + 3 * len(found) + 1 <= width or not figures:
        return [list(found)], ""
    same = [column for column in (*names, *figures[:2]) if column[0] in SAID_ONCE and len(set(column[1])) == 1]
    words = "".join(f", {head} {texts[0]}" for head, texts, _ in same if len(names) > 1)
    names, figures = ([column for column in some if not words or column not in same] for some in (names, figures))
    # Texts share a half at most, by folding.
    room = width - 1 - min(sum(map(_width, names)) + 3 * len(names), width // 2)
    tables, used = [], room + 1
    for column in figures:
        needed = (_width(column) if column[2] else min(_width(column), room - 3)) + 3
        if used + needed > room:
            tables.append([*names])
            used = 0
        tables[-1].append(column)
        used += needed
    return tables, words


def show(tables: Iterable[Titled], form: str = "table") -> None:
    """Print tables on standard output: for people as wide as the console, or as "csv" or "json" for programs."""
    tables = list(tables)
    if form == "json":
        print(json.dumps([{"title": title, "rows": _records(found)} for title, found in tables], indent=1, ensure_ascii=False))
        return
    if form == "csv":
        for title, found in tables:
            print(f"# {title}".replace("\n", " "))
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow([head.replace("\n", " ") for head, *_ in found])
            writer.writerows(zip(*([_plain(text, figure) for text in texts] for _, texts, figure in found), strict=True))
        return
    out = console()
    for title, found in tables:
        parts, words = stacked(found, out.width)
        for number, part in enumerate(parts):
            out.print(rich_table(part, "" if number else title + words))


def _plain(text: str, figure: bool) -> str:
    return text.replace(",", "") if figure else text


def _records(found: Sequence[Column]) -> list[dict[str, object]]:
    heads = [head.replace("\n", " ") for head, *_ in found]
    cells = [[_value(text) if figure else text for text in texts] for _, texts, figure in found]
    return [dict(zip(heads, line, strict=True)) for line in zip(*cells, strict=True)]


def _value(text: str) -> float | str | None:
    """A figure as a number; what is none stays a text."""
    try:
        return float(text.replace(",", "")) if text else None
    except ValueError:
        return text
