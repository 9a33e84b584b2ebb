"""Processors that others use as well: how OpenMP's threads wait for each other, and whether others are at work.

By default a thread of OpenMP that is early at a barrier spins. Where another process has the processor of a late one, time is lost twice,
at every operator. Asleep they leave the processors to whoever has work; but to fall asleep and be woken costs a small network a fifth
of its step. So they spin for a moment first. docs/training.md has figures.
"""

import os
import sys
import time
from pathlib import Path

#: The commands that ask for it.
COMMANDS = ("train", "demo", "bench", "experiment")
#: What users say of it: GNU's and Intel's variables.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
#: What is said for them. Of GNU's OpenMP the count goes before the policy, by which it would be 0; by default it is 300,000. Others know
#: the policy alone.
PATIENCE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
BUSY = 0.1  #: of the processors: what is worth a word
SECONDS = 0.2


def wait_passively() -> None:
    """Let OpenMP's threads soon sleep at barriers, where this process is one of `COMMANDS` and the user's environment says nothing of it.

    To be called before PyTorch is loaded, with which OpenMP reads its variables once.
    """
    if _command() in COMMANDS and "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ.update(PATIENCE)


def _command() -> str | None:
    """The subcommand of `fused-resnet` or `python -m fused_resnet` that this process is; None where it is something else."""
    command = sys.argv[1] if len(sys.argv) > 1 else None
    if Path(sys.argv[0]).stem == "fused-resnet":
        return command
    # While Python looks for a module that it is to run, "-m" stands in its name's place.
    if sys.argv[0] == "-m" and sys.orig_argv[-len(sys.argv)] == "fused_resnet":
        return command
    return None


def busy() -> str | None:
    """A sentence about other processes that keep the processors busy, after looking for `SECONDS`; None where few do."""
    before = _ticks()
    time.sleep(SECONDS)
    idle, all_ticks = (after - then for after, then in zip(_ticks(), before, strict=True))
    if not all_ticks or (used := 1 - idle / all_ticks) < BUSY:
        return None
    count = len(os.sched_getaffinity(0))
    return f"This machine is busy: others use {used * count:.1f} of its {count} processors; speeds vary."


def _ticks() -> tuple[int, int]:
    """(idle, all) ticks of this process's processors so far; zeros where the system does not report them."""
    try:
        mine = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except (AttributeError, OSError):
        return 0, 0
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = [[int(value) for value in row[1:9]] for row in rows if row[0] in mine]
    return sum(row[3] + row[4] for row in ticks), sum(map(sum, ticks))
