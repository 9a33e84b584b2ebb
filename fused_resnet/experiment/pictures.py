"""The pictures of both experiments, drawn once: as PNG files, and as SVG inside the page."""

import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import replace_file
from .findings import ERRORS, Ended
from .vanishing import Case, Seen

#: Okabe and Ito's, by depth from the shallowest: the colour-blind tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
#: By family: what has no shortcut is dashed everywhere.
STYLES = {"plain": "--", "resnet": "-"}
#: Of untrained networks: with batch norm, and without.
NORM_COLOURS = {True: "#0072B2", False: "#D55E00"}
PANEL = (4.6, 3.6)  # inches
FAINT = 0.3  # a single seed beside their mean


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    canvas = FigureCanvasAgg(figure)
    replace_file(path, lambda file: canvas.print_png(file))


def as_svg(figure: Figure) -> bytes:
    """The same as SVG, whose texts stay texts."""
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def _panels(rows: int, columns: int, **shared) -> tuple[Figure, list[list]]:
    # A Figure of its own: pyplot would choose a window system, and keep every figure alive.
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), dpi=100, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).tolist()


def draw_errors(found: Ended) -> Figure:
    """Errors by epoch, training above test, plain beside residual: the paper's figures 1 and 6."""
    figure, panels = _panels(2, 2, sharex=True, sharey="row")
    for row, (which, error) in enumerate(ERRORS.items()):
        for column, (family, title) in enumerate((("plain", "plain networks"), ("resnet", "residual networks"))):
            axes = panels[row][column]
            for depth, colour in zip(found.plan.depths, COLOURS, strict=False):
                curves = [[error(record) for record in outcome.records] for outcome in found.outcomes[f"{family}{depth}"]]
                _bundle(axes, range(1, found.plan.settings.epochs + 1), curves, colour, STYLES[family], f"{family}{depth}")
            axes.set_title(f"{which} error, {title}")
            axes.set_ylabel(f"{which} error (%)")
            axes.tick_params(labelleft=True, labelbottom=True)
            _finish(axes, "epoch")
        panels[row][0].set_ylim(bottom=0)  # once all curves are there: the row shares its scale
    return _explained(figure, [panels[0][0], panels[0][1]])


def draw_gradients(found: Ended) -> Figure:
    """Gradient norms of the convolutions' weights by depth: start, middle, end."""
    moments = found.plan.moments
    figure, panels = _panels(1, len(moments), sharey=True)
    for axes, (moment, epoch) in zip(panels[0], moments.items(), strict=True):
        for network, colour, style in _networks(found):
            curves = [outcome.probes[epoch].weights for outcome in found.outcomes[network]]
            _bundle(axes, None, curves, colour, style, network)
        axes.set_title(f"{moment}: after {epoch} epoch{'s' * (epoch != 1)}")
        axes.set_yscale("log")
        axes.set_ylabel("norm of the weight's gradient")
        axes.tick_params(labelleft=True)
        _finish(axes, "convolution, from the images on")
    return _explained(figure, panels[0][:1])


def draw_responses(found: Ended) -> Figure:
    """Standard deviations of layers' responses at the end, by layer and sorted: the paper's figure 7."""
    figure, panels = _panels(1, 2, sharey=True)
    epoch = found.plan.moments["end"]
    for axes, arranged, title in ((panels[0][0], list, "by layer"), (panels[0][1], _falling, "sorted by size")):
        for network, colour, style in _networks(found):
            curves = [arranged(outcome.probes[epoch].responses) for outcome in found.outcomes[network]]
            _bundle(axes, None, curves, colour, style, network)
        axes.set_title(f"responses at the end, {title}")
        axes.set_ylabel("standard deviation behind batch norm")
        axes.tick_params(labelleft=True)
        _finish(axes, "convolution, from the images on" if arranged is list else "rank, the largest first")
    panels[0][0].set_ylim(bottom=0)
    return _explained(figure, panels[0][:1])


def _falling(values: Sequence[float]) -> list[float]:
    return sorted(values, reverse=True)


def _networks(found: Ended) -> list[tuple[str, str, str]]:
    """(name, colour, style) of each network that has a finished run."""
    looks = [
        (f"{family}{depth}", colour, style)
        for depth, colour in zip(found.plan.depths, COLOURS, strict=False)
        for family, style in STYLES.items()
    ]
    return [look for look in looks if found.outcomes[look[0]]]


def draw_vanishing(seen: Sequence[Seen], init: str) -> Figure:
    """Untrained networks from one initialisation: gradients of responses above, of weights below, a column a depth."""
    depths = sorted({s.case.depth for s in seen})
    figure, panels = _panels(2, len(depths), sharex="col")
    rows: tuple[tuple[str, Callable[[Seen], Sequence[float]]], ...] = (
        ("norm of the response's gradient", lambda s: s.probe.outputs), ("norm of the weight's gradient", lambda s: s.probe.weights),
    )  # fmt: skip
    for row, (words, curve) in enumerate(rows):
        for axes, depth in zip(panels[row], depths, strict=True):
            for family, style in STYLES.items():
                for norm, colour in NORM_COLOURS.items():
                    case = Case(depth, family == "resnet", norm, init)
                    curves = [curve(s) for s in seen if s.case == case]
                    _bundle(axes, None, curves, colour, style, case.words)
            axes.set_title(f"{depth} layers")
            axes.set_yscale("log")
            axes.set_ylabel(words)
            axes.tick_params(labelbottom=True)
            _finish(axes, "convolution, from the images on")
    return _explained(figure, panels[0][:1])


def _bundle(axes, at: Sequence[float] | None, curves: Sequence[Sequence[float]], colour: str, style: str, label: str) -> None:
    """A faint line a seed, and their mean; nothing where there is no seed."""
    if not curves:
        return
    at = range(1, len(curves[0]) + 1) if at is None else at
    if len(curves) > 1:
        for curve in curves:
            axes.plot(at, curve, style, color=colour, linewidth=0.8, alpha=FAINT)
    mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    axes.plot(at, mean, style, color=colour, linewidth=1.8, label=label, marker="o" if len(mean) == 1 else None)


def _finish(axes, words: str) -> None:
    axes.set_xlabel(words)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _explained(figure: Figure, panels: Sequence) -> Figure:
    """The figure with one legend below, where it hides no curve, of the lines in these panels."""
    lines = [line for axes in panels for line in axes.get_legend_handles_labels()[0]]
    if lines:
        figure.legend(handles=lines, loc="outside lower center", ncols=4)
    return figure
