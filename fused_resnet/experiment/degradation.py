"""The experiment on degradation: every run of a plan, each looked into at its start, in its middle and at its end.

The folder holds `plan.json`, `machines.json` (where it ran), and a folder a run, with the files of `train.run` and a `probe-EPOCH.json`
for each moment; `diverged.json` where a loss was no longer a number. What is there is not done again, and a run that was stopped goes on
from its checkpoint: whatever stops the experiment, the same bits come out on one CPU with as many threads.
"""

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..bench.machine import collect_meta
from ..data import DataSet, Loader
from ..files import Locked, locked, replace_file
from ..train import CHECKPOINT, METRICS, FolderError, Trainer, TrainingDiverged, epochs, resumable
from ..train.progress import EPOCH_HEADER, epoch_line
from .plan import Plan, Run
from .probe import IMAGES, Probe, probe

MACHINES, DIVERGED, LOCK = "machines.json", "diverged.json", "lock"
#: What is kept of a machine; its load and the date change from run to run.
FACTS = ("device", "cpu", "isa", "threads", "onednn", "torch", "cuda", "cudnn", "commit")
TIMED_STEPS = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a run left so far."""

    run: Run
    records: list[dict[str, Any]]  #: of `metrics.jsonl`
    probes: dict[int, Probe]  #: by epochs done
    diverged: str | None  #: why it ended early, where it did

    def finished(self, plan: Plan) -> bool:
        """Whether nothing is left to do."""
        return self.diverged is not None or (len(self.records) == plan.settings.epochs and set(plan.moments.values()) <= self.probes.keys())


def run_plan(plan: Plan, data: DataSet, folder: Path, device: torch.device, commit: str, progress: bool, say: Say) -> Iterator[Outcome]:
    """Runs what is left of a plan in its folder; yields the outcome of each run that it ends.

    Raises `FolderError` where another process is at it, or a run there is of other settings, and what `train.epochs` raises.
    """
    try:
        with locked(folder / LOCK, wait=False):
            for number, run in enumerate(plan.runs, start=1):
                if not read_outcome(plan, folder, run).finished(plan):
                    _note_machine(folder, device, commit)
                    say(f"\n{run.network}, seed {run.seed}: run {number} of {len(plan.runs)}")
                    _finish(plan, data, folder / run.folder, run, device, progress, say)
                    yield read_outcome(plan, folder, run)
    except Locked as error:
        raise FolderError(f"{folder}: the experiment is being run there ({error})") from error


def _finish(plan: Plan, data: DataSet, folder: Path, run: Run, device: torch.device, progress: bool, say: Say) -> None:
    """Trains one run from where it is to its end."""
    config = plan.config(run)
    torch.manual_seed(config.seed)
    trainer = Trainer(plan.build(run.network, data), data, config, device)
    folder.mkdir(exist_ok=True)
    _look(plan, trainer, folder)
    if (folder / CHECKPOINT).exists():
        kept, state = resumable(folder)
        if kept != config:
            raise FolderError(f"{folder}: expected a run of {config}; it has one of {kept}")
        trainer.load_state(state)
        _look(plan, trainer, folder)
    say(EPOCH_HEADER)
    try:
        with contextlib.closing(epochs(trainer, folder, config.epochs, progress)) as records:
            for record in records:
                say(epoch_line(record, config.epochs))
                _look(plan, trainer, folder)
    except TrainingDiverged as error:
        say(f"{run.network}, seed {run.seed}, ends here: {error}")
        _write(folder / DIVERGED, {"reason": str(error)})


def _look(plan: Plan, trainer: Trainer, folder: Path) -> None:
    """Writes a probe where this is one of the moments and there is none yet."""
    path = folder / f"probe-{trainer.epoch}.json"
    if not trainer.batch and trainer.epoch in plan.moments.values() and not path.exists():
        _write(path, asdict(probe(trainer.model, *probed(trainer.data, trainer.device))))


def probed(data: DataSet, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The images that probes see, normalised, and their labels: the first of the training split."""
    split = data.train.first(IMAGES)
    return next(Loader(data, split, len(split), device, augment=False).batches(0))


def read_outcome(plan: Plan, folder: Path, run: Run) -> Outcome:
    """What a run left in an experiment's folder. Raises `FolderError` where a file is damaged."""
    here, records, probes, diverged = folder / run.folder, [], {}, None
    try:
        if (here / METRICS).exists():
            # A line that a kill cut off is one that its checkpoint brings again.
            lines = (here / METRICS).read_bytes().split(b"\n")[:-1]
            records = [json.loads(line) for line in lines]
        for epoch in plan.moments.values():
            if (path := here / f"probe-{epoch}.json").exists():
                probes[epoch] = Probe(**json.loads(path.read_bytes()))
        if (path := here / DIVERGED).exists():
            diverged = json.loads(path.read_bytes())["reason"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FolderError(f"{here}: a file of the run is damaged ({error}); remove the folder to run it again") from error
    return Outcome(run, records, probes, diverged)


def epoch_seconds(plan: Plan, data: DataSet, device: torch.device) -> float:
    """What an epoch of all runs takes, with its evaluation, by a few steps of each network."""
    return plan.seeds * sum(_epoch_seconds(plan, network, data, device) for network in plan.networks)


def _epoch_seconds(plan: Plan, network: str, data: DataSet, device: torch.device) -> float:
    config = plan.config(Run(network, 0))
    trainer = Trainer(plan.build(network, data), data, config, device)
    trainer.model.train()
    steps, forwards = [], []
    with trainer.backend():
        # The first is slower: memory is new, kernels are compiled.
        for images, labels in itertools.islice(itertools.cycle(trainer.train_loader.batches(0)), 1 + TIMED_STEPS):
            start = time.perf_counter()
            trainer.step(images, labels, config.lr)[0].item()
            steps.append(time.perf_counter() - start)
        trainer.model.eval()
        for images, _ in itertools.islice(itertools.cycle(trainer.eval_loader.batches(0)), 1 + TIMED_STEPS):
            start = time.perf_counter()
            with torch.no_grad():
                trainer.model(images).sum().item()
            forwards.append(time.perf_counter() - start)
    medians = (statistics.median(times[1:]) for times in (steps, forwards))
    return sum(median * len(loader) for median, loader in zip(medians, (trainer.train_loader, trainer.eval_loader), strict=True))


def _note_machine(folder: Path, device: torch.device, commit: str) -> None:
    """Adds this machine and these versions to those that the experiment ran on."""
    meta = asdict(collect_meta(device, commit))
    machines, here = read_machines(folder), {fact: meta[fact] for fact in FACTS}
    if here not in machines:
        _write(folder / MACHINES, [*machines, here])


def read_machines(folder: Path) -> list[dict[str, Any]]:
    """Where the experiment ran: `FACTS` of each machine. Raises `FolderError` where the file is damaged."""
    path = folder / MACHINES
    try:
        return json.loads(path.read_bytes()) if path.exists() else []
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path}: the file is damaged ({error}); without it the page does not say where the experiment ran") from error


def _write(path: Path, content: Any) -> None:
    replace_file(path, lambda file: file.write(json.dumps(content).encode()))
