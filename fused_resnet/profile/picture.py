"""A profile as a picture, PNG: roofline, time by layer, memory."""

from collections.abc import Sequence
from pathlib import Path

from ..files import replace_file
from .analysis import Profile
from .record import PHASES

#: Okabe and Ito's: blue, vermilion, green.
COLOURS = dict(zip(PHASES, ("#0072B2", "#D55E00", "#009E73"), strict=True))
MARKERS, STYLES, HATCHES = "os", ("-", "--"), (None, "///")


def draw_profiles(profiles: Sequence[Profile], path: Path) -> None:
    """Write the PNG of one profile, or of two: A's marks are round and its bars plain, B's are square and hatched."""
    # Drawn on a Figure of its own: pyplot would choose a window system, and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for p in profiles for name in p.layers()))
    figure = Figure(figsize=(14, max(7, 0.24 * len(names) * len(profiles) + 2)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.1))
    _roofline(figure.add_subplot(grid[0, 0]), profiles)
    _memory(figure.add_subplot(grid[1, 0]), profiles)
    _bars(figure.add_subplot(grid[:, 1]), profiles, names)
    where = profiles[0].meta.device
    note = ": times of a CPU say nothing about a GPU" if where == "cpu" else ""
    letters = ["A: ", "B: "] if len(profiles) > 1 else [""]
    words = [
        f"{letter}{p.model}, {p.impl}, {p.dtype}, batch {p.batch}, {p.step_ms:.4g} ms a step"
        for letter, p in zip(letters, profiles, strict=True)
    ]
    figure.suptitle("\n".join([*words, where + note]))
    replace_file(path, lambda file: canvas.print_png(file))


def _roofline(axes, profiles: Sequence[Profile]) -> None:
    for run, p in enumerate(profiles):
        letter = f"{'AB'[run]} " if len(profiles) > 1 else ""
        for phase in PHASES[:2]:
            parts = [part for part in p.parts if part.phase == phase and part.tflops and part.bytes]
            axes.loglog(
                [part.flops / part.bytes for part in parts], [part.tflops for part in parts], MARKERS[run], color=COLOURS[phase],
                alpha=0.75, markersize=6, label=letter + phase,
            )  # fmt: skip
    low, high = axes.get_xlim()
    for run, p in enumerate(profiles):
        ridge = p.flops_per_s / p.bytes_per_s
        ends = (low, ridge, max(high, 2 * ridge))
        axes.loglog(ends, [min(p.flops_per_s, x * p.bytes_per_s) / 1e12 for x in ends], STYLES[run], color="black", linewidth=1.5)
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")
    axes.set_ylabel("rate (TFLOP/s)")
    axes.set_title("Roofline, by layer")
    axes.grid(alpha=0.3)
    axes.legend()


def _memory(axes, profiles: Sequence[Profile]) -> None:
    for run, (p, colour) in enumerate(zip(profiles, COLOURS.values(), strict=False)):
        axes.plot([at for at, _ in p.memory], [level / 1e6 for _, level in p.memory], STYLES[run], color=colour, drawstyle="steps-post",
                  label=f"{'AB'[run]}: {p.impl}" if len(profiles) > 1 else p.impl)  # fmt: skip
    axes.set_xlabel("time (ms, with the profiler)")
    axes.set_ylabel("allocated (MB)" if profiles[0].memory_from_zero else "allocated beyond before (MB)")
    axes.set_title("Memory")
    axes.grid(alpha=0.3)
    axes.legend()


def _bars(axes, profiles: Sequence[Profile], names: list[str]) -> None:
    thick = 0.8 / len(profiles)
    for run, p in enumerate(profiles):
        at = [row - 0.4 + thick * (run + 0.5) for row in range(len(names))]
        begin = [0.0] * len(names)
        layers = p.layers()
        for phase in PHASES:
            times = [layers[name][phase].ms if phase in layers.get(name, {}) else 0.0 for name in names]
            axes.barh(at, times, thick, begin, color=COLOURS[phase], hatch=HATCHES[run], edgecolor="white", linewidth=0.3,
                      label=f"{'AB'[run] + ' ' if len(profiles) > 1 else ''}{phase}")  # fmt: skip
            begin = [a + b for a, b in zip(begin, times, strict=True)]
        floors = [sum(part.floor_ms for part in layers.get(name, {}).values()) for name in names]
        axes.scatter(floors, at, marker="|", s=60, color="black", zorder=3, label="floor" if run == 0 else None)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    ends = [sum(getattr(part, what) for part in layer.values())
            for p in profiles for layer in p.layers().values() for what in ("ms", "floor_ms")]  # fmt: skip
    axes.set_xlim(0, 1.05 * max(ends))
    axes.set_xlabel("time in one training step (ms)")
    axes.set_title("Time by layer")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
