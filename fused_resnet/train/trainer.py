"""The training loop: epochs of SGD, an evaluation after each, and the files of a run.

A run's folder holds `checkpoint.pt` (`checkpoint.py`), `metrics.jsonl` (one JSON object an epoch) and `curves.png`.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import DataSet, Loader
from ..files import replace_file
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .config import SettingError, TrainConfig
from .curves import draw_curves
from .optimizer import learning_rate, sgd
from .processes import agree_on_buffers, parallel, rank, total, world
from .progress import EPOCH_HEADER, bar, epoch_line

CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.jsonl", "curves.png"
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context of a forward pass in that precision ("fp32", "bf16", "fp16")."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


class Trainer:
    """A model, its data and its optimizer, between two epochs."""

    def __init__(self, model: nn.Module, data: DataSet, config: TrainConfig, device: torch.device):
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
        self.parallel = parallel(self.model, device, config.sync_bn)
        self.optimizer = sgd(model, config, device)
        # Only fp16 has gradients that leave its range.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        part = rank(), world()
        self.train_loader = Loader(data, data.train, config.batch_size, device, True, config.seed, part)
        self.eval_loader = Loader(data, data.eval, config.batch_size, device, False, part=part)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []

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
        """Trains one epoch. Returns its part of the record; the speed is that of the epoch as a whole."""
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
        loss_sum, correct = (torch.zeros((), device=self.device, dtype=torch.float64) for _ in range(2))
        for images, labels in self.eval_loader.batches(0):
            with autocast(self.device, self.config.precision):
                logits = self.model(images)
            loss_sum += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
        total(loss_sum, correct)
        count = len(self.data.eval)
        mean_loss = loss_sum.item() / count
        if not math.isfinite(mean_loss):
            raise TrainingDiverged(f"the evaluation's loss after epoch {self.epoch} is {mean_loss}")
        return {"eval_loss": mean_loss, "eval_accuracy": correct.item() / count}

    def state(self) -> dict[str, Any]:
        """What `save_checkpoint` takes."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "config": asdict(self.config),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over a checkpoint's content. On a CPU, with as many threads, the run then ends with the same bits as one
        that was never interrupted. Raises `CheckpointError` where it belongs to another network."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.history = state["epoch"], list(state["history"])
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"the checkpoint does not fit {self.config.model}: {reason}") from error

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def resumable(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings and the state in a run's folder. Raises `CheckpointError`."""
    path = folder / CHECKPOINT
    state = load_checkpoint(path)
    try:
        return TrainConfig(**state["config"]), state
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its settings can't be used ({error})") from error


def run(
    trainer: Trainer,
    folder: Path,
    stop_after: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = partial(print, flush=True),  # noqa: B008 — at once also into a pipe or a log
) -> list[dict[str, Any]]:
    """Trains from where `trainer` is up to the last epoch, or `stop_after`, and writes the run's files after each.

    Of several processes, the first writes and speaks.

    Returns the records of all epochs, those before included. Raises `TrainingDiverged`; `CheckpointError` or OSError
    where a file can't be written.
    """
    config, first = trainer.config, rank() == 0
    folder.mkdir(parents=True, exist_ok=True)
    # Written anew from the checkpoint: an epoch that was interrupted after its line leaves no second one behind.
    if first:
        replace_file(folder / METRICS, lambda file: file.writelines(_line(record) for record in trainer.history))
    last = config.epochs if stop_after is None else min(stop_after, config.epochs)
    if first and trainer.epoch < last:
        say(EPOCH_HEADER)
    try:
        while trainer.epoch < last:
            record = {**trainer.train_epoch(progress), **trainer.evaluate()}
            trainer.history.append(record)
            if not first:
                continue
            with (folder / METRICS).open("ab") as file:
                file.write(_line(record))
            save_checkpoint(folder / CHECKPOINT, trainer.state())
            say(epoch_line(record, config.epochs))
    finally:
        # An interrupted run has a picture too. Without matplotlib there is none.
        if first and trainer.history:
            with contextlib.suppress(ImportError):
                title = f"{config.model} on {config.data}, {config.precision}"
                draw_curves({config.model: trainer.history}, title, folder / CURVES)
    return trainer.history


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
