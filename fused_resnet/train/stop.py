"""When a run saves within an epoch, and when it leaves: by the clock, and at a signal."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .processes import agreed, world

SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: Of several processes: steps from one question whether to save to the next. A question costs a message between CPUs.
STEPS_A_QUESTION = 8
#: What is asked for, the larger the more urgent.
NOTHING, SAVE, LEAVE = 0, 1, 2


class Stopped(KeyboardInterrupt):
    """A run has saved and left, since a signal asked for it: Ctrl-C, or SIGTERM."""

    def __init__(self, asked: signal.Signals):
        super().__init__(f"{asked.name}: the run was saved")
        self.signal = asked


class Stop:
    """Whether a signal asked a run to leave."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def _ask(self, number: int, frame: object) -> None:
        if self.signal is not None:  # the second: whoever asked does not want to wait
            raise KeyboardInterrupt(f"{signal.Signals(number).name}, for the second time")
        self.signal = signal.Signals(number)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """For the time of a `with` block the first SIGINT or SIGTERM asks, and a second one raises KeyboardInterrupt.

    Outside of the main thread, where Python takes no handlers, signals do what they did.
    """
    stop, before = Stop(), {}
    try:
        try:
            for number in SIGNALS:
                before[number] = signal.signal(number, stop._ask)
        except ValueError:
            pass
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Pauses:
    """What is to be done after a step. All processes of a run ask at the same steps, and get the same answer."""

    def __init__(self, minutes: float, stop: Stop | None = None):
        """`minutes` from one checkpoint to the next; 0: after every step; inf: none within an epoch."""
        self.minutes, self.stop = minutes, Stop() if stop is None else stop
        self.saved()

    def saved(self) -> None:
        """A checkpoint has been written."""
        self._last = time.monotonic()

    def asked(self, step: int, steps: int) -> int:
        """`NOTHING`, `SAVE` or `LEAVE` after `step` of the epoch's `steps`, 1 the first."""
        if world() > 1 and step % STEPS_A_QUESTION and step < steps:
            return NOTHING
        due = time.monotonic() - self._last >= 60 * self.minutes
        return agreed(LEAVE if self.stop.signal else SAVE if due else NOTHING)

    def leaves(self) -> bool:
        """Whether to leave between two epochs."""
        return agreed(LEAVE if self.stop.signal else NOTHING) == LEAVE

    def stopped(self) -> Stopped:
        """What to raise. A process that got no signal itself leaves with the others."""
        return Stopped(self.stop.signal or signal.SIGTERM)
