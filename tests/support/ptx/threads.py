"""Which threads run at once: those of several CTAs of a launch, warp after warp."""

import numpy as np

from .report import Report
from .values import Array


class Threads:
    """`count` = ctas · threads threads of the CTAs numbered `ctas`. An `active` mask [count] of None stands for all of them."""

    def __init__(self, ctas: list[int], threads: int):
        self.ctas, self.of_cta = len(ctas), threads
        self.count = threads * len(ctas)
        self.warps = self.count // 32
        self.number = np.arange(self.count, dtype="i4")
        self.tid = np.tile(np.arange(threads, dtype="i4"), self.ctas)
        self.ctaid = np.repeat(np.asarray(ctas, "i4"), threads)
        self.local_cta = np.repeat(np.arange(self.ctas), threads)  # 0 … ctas − 1
        self.lane = np.tile(np.arange(32, dtype="i4"), self.warps)
        self.warp = self.number >> 5

    def chosen(self, active: Array | None) -> Array:
        """The numbers of the active threads."""
        return np.arange(self.count) if active is None else np.flatnonzero(active)

    def some(self, active: Array | None, of: int) -> Array:
        """Of each group of `of` threads: whether any is active."""
        return np.ones(self.count // of, bool) if active is None else active.reshape(-1, of).any(1)

    def whole(self, active: Array | None, of: int, what: str, line: str, report: Report) -> int:
        """How many groups of `of` threads do `what`; a fault where a part of one does."""
        if active is None:
            return self.count // of
        active = active.reshape(-1, of)
        some = active.any(1)
        if (some & ~active.all(1)).any():
            report.fault(f"{what} in a part of the threads that must do it together", line, (some & ~active.all(1)).sum())
        return int(some.sum())

    def name(self, thread: int) -> str:
        """A thread as a report has it."""
        return f"CTA {int(self.ctaid[thread])}, thread {int(self.tid[thread])}"
