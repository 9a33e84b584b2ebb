"""The training loop: epochs of steps, an evaluation after each."""

import contextlib
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, recompute
from ..data import DataSet, FolderDataSet, describe, make_loader
from .augment import BatchAugmentation
from .average import moving_average
from .checkpoint import (
    CheckpointError,
    check_average,
    check_history,
    check_model,
    check_optimizer,
    check_partial,
    check_rng,
    check_scaler,
    one_line,
)
from .config import SettingError, TrainConfig
from .evaluation import evaluate
from .graphs import graphed
from .optimizer import learning_rate, make_optimizer, zero_gammas
from .precision import autocast
from .processes import agree_on_buffers, gathered, parallel, rank, total, world
from .progress import bar


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


class Trainer:
    """A model, its data and its optimizer, between two steps."""

    def __init__(self, model: nn.Module, data: DataSet | FolderDataSet, config: TrainConfig, device: torch.device):
        """`model` takes float32 [B, data.channels, H, W] and returns logits; it is moved to `device`, in place.

        Among several `processes` each trains on its part of a batch; with `config.sync_bn` `model` gets synchronised batch norms.
        """
        if config.batch_size > len(data.train):
            expected = f"expected at most {len(data.train)}, the images of the training split"
            raise SettingError("batch_size", f"{expected}; got {config.batch_size}")
        if config.batch_size % (world() * config.accumulate):
            parts = f" and of the {config.accumulate} parts that are accumulated" if config.accumulate > 1 else ""
            raise SettingError("batch_size", f"expected a multiple of the {world()} processes{parts}; got {config.batch_size}")
        if config.cuda_graph and (device.type != "cuda" or world() > 1):
            raise SettingError("cuda_graph", f"expected one process with a GPU; got {world()} with {device.type}")
        self.config, self.data, self.device = config, data, device
        self.model = model.to(device, memory_format=torch.channels_last)
        if config.recompute:
            recompute(self.model)
        if config.zero_gamma:
            zero_gammas(self.model)
        self.ema = moving_average(self.model, config.ema) if config.ema else None
        self.parallel = self._made(parallel(self.model, device, config.sync_bn))
        self.optimizer = make_optimizer(model, config, device)
        # Only fp16 has gradients that leave its range.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        part = rank(), world()
        self.train_loader = make_loader(data, data.train, config.batch_size, device, True, config.seed, part)
        self.eval_loader = make_loader(data, data.eval, config.batch_size, device, False, part=part)
        self.augment = BatchAugmentation(config, len(data.classes), rank())
        self.epoch = 0  #: epochs done
        self.history: list[dict[str, Any]] = []
        self._begin_epoch()

    def backend(self) -> contextlib.AbstractContextManager:
        """The context of a step: the backend of the settings, or what is in force."""
        return backend(self.config.backend) if self.config.backend else contextlib.nullcontext()

    @property
    def evaluated(self) -> nn.Module:
        """The network that evaluations see: the moving average, or where there is none, the one that trains."""
        return self.model if self.ema is None else self.ema.module

    def _made(self, model: nn.Module) -> nn.Module:
        """What a training step calls of `model`, as `compile` and `cuda_graph` say."""
        if self.config.compile:
            # Inductor makes CUDA graphs of what it compiles itself.
            return torch.compile(model, mode="reduce-overhead" if self.config.cuda_graph else None)
        if self.config.cuda_graph:
            with self.backend():
                return graphed(model, self._part(), self.config.precision)
        return model

    def _part(self) -> Tensor:
        """Images of the shape that a forward of training takes."""
        size = getattr(getattr(self.data, "preparation", None), "train_size", None)
        channels, height, width = self.data.image_shape
        shape = self.config.batch_size // self.config.accumulate, channels, size or height, size or width
        return torch.randn(shape, device=self.device).contiguous(memory_format=torch.channels_last)

    def step(self, images: Tensor, targets: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One step of the optimizer. targets: labels int64 [B], or float32 [B, classes].

        Returns (loss, logits), detached, on the device; nothing waits for a GPU here.
        """
        config = self.config
        self._set_rate(lr)
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(zip(images.chunk(config.accumulate), targets.chunk(config.accumulate), strict=True))
        losses, scores = [], []
        for i, (part, target) in enumerate(parts, start=1):
            # Gradients of processes are averaged once a step.
            with self.parallel.no_sync() if world() > 1 and i < len(parts) else contextlib.nullcontext():
                with autocast(self.device, config.precision, cache=not config.cuda_graph):
                    logits = self.parallel(part)
                loss = self.criterion(logits.float(), target) / len(parts)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            scores.append(logits.detach())
        if config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return (losses[0], scores[0]) if len(parts) == 1 else (torch.stack(losses).sum(), torch.cat(scores))

    def _average(self, step: int) -> None:
        """Updates the moving average behind a step of the run, 0 the first. During the warm-up it is the network itself."""
        if self.ema is not None and (step + 1) % self.config.ema_every == 0:
            if step < round(self.config.warmup_epochs * len(self.train_loader)):
                self.ema.n_averaged.zero_()
            self.ema.update_parameters(self.model)

    def run_epoch(
        self, progress: bool, pause: Callable[[int, int], None] = lambda step, steps: None, evaluating: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Trains one epoch, or what is left of it, and evaluates. Returns its record, which is the last of `history` then.

        `pause(step, steps)` is called after each step, `evaluating` after each batch of the evaluation. What they raise leaves the epoch
        where it is, so that `state` tells it. Raises `TrainingDiverged`, and `SettingError` for a batch that is too small for a norm.
        """
        record = {**self.train_epoch(progress, pause), **self.evaluate(evaluating)}
        record |= {"peak_memory_bytes": peak_memory(self.device), "ended": time.time()}
        self.history.append(record)
        self.epoch += 1
        self._begin_epoch()
        return record

    def train_epoch(self, progress: bool, pause: Callable[[int, int], None] = lambda step, steps: None) -> dict[str, Any]:
        """The training of `run_epoch`. Returns its part of the record; the speed is that of the epoch as a whole."""
        self.model.train()  # the moving average stays in eval mode
        loader, config = self.train_loader, self.config
        number, label = self.epoch + 1, f"epoch {self.epoch + 1}/{config.epochs}"
        batches = loader.batches(self.epoch, self.batch)
        batches = bar(batches, self.batch, len(loader), config.batch_size, label, self._loss_sum, progress and rank() == 0)
        self._synchronize()
        self._since = time.perf_counter()
        for images, labels in batches:
            images, targets = self.augment(images, labels, self.epoch, self.batch)
            with self.backend(), _batch_blamed(config):
                loss, logits = self.step(images, targets, self._rate(self.batch))
            self._average(self.epoch * len(loader) + self.batch)
            self._loss_sum += loss
            # Of a mixture the class with the larger part is the right one.
            self._correct += (logits.argmax(1) == (targets if targets.dim() == 1 else targets.argmax(1))).sum()
            self.batch += 1
            pause(self.batch, len(loader))
        loss_sum, correct = self._loss_sum.clone(), self._correct.clone()
        total(loss_sum, correct)
        self._synchronize()
        self._seconds, self._since = self._elapsed(), None
        images = len(loader) * config.batch_size
        mean_loss = loss_sum.item() / (len(loader) * world())
        if not math.isfinite(mean_loss):
            raise TrainingDiverged(f"the loss of epoch {number} is {mean_loss}; a lower learning rate may help")
        return {
            "epoch": number,
            "step": number * len(loader),
            "lr": self._rate(len(loader) - 1),
            "train_loss": mean_loss,
            "train_accuracy": correct.item() / images,
            "images_per_second": images / self._seconds,
            "train_seconds": self._seconds,
        }

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _rate(self, batch: int) -> float:
        """The learning rate of a batch of the epoch under way."""
        steps = len(self.train_loader)
        return learning_rate(self.config, self.epoch * steps + batch, steps)

    def evaluate(self, after_batch: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Loss and accuracy on the evaluation split, with the running statistics. Raises `TrainingDiverged`."""
        agree_on_buffers(self.evaluated)
        with self.backend():
            found = evaluate(self.evaluated, self.eval_loader, self.device, self.config.precision, after_batch)
        if not math.isfinite(found.loss):
            raise TrainingDiverged(f"the evaluation's loss of epoch {self.epoch + 1} is {found.loss}")
        return {
            "eval_loss": found.loss, "eval_accuracy": found.top1, "eval_top5_accuracy": found.top5, "eval_seconds": found.seconds,
        }  # fmt: skip

    def _begin_epoch(self, batch: int = 0, seconds: float = 0.0, loss_sum: float = 0.0, correct: float = 0.0) -> None:
        """Stands before a batch of an epoch: what the batches before it took, and this process's sums over them."""
        self.batch, self._seconds = batch, seconds
        self._since: float | None = None  # while it trains: when that began
        sums = (torch.tensor(value, device=self.device, dtype=torch.float64) for value in (loss_sum, correct))
        self._loss_sum, self._correct = sums

    def _elapsed(self) -> float:
        """Seconds that the epoch under way was trained."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def notes(self) -> list[str]:
        """What the loaders have to say of the epoch before: corrupt images, and waiting."""
        return [*self.train_loader.notes(), *self.eval_loader.notes()]

    def state(self) -> dict[str, Any]:
        """What `save_checkpoint` takes. All processes of a run have to ask for it."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        optimizer = self.optimizer.state_dict()
        # A parameter that never had a gradient has none either; that is said, so that a buffer that is missing is noticed.
        for i in (i for group in optimizer["param_groups"] for i in group["params"]):
            optimizer["state"].setdefault(i, {"momentum_buffer": None})
        return {
            "config": asdict(self.config),
            "data": asdict(describe(self.data)),
            "epoch": self.epoch,
            "partial": {
                "batch": self.batch,
                "seconds": self._elapsed(),
                "loss_sum": gathered(self._loss_sum.item()),
                "correct": gathered(self._correct.item()),
            },
            "model": self.model.state_dict(),
            "ema": {} if self.ema is None else self.ema.state_dict(),
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
            check_average(self.ema, state["ema"])
            optimizer = check_optimizer(self.optimizer, state["optimizer"])
            check_scaler(self.scaler, state["scaler"])
            check_rng(state["rng"])
            check_history(state["history"], state["epoch"])
            check_partial(state["partial"], len(self.train_loader))
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(optimizer)
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not fit {self.config.model}: {one_line(error)}") from error
        self.epoch, self.history = state["epoch"], list(state["history"])
        partial = state["partial"]
        sums = {name: _part_of_sum(partial[name]) for name in ("loss_sum", "correct")}
        self._begin_epoch(partial["batch"], partial["seconds"], **sums)
        if self.epoch or self.batch:  # as the last step left it: what is saved before the next one has the same bits
            self._set_rate(self._rate(self.batch - 1))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _part_of_sum(values: list[float]) -> float:
    """This process's part of a sum: its own one, or where there were more or fewer processes, all of it in the first."""
    if len(values) == world():
        return values[rank()]
    return math.fsum(values) if rank() == 0 else 0.0


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, of this process on a CPU, at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
