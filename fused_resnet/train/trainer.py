"""The training loop: epochs of SGD, an evaluation after each, and the files of a run.

A run's folder holds `checkpoint.pt` (`checkpoint.py`), `metrics.jsonl` (one JSON object an epoch) and `curves.png`; `lock`
while it is trained.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, recompute
from ..data import DataError, DataSet, FolderDataSet, make_loader
from ..files import Locked, locked, replace_file
from .checkpoint import (
    CheckpointError,
    check_history,
    check_model,
    check_optimizer,
    check_rng,
    check_scaler,
    load_checkpoint,
    one_line,
    save_checkpoint,
)
from .config import SettingError, TrainConfig
from .curves import draw_curves
from .optimizer import learning_rate, sgd
from .processes import agree_on_buffers, parallel, rank, total, world
from .progress import EPOCH_HEADER, bar, epoch_line

CHECKPOINT, METRICS, CURVES, LOCK = "checkpoint.pt", "metrics.jsonl", "curves.png", "lock"
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


class FolderError(ValueError):
    """A run's folder holds another run, is another process's, or can't be written. The message names it."""


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context of a forward pass in that precision ("fp32", "bf16", "fp16")."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


class Trainer:
    """A model, its data and its optimizer, between two epochs."""

    def __init__(self, model: nn.Module, data: DataSet | FolderDataSet, config: TrainConfig, device: torch.device):
        """`model` takes float32 [B, data.channels, H, W] and returns logits; it is moved to `device`, in place.

        Among several `processes` each trains on its part of a batch; with `config.sync_bn` `model` gets synchronised batch norms.
        """
        if config.batch_size > len(data.train):
            expected = f"expected at most {len(data.train)}, the images of the training split"
            raise SettingError("batch_size", f"{expected}; got {config.batch_size}")
        if config.batch_size % world():
            raise SettingError("batch_size", f"expected a multiple of the {world()} processes; got {config.batch_size}")
        self.config, self.data, self.device = config, data, device
        self.model = model.to(device, memory_format=torch.channels_last)
        if config.recompute:
            recompute(self.model)
        self.parallel = parallel(self.model, device, config.sync_bn)
        self.optimizer = sgd(model, config, device)
        # Only fp16 has gradients that leave its range.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        part = rank(), world()
        self.train_loader = make_loader(data, data.train, config.batch_size, device, True, config.seed, part)
        self.eval_loader = make_loader(data, data.eval, config.batch_size, device, False, part=part)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []

    def backend(self) -> contextlib.AbstractContextManager:
        """The context of a step: the backend of the settings, or what is in force."""
        return backend(self.config.backend) if self.config.backend else contextlib.nullcontext()

    def step(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One step of SGD. Returns (loss, logits), detached, on the device; nothing waits for a GPU here."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.config.precision):
            logits = self.parallel(images)
        loss = self.criterion(logits.float(), labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), logits.detach()

    def train_epoch(self, progress: bool) -> dict[str, Any]:
        """Trains one epoch. Returns its part of the record; the speed is that of the epoch as a whole.

        Raises `TrainingDiverged`, and `SettingError` for a batch that is too small for a norm.
        """
        self.model.train()
        loader, config = self.train_loader, self.config
        steps, warmup = config.epochs * len(loader), round(config.warmup_epochs * len(loader))
        loss_sum, correct = (torch.zeros((), device=self.device, dtype=torch.float64) for _ in range(2))
        label = f"epoch {self.epoch + 1}/{config.epochs}"
        batches = bar(loader.batches(self.epoch), len(loader), config.batch_size, label, loss_sum, progress and rank() == 0)
        self._synchronize()
        start = time.perf_counter()
        for i, (images, labels) in enumerate(batches):
            lr = learning_rate(self.epoch * len(loader) + i, steps, warmup, config.lr)
            with self.backend(), _batch_blamed(config):
                loss, logits = self.step(images, labels, lr)
            loss_sum += loss
            correct += (logits.argmax(1) == labels).sum()
        total(loss_sum, correct)
        self._synchronize()
        seconds = time.perf_counter() - start
        self.epoch += 1
        images = len(loader) * config.batch_size
        mean_loss = loss_sum.item() / (len(loader) * world())
        if not math.isfinite(mean_loss):
            raise TrainingDiverged(f"the loss of epoch {self.epoch} is {mean_loss}; a lower learning rate may help")
        return {
            "epoch": self.epoch,
            "step": self.epoch * len(loader),
            "lr": lr,
            "train_loss": mean_loss,
            "train_accuracy": correct.item() / images,
            "images_per_second": images / seconds,
            "train_seconds": seconds,
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the evaluation split, with the running statistics."""
        self.model.eval()
        agree_on_buffers(self.model)
        loss_sum, correct, count = (torch.zeros((), device=self.device, dtype=torch.float64) for _ in range(3))
        for images, labels in self.eval_loader.batches(0):
            with self.backend(), autocast(self.device, self.config.precision):
                logits = self.model(images)
            loss_sum += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)  # a folder's corrupt images are not among them
        total(loss_sum, correct, count)
        if not count:
            raise DataError(f"{self.data.name}: expected images to evaluate on; all of them are corrupt")
        mean_loss = loss_sum.item() / count.item()
        if not math.isfinite(mean_loss):
            raise TrainingDiverged(f"the evaluation's loss after epoch {self.epoch} is {mean_loss}")
        return {"eval_loss": mean_loss, "eval_accuracy": correct.item() / count.item()}

    def notes(self) -> list[str]:
        """What the loaders have to say of the epoch before: corrupt images, and waiting."""
        return [*self.train_loader.notes(), *self.eval_loader.notes()]

    def state(self) -> dict[str, Any]:
        """What `save_checkpoint` takes."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        optimizer = self.optimizer.state_dict()
        # A parameter that never had a gradient has none either; that is said, so that a buffer that is missing is noticed.
        for i in (i for group in optimizer["param_groups"] for i in group["params"]):
            optimizer["state"].setdefault(i, {"momentum_buffer": None})
        return {
            "config": asdict(self.config),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over a checkpoint's content, all of it or nothing. On a CPU, with as many threads, the run then ends with
        the same bits as one that was never interrupted. Raises `CheckpointError` where it does not fit."""
        try:
            if not 0 <= state["epoch"] <= self.config.epochs:
                raise ValueError(f"epoch: expected 0 to {self.config.epochs}; got {state['epoch']}")
            check_model(self.model, state["model"])
            optimizer = check_optimizer(self.optimizer, state["optimizer"])
            check_scaler(self.scaler, state["scaler"])
            check_rng(state["rng"])
            check_history(state["history"], state["epoch"])
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(optimizer)
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not fit {self.config.model}: {one_line(error)}") from error
        self.epoch, self.history = state["epoch"], list(state["history"])

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def _batch_blamed(config: TrainConfig) -> Iterator[None]:
    """PyTorch's norms, and ours, refuse to take statistics of one value: of one image whose map is one pixel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        expected = f"expected at least {2 * world()}, 2 for each process, since a norm of {config.model} would see one value a channel"
        raise SettingError("batch_size", f"{expected}; got {config.batch_size}") from error


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

    Of several processes, the first writes and speaks. The folder is locked meanwhile.

    Returns the records of all epochs, those before included. Raises `TrainingDiverged`; `FolderError` where the folder holds
    a run that `trainer` does not go on with, another process trains there, or it can't be written; `CheckpointError` where
    the checkpoint can't be.
    """
    last = trainer.config.epochs if stop_after is None else min(stop_after, trainer.config.epochs)
    if rank() > 0:
        while trainer.epoch < last:
            trainer.history.append({**trainer.train_epoch(False), **trainer.evaluate()})
        return trainer.history
    if trainer.epoch < last:
        say(EPOCH_HEADER)
    for record in epochs(trainer, folder, last, progress):
        say(epoch_line(record, trainer.config.epochs))
        for note in trainer.notes():
            say(note)
    return trainer.history


def epochs(trainer: Trainer, folder: Path, last: int, progress: bool) -> Iterator[dict[str, Any]]:
    """What `run` does in the process that writes, epoch by epoch: yields the record of each once its files are written.

    The folder is locked from the first epoch until this ends or is closed.
    """
    with contextlib.ExitStack() as held:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / LOCK, wait=False))
            _check_folder(trainer, folder)
            # Written anew from the checkpoint: what an interruption left between the two is mended.
            replace_file(folder / METRICS, lambda file: file.writelines(_line(record) for record in trainer.history))
        try:
            while trainer.epoch < last:
                record = {**trainer.train_epoch(progress), **trainer.evaluate()}
                trainer.history.append(record)
                # The checkpoint first: of an epoch that has a line, there is one.
                save_checkpoint(folder / CHECKPOINT, trainer.state())
                with _writing(folder), (folder / METRICS).open("ab") as file:
                    file.write(_line(record))
                yield record
        finally:
            # An interrupted run has a picture too. Without matplotlib there is none.
            if trainer.history:
                with contextlib.suppress(ImportError), _writing(folder):
                    title = f"{trainer.config.model} on {trainer.config.data}, {trainer.config.precision}"
                    draw_curves({trainer.config.model: trainer.history}, title, folder / CURVES)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except Locked as error:
        raise FolderError(f"{folder}: a run is being trained there ({error})") from error
    except (FolderError, CheckpointError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that can't be one
        raise FolderError(f"{folder}: it can't be written: {one_line(error)}") from error


def _check_folder(trainer: Trainer, folder: Path) -> None:
    """Raises `FolderError` where the folder holds a run, unless it is the one that `trainer` goes on with, and as far as it got."""
    path, metrics = folder / CHECKPOINT, folder / METRICS
    if path.exists():
        kept = load_checkpoint(path)
        if kept["history"] != trainer.history:
            goes_on = f"or one that goes on from there: `--resume {folder}`, in Python `Trainer.load_state`"
            raise FolderError(f"{folder}: expected a folder without a run, {goes_on}; it has {kept['epoch']} epochs of a run")
    elif metrics.exists() and metrics.stat().st_size:
        raise FolderError(f"{folder}: expected a folder without a run; it has a {METRICS} without a {CHECKPOINT}")


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
