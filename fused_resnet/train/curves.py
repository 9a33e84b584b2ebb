"""The picture of a run: loss, accuracy, learning rate and speed by epoch."""

from itertools import cycle
from pathlib import Path
from typing import Any

from ..files import replace_file

MARKED_EPOCHS = 40  # more points than these run together


def draw_curves(runs: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Writes a PNG (1800×450 pixels) with the curves of runs: their names, and the records of their `metrics.jsonl`.

    Raises ImportError without matplotlib.
    """
    # Drawn on a Figure of its own: pyplot would choose a window system, and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(18, 4.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss, accuracy, rate, speed = figure.subplots(1, 4)
    for (name, history), style in zip(runs.items(), cycle(("-", "--", ":")), strict=False):
        told = f", {name}" if len(runs) > 1 else ""
        epochs = [record["epoch"] for record in history]
        look = {"linestyle": style, "marker": "o" if len(epochs) <= MARKED_EPOCHS else None, "markersize": 4}
        for split, label, color in (("train", "training", "#4c72b0"), ("eval", "evaluation", "#dd8452")):
            loss.plot(epochs, [r[f"{split}_loss"] for r in history], color=color, label=label + told, **look)
            percent = [100 * r[f"{split}_accuracy"] for r in history]
            accuracy.plot(epochs, percent, color=color, label=label + told, **look)
        rate.plot(epochs, [r["lr"] for r in history], color="#8172b3", label=name, **look)
        speed.plot(epochs, [r["images_per_second"] for r in history], color="#55a868", label=name, **look)
    loss.legend(loc="upper right")
    accuracy.legend(loc="lower right")
    for axes in (rate, speed):
        if len(runs) > 1:
            axes.legend()
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax or 1)  # a cosine may end in a rate of 0
    loss.set_ylabel("cross-entropy (nats per image)")
    accuracy.set_ylabel("accuracy (%)")
    rate.set_ylabel("learning rate of the epoch's last step")
    speed.set_ylabel("training speed (images/s)")
    for axes, name in ((loss, "Loss"), (accuracy, "Accuracy"), (rate, "Learning rate"), (speed, "Speed")):
        axes.set_title(name)
        axes.set_xlabel("epoch")
        axes.set_xlim(axes.dataLim.xmin - 0.5, axes.dataLim.xmax + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    replace_file(path, lambda file: canvas.print_png(file))
