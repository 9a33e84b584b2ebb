"""A run's metrics as TensorBoard reads them. The package tensorboard is imported only when asked for."""

from pathlib import Path
from typing import Any

EVENTS = "tensorboard"  # the folder within a run's
#: Field of a record -> its name in TensorBoard.
SCALARS = {
    "train_loss": "loss/train", "eval_loss": "loss/eval", "train_accuracy": "accuracy/train", "eval_accuracy": "accuracy/eval",
    "eval_top5_accuracy": "accuracy/eval top-5", "lr": "learning rate", "images_per_second": "images per second",
    "peak_memory_bytes": "peak memory, bytes",
}  # fmt: skip


class EventsError(RuntimeError):
    """TensorBoard's package is not installed."""


def why_not() -> str | None:
    """Why no events can be written here; None where they can."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        return f"{error.name or error} is not installed: pip install 'fused-resnet[tensorboard]'"
    return None


class Events:
    """The files of events of a run. All of its records are in them, none twice: they are written anew whenever the run goes on."""

    def __init__(self, folder: Path, history: list[dict[str, Any]]):
        """`folder`: the run's. Raises `EventsError`, and OSError where it can't be written."""
        if reason := why_not():
            raise EventsError(reason)
        from torch.utils.tensorboard import SummaryWriter

        for path in (folder / EVENTS).glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = SummaryWriter(folder / EVENTS)
        for record in history:
            self._add(record)
        self._writer.flush()

    def write(self, record: dict[str, Any]) -> None:
        """Adds one epoch's record; it is in the file when this returns."""
        self._add(record)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _add(self, record: dict[str, Any]) -> None:
        for field, name in SCALARS.items():
            self._writer.add_scalar(name, record[field], record["epoch"], walltime=record["ended"])
