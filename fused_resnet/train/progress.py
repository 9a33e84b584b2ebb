"""What a run tells while it goes on: a bar on a terminal, and one line an epoch everywhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

REFRESH_SECONDS = 0.25  # reading a loss waits for the GPU, so it is done seldom


def bar(batches: Iterable, first: int, total: int, batch_size: int, label: str, loss: Tensor, enabled: bool) -> Iterator:
    """Yields from `batches`, with a bar of images/s and the mean of `loss` so far, where stderr is a terminal.

    `first` of the `total` batches were done before. `loss` is a scalar on any device, the sum over the batches done; the caller adds
    to it in place. Without the package rich, or with `enabled` False, there is no bar.
    """
    if not (enabled and sys.stderr.isatty()):
        yield from batches
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield from batches
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    start = shown = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total, completed=first, state="")
        for done, batch in enumerate(batches, start=first + 1):
            yield batch
            now = time.perf_counter()
            if now - shown >= REFRESH_SECONDS or done == total:
                shown = now
                state = f"loss {loss_text(loss.item() / done)}  {(done - first) * batch_size / (now - start):,.0f} images/s"
                progress.update(task, completed=done, state=state)


EPOCH_HEADER = f"{'epoch':>9}{'training loss':>16}{'accuracy':>11}{'evaluation loss':>18}{'accuracy':>11}{'images/s':>12}"


LONGEST_PLAIN = 1e6  # a larger loss is written with an exponent, or it would not fit its column


def loss_text(loss: float) -> str:
    """A loss for people: four places behind the point."""
    return f"{loss:.4f}" if abs(loss) < LONGEST_PLAIN else f"{loss:.4e}"


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One epoch's record of `metrics.jsonl` for people, in the columns of `EPOCH_HEADER`."""
    epoch = f"{record['epoch']}/{epochs}"
    return (
        f"{epoch:>9}"
        f"{loss_text(record['train_loss']):>16}{100 * record['train_accuracy']:>10.2f}%"
        f"{loss_text(record['eval_loss']):>18}{100 * record['eval_accuracy']:>10.2f}%"
        f"{record['images_per_second']:>12,.0f}"
    )
