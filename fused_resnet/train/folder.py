"""A run and its folder, which holds

| file | |
|---|---|
| `checkpoint.pt` | the last checkpoint (`checkpoint.py`) |
| `best.pt`, `checkpoint-EPOCH.pt` | that of the epoch with the highest accuracy, and of the last epochs; whole files of their own |
| `metrics.jsonl` | one JSON object an epoch; the same in `tensorboard/`, where that is asked for |
| `summary.json`, `curves.png` | what it came to so far |
| `lock` | while it is trained |
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..files import Locked, link_file, locked, replace_file
from .checkpoint import CheckpointError, load_checkpoint, one_line, save_checkpoint
from .config import SettingError, TrainConfig
from .curves import draw_curves
from .events import Events, EventsError
from .processes import rank, world
from .progress import EPOCH_HEADER, epoch_line
from .stop import LEAVE, NOTHING, Pauses, Stop, stoppable
from .summary import best_epoch, summarised
from .trainer import Trainer, TrainingDiverged

CHECKPOINT, BEST, METRICS, SUMMARY, CURVES, LOCK = "checkpoint.pt", "best.pt", "metrics.jsonl", "summary.json", "curves.png", "lock"
UNFINISHED = re.compile(r"(checkpoint(-\d+)?\.pt|best\.pt|metrics\.jsonl|summary\.json|curves\.png)\.[0-9a-f]{32}\.part")
KEPT = re.compile(r"checkpoint-(\d+)\.pt")


class FolderError(ValueError):
    """A run's folder holds another run, is another process's, or can't be written. The message names it."""


def resumable(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings and the state in a run's folder, or in a checkpoint's file. Raises `CheckpointError`."""
    if not path.is_file():
        path = path / CHECKPOINT
    state = load_checkpoint(path)
    try:
        return TrainConfig(**state["config"]), state
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its settings can't be used ({one_line(error)})") from error


def run(
    trainer: Trainer,
    folder: Path,
    stop_after: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = partial(print, flush=True),  # noqa: B008 — at once also into a pipe or a log
) -> list[dict[str, Any]]:
    """Trains from where `trainer` is up to the last epoch, or `stop_after`, and writes the run's files after each.

    Of several processes, the first writes and speaks. The folder is locked meanwhile. At Ctrl-C or SIGTERM the run saves and leaves: it
    raises `Stopped`, a KeyboardInterrupt; at a second one it leaves at once.

    Returns the records of all epochs, those before included. Raises `TrainingDiverged`; `FolderError` where the folder holds
    a run that `trainer` does not go on with, another process trains there, or it can't be written; `CheckpointError` where
    the checkpoint can't be.
    """
    last = trainer.config.epochs if stop_after is None else min(stop_after, trainer.config.epochs)
    speaks = rank() == 0
    if trainer.epoch < last and speaks:
        say(EPOCH_HEADER)
    with stoppable() as stop, contextlib.closing(epochs(trainer, folder, last, progress, stop)) as records:
        for record in records:
            for line in (epoch_line(record, trainer.config.epochs), *trainer.notes()) if speaks else ():
                say(line)
    return trainer.history


def epochs(trainer: Trainer, folder: Path, last: int, progress: bool, stop: Stop | None = None) -> Iterator[dict[str, Any]]:
    """What `run` does, epoch by epoch: yields the record of each once its files are written. Of several processes the first writes.

    The folder is locked from the first epoch until this ends or is closed. Raises `Stopped` where `stop` asks for it.
    """
    pauses = Pauses(trainer.config.checkpoint_minutes, stop)

    def pause(step: int, steps: int) -> None:
        wish = pauses.asked(step, steps)
        if wish != NOTHING:
            _save_within(trainer, folder)
            pauses.saved()
        if wish == LEAVE:
            raise pauses.stopped()

    def evaluating() -> None:
        # Of several processes each has its own number of batches here: they leave together, after the evaluation.
        if pauses.stop.signal and world() == 1:
            _save_within(trainer, folder)
            raise pauses.stopped()

    with contextlib.ExitStack() as held:
        files = held.enter_context(_opened(trainer, folder)) if rank() == 0 else None
        while trainer.epoch < last:
            record = trainer.run_epoch(progress, pause, evaluating)
            state = trainer.state()
            if files is not None:
                # The checkpoint first: of an epoch that has a line, there is one.
                save_checkpoint(folder / CHECKPOINT, state)
                with _writing(folder):
                    _keep(trainer, folder)
                    files.write(record)
            pauses.saved()
            yield record
            if trainer.epoch < last and pauses.leaves():
                raise pauses.stopped()


def _save_within(trainer: Trainer, folder: Path) -> None:
    """Writes the checkpoint of an epoch that is under way. One whose loss is no number does not replace an older one."""
    state = trainer.state()
    if not all(map(math.isfinite, state["partial"]["loss_sum"])):
        raise TrainingDiverged(f"the loss of epoch {trainer.epoch + 1} is no number; a lower learning rate may help")
    if rank() == 0:
        save_checkpoint(folder / CHECKPOINT, state)


class _Files:
    """The files that get each epoch's record."""

    def __init__(self, folder: Path, history: list[dict[str, Any]], tensorboard: bool):
        # Written anew from the checkpoint: what an interruption left between the two is mended.
        replace_file(folder / METRICS, lambda file: file.writelines(_line(record) for record in history))
        self._metrics, self._events = folder / METRICS, Events(folder, history) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        with self._metrics.open("ab") as file:
            file.write(_line(record))
        if self._events:
            self._events.write(record)

    def close(self) -> None:
        if self._events:
            self._events.close()


@contextlib.contextmanager
def _opened(trainer: Trainer, folder: Path) -> Iterator[_Files]:
    """A run's folder, locked, with its files as the trainer's history has them. At the end it gets a summary and a picture."""
    config = trainer.config
    with contextlib.ExitStack() as held:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / LOCK, wait=False))
            _check_folder(trainer, folder)
            for path in folder.iterdir():
                if UNFINISHED.fullmatch(path.name):  # of a killed process; the lock says that none writes
                    path.unlink(missing_ok=True)
            _keep(trainer, folder)
            files = held.enter_context(contextlib.closing(_Files(folder, trainer.history, config.tensorboard)))
        try:
            yield files
        finally:
            # An interrupted run has them too. Without matplotlib there is no picture.
            if trainer.history:
                with _writing(folder):
                    content = json.dumps(summarised(trainer.history, config.target_accuracy), indent=1).encode() + b"\n"
                    replace_file(folder / SUMMARY, lambda file: file.write(content))
                with contextlib.suppress(ImportError), _writing(folder):
                    title = f"{config.model} on {config.data}, {config.precision}"
                    draw_curves({config.model: trainer.history}, title, folder / CURVES)


def _keep(trainer: Trainer, folder: Path) -> None:
    """Gives the checkpoint of the epoch that has just ended the further names that it is due, and removes what is no longer kept.

    It is done again where the run goes on from there: a kill may have come between.
    """
    if trainer.batch or not trainer.history or not (folder / CHECKPOINT).exists():
        return
    if best_epoch(trainer.history) == trainer.epoch:
        link_file(folder / CHECKPOINT, folder / BEST)
    if trainer.config.keep:
        link_file(folder / CHECKPOINT, folder / f"checkpoint-{trainer.epoch}.pt")
    for path in folder.iterdir():
        if (found := KEPT.fullmatch(path.name)) and int(found[1]) <= trainer.epoch - trainer.config.keep:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except Locked as error:
        raise FolderError(f"{folder}: a run is being trained there ({error})") from error
    except (FolderError, CheckpointError):
        raise
    except EventsError as error:
        raise SettingError("tensorboard", str(error)) from error
    except (OSError, ValueError) as error:  # ValueError: a name that can't be one
        raise FolderError(f"{folder}: it can't be written: {one_line(error)}") from error


def _check_folder(trainer: Trainer, folder: Path) -> None:
    """Raises `FolderError` where the folder holds a run, unless it is the one that `trainer` goes on with, and as far as it got."""
    path, metrics = folder / CHECKPOINT, folder / METRICS
    if path.exists():
        kept = load_checkpoint(path)
        batch = kept["partial"].get("batch")
        if (kept["history"], batch) != (trainer.history, trainer.batch):
            goes_on = f"or one that goes on from there: `--resume {folder}`, in Python `Trainer.load_state`"
            there = f"{kept['epoch']} epochs{f' and {batch} steps' if batch else ''} of a run"
            raise FolderError(f"{folder}: expected a folder without a run, {goes_on}; it has {there}")
    elif metrics.exists() and metrics.stat().st_size:
        raise FolderError(f"{folder}: expected a folder without a run; it has a {METRICS} without a {CHECKPOINT}")


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
