"""Checkpoints: everything that the next epoch depends on, in one file that is replaced whole.

The file is PyTorch's own (torch.save), a dict of plain values and tensors that loads with `weights_only=True`:

| key | value |
|---|---|
| format, version | "fused_resnet.train", 1 |
| config | the settings (`TrainConfig`) as a dict |
| epoch | epochs done |
| model, optimizer, scaler | their state_dicts; the schedule follows from the epoch |
| rng | "cpu" and, on a GPU, "cuda": the generators' states. Batches draw from generators of their own |
| history | the records of `metrics.jsonl` so far |
"""

from pathlib import Path
from typing import Any

import torch

from ..files import replace_file

FORMAT, VERSION = "fused_resnet.train", 1
KEYS = ("config", "epoch", "model", "optimizer", "scaler", "rng", "history")


class CheckpointError(ValueError):
    """A checkpoint can't be read, written or used. The message names the file, or the network that it does not fit."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (the keys `KEYS`) beside `path`, then renames: a failure leaves an older checkpoint as it was.

    Raises `CheckpointError` where the file can't be written.
    """
    content = {"format": FORMAT, "version": VERSION, **state}
    try:
        replace_file(path, lambda file: torch.save(content, file))
    # torch.save reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        kept = "; the one that was there is kept" if path.exists() else ""
        raise CheckpointError(f"{path}: the checkpoint could not be written: {_first_line(error)}{kept}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Raises `CheckpointError` where it is missing, damaged or foreign."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a checkpoint of `fused-resnet train`") from None
    # A damaged file can raise nearly anything: flipped bytes gave IndexError, AttributeError and AssertionError too.
    except Exception as error:
        raise CheckpointError(
            f"{path}: truncated, or not a checkpoint of `fused-resnet train` ({_first_line(error)})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a file of PyTorch, but not a checkpoint of `fused-resnet train`")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION} of the format; got {content.get('version')!r}")
    if missing := [key for key in KEYS if key not in content]:
        raise CheckpointError(f"{path}: a checkpoint without {', '.join(missing)}")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
