"""A picture of a file of figures: implementations side by side, a panel a case."""

from collections.abc import Sequence
from pathlib import Path

from ..files import replace_file
from .schema import Results, Row

#: Okabe and Ito's colours, which the colour-blind tell apart, but for the yellow, which is pale on white. There are more markers than
#: colours, so that no two implementations of a picture have both in common.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "oDs^vPX*<"
#: What a row is drawn by, the first that it has: (field, words on the axis).
FIGURES = (
    ("copy_fraction", "fraction of a device-to-device copy's bandwidth"),
    ("images_per_s", "images/s"),
    ("roofline_fraction", "fraction of the floor's speed"),
    ("median_ms", "median time (ms)"),
)


def plot_results(results: Results, path: Path) -> None:
    """Write a PNG: a line a case and shape, a marker an implementation, with the span from the 10th to the 90th percentile.

    Rows without figures are left out. Raises ValueError where there is nothing to draw.
    """
    # Drawn on a Figure of its own: pyplot would choose a window system, and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results.rows if row.status == "ok" and ":first_step" not in row.case and row.shape]
    if not rows:
        raise ValueError("rows: expected one that is ok; there is nothing to draw")
    field, words = next((f, w) for f, w in FIGURES if all(getattr(row, f) is not None for row in rows))
    lines = list(dict.fromkeys(_line(row) for row in rows))
    implementations = list(dict.fromkeys(row.impl for row in rows))
    figure = Figure(figsize=(11, 1.6 + 0.3 * len(lines)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, impl in enumerate(implementations):
        own = [row for row in rows if row.impl == impl]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        values = [getattr(row, field) for row in own]
        axes.errorbar(
            values, [lines.index(_line(row)) for row in own], xerr=_spans(own, field), linestyle="none", markersize=7, alpha=0.9,
            color=colour, marker=marker, label=impl,
        )  # fmt: skip
    axes.set_yticks(range(len(lines)), lines)
    axes.invert_yaxis()
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(words)
    axes.grid(alpha=0.3)
    if field in ("copy_fraction", "roofline_fraction"):
        axes.axvline(1, color="#555555", linewidth=1)
    figure.legend(loc="outside lower center", ncols=min(6, len(implementations)))
    note = ", by the wall clock: no figure of a GPU" if results.meta.device == "cpu" else ""
    figure.suptitle(f"{rows[0].suite}, {rows[0].dtype}, {results.meta.device}{note}")
    replace_file(path, lambda file: canvas.print_png(file))


def _line(row: Row) -> str:
    return f"{row.case}  {row.batch} x " + "x".join(map(str, row.shape or ()))


def _spans(rows: Sequence[Row], field: str) -> list[list[float]]:
    """How far each value's percentiles lie below and above it. A rate is the larger the shorter the time."""
    below, above = [], []
    for row in rows:
        value = getattr(row, field)
        low, high = value * row.p10_ms / row.median_ms, value * row.p90_ms / row.median_ms
        if field != "median_ms":
            low, high = value * row.median_ms / row.p90_ms, value * row.median_ms / max(row.p10_ms, 1e-9)
        below.append(value - low)
        above.append(high - value)
    return [below, above]
