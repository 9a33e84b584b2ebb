"""Kills of trainings, at moments that are counted: before and after each step, and each part of writing a file.

Run as a program, in a process of its own, since PyTorch refuses a backward in a fork of one in which autograd has had threads:

    python kills.py FOLDER PROCESSES KILLS SEED

makes `FOLDER/straight` without an interruption and `FOLDER/parts` with so many kills, by `PROCESSES` that share each batch, then finishes
the latter. It prints, as JSON, a list of [epochs, steps] that each killed one had reached.
"""

import io
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fused_resnet import files  # noqa: E402
from fused_resnet.train import CHECKPOINT, Stopped, TrainConfig, checkpoint, resumable, run  # noqa: E402
from support.trainings import resumed, small  # noqa: E402

FORK = multiprocessing.get_context("fork")
NEVER = float("inf")
CONFIG = TrainConfig(
    epochs=24, batch_size=8, lr=0.05, keep=2, checkpoint_minutes=NEVER, ema=0.9, ema_every=3, clip_norm=1.0, accumulate=2,
)  # fmt: skip


class Killer:
    """Sends this process a signal at its so-manieth event."""

    def __init__(self, events: float, number: int):
        self.events, self.number = events, number

    def event(self) -> None:
        self.events -= 1
        if self.events == 0:
            os.kill(os.getpid(), self.number)

    def around(self, function):
        """`function`, with an event before it and one after."""

        def call(*args):
            self.event()
            found = function(*args)
            self.event()
            return found

        return call

    def save(self, content, file) -> None:
        """torch.save, with events within what it writes."""
        whole = io.BytesIO()
        SAVE(content, whole)
        data = whole.getvalue()
        for part in data[: len(data) // 3], data[len(data) // 3 :]:
            self.event()
            file.write(part)
            file.flush()


SAVE = torch.save


def train(folder: Path, minutes: float, events: float, number: int, rank: int, world: int, store: str) -> None:
    """Trains on in `folder`, as one of `world` processes, to the end or until it dies."""
    torch.set_num_threads(1)
    if world > 1:
        distributed.init_process_group("gloo", store=distributed.FileStore(store, world), rank=rank, world_size=world)
    killer = Killer(events, number)

    def made(config):
        return small(replace(config, checkpoint_minutes=minutes))

    taken_up = resumed(folder, made) if (folder / CHECKPOINT).exists() else made(CONFIG)
    taken_up.step, taken_up.evaluate = killer.around(taken_up.step), killer.around(taken_up.evaluate)
    for name in ("fsync", "replace", "link"):
        setattr(files.os, name, killer.around(getattr(os, name)))
    checkpoint.torch.save = killer.save
    try:
        run(taken_up, folder, progress=False, say=lambda text: None)
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)
    if world > 1:
        distributed.barrier()  # none leaves while another still talks
        distributed.destroy_process_group()


def trained(
    folder: Path, world: int, minutes: float = NEVER, events: float = NEVER, victim: int = 0, number: int = signal.SIGKILL
) -> list[int]:
    """The exit codes of `world` processes that train in `folder`, of which one may die: the others are killed then, as torchrun does it."""
    store = folder.parent / f"store-{time.monotonic_ns()}"
    processes = [
        FORK.Process(target=train, args=(folder, minutes, events if i == victim else NEVER, number, i, world, str(store)))
        for i in range(world)
    ]
    for process in processes:
        process.start()
    processes[victim].join(120)
    for process in processes:
        if process is not processes[victim] and processes[victim].exitcode == -signal.SIGKILL:
            process.kill()
        process.join(120)
    store.unlink(missing_ok=True)
    return [process.exitcode for process in processes]


def main(folder: Path, world: int, kills: int, seed: int) -> None:
    draws, reached, parts = random.Random(seed), [], folder / "parts"
    parts.mkdir()
    run.__globals__["draw_curves"] = lambda *args: None  # a picture takes longer than these trainings
    small(CONFIG)  # loads what PyTorch loads late, once for all forks
    assert trained(folder / "straight", world) == [0] * world
    for _ in range(kills):
        minutes, victim = draws.choice((0.0, NEVER)), draws.randrange(world)
        # A process that writes nothing has fewer events.
        codes = trained(parts, world, minutes, draws.randint(1, 12 if victim else 60), victim)
        assert codes[victim] == -signal.SIGKILL, codes
        state = resumable(parts)[1] if (parts / CHECKPOINT).exists() else None
        reached.append([state["epoch"], state["partial"]["batch"]] if state else [0, 0])
    # To one of them: all save and leave.
    assert trained(parts, world, events=3, victim=world - 1, number=signal.SIGTERM) == [128 + signal.SIGTERM] * world
    assert trained(parts, world) == [0] * world
    print(json.dumps(reached))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
