"""Timing peers against each other: in turn, after warm-up, with CUDA events on a GPU and the wall clock on a CPU."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

#: Written over before a timed call: more than any L2 cache holds.
FLUSH_BYTES = 2**30
#: Clock cycles that a GPU waits before a timed call, about a millisecond, while the launches of the call queue up behind: writing over the
#: cache takes 0.3 ms, and Python as long for the launches of a backward.
HOLD_CYCLES = 2_000_000
#: A time below this part of the floor, at rates that were measured, is refused: nothing that does the work takes less. A convolution by
#: Winograd's F(2x2, 3x3) multiplies 1/2.25 of what the floor counts, and adds what it saves.
POSSIBLE = 0.5


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median of many, and the spread."""

    median_ms: float
    p10_ms: float
    p90_ms: float


class Stopwatch:
    """Times single calls on a device."""

    def __init__(self, device: torch.device, flush: bool):
        """With `flush`, what the L2 cache of a GPU holds is written over before each call."""
        self.device = device
        self._scratch = None
        if flush and device.type == "cuda":
            self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if self._scratch is not None:
            self._scratch.zero_()
            torch.cuda._sleep(HOLD_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, the GPU's or the machine's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class Deadline(Exception):
    """The time that was allowed is over."""


@contextmanager
def deadline(seconds: float) -> Iterator[Callable[[], bool]]:
    """Raise `Deadline` in the block when it runs for longer, and each second after, since a library may catch what is raised in it.

    Yields a function that tells whether it was. By SIGALRM, so only in the main thread; elsewhere there is no limit.
    """
    over = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ring(*_):
        over.append(True)
        raise Deadline

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield lambda: bool(over)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's alarm, such as a test's own limit
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - started)), interval)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """In the block SIGTERM, with which a time limit from outside ends a process, raises KeyboardInterrupt. In the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def attempt(call: Callable[[], object], limit_s: float = 60.0) -> str | None:
    """Run `call`; None, or the status of a row: "oom: …", "timeout: …", or "unsupported: …" with the first line of what went wrong."""
    late = f"timeout: not done in {limit_s:g} s"
    try:
        with deadline(limit_s) as over:
            try:
                call()
                return None
            except Exception as error:  # a peer may fail in any way, and the others go on
                words = next(iter(str(error).splitlines()), "") or type(error).__name__
                status = late if over() else f"{'oom' if out_of_memory(error) else 'unsupported'}: {words}"
    except Deadline:  # it rang when the call had ended
        status = late
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # an error of the GPU that lasts: the row says it, and so will the others
            torch.cuda.empty_cache()
    return status


def measure(
    peers: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int = 50,
    warmup: int = 3,
    flush: bool = True,
    limit_s: float = 60.0,
) -> dict[str, Times | str]:
    """Time `peers`, one call of each in turn, `repeats` rounds; `Times` of each, or the status of a row that has none.

    A peer that fails drops out and the rest go on. After `limit_s` seconds a peer that was called at least three times keeps
    the figures that it has; one that was not is a "timeout: …".
    """
    results: dict[str, Times | str] = {}
    stopwatch = Stopwatch(device, flush)
    for name, call in peers.items():
        started = time.perf_counter()
        for _ in range(warmup):
            if status := attempt(call, limit_s):
                results[name] = status
                break
            if time.perf_counter() - started > limit_s:
                break
    taken: dict[str, list[float]] = {name: [] for name in peers if name not in results}
    spent = dict.fromkeys(taken, 0.0)
    for _ in range(repeats):
        for name in list(taken):
            if spent[name] > limit_s:
                continue
            started = time.perf_counter()
            if status := attempt(lambda name=name: taken[name].append(stopwatch(peers[name])), limit_s):
                results[name] = status
                del taken[name]
                continue
            spent[name] += time.perf_counter() - started
    for name, values in taken.items():
        too_few = len(values) < min(3, repeats)
        results[name] = f"timeout: {len(values)} calls in {limit_s:g} s" if too_few else summary(values)
    return {name: results[name] for name in peers}


def summary(milliseconds: list[float]) -> Times:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = torch.tensor(milliseconds, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    return Times(median.item(), p10.item(), p90.item())
