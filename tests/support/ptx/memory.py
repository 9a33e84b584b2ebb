"""Global memory: the memory of the tensors that a launch is given, checked at each access and counted by sectors."""

import bisect
from dataclasses import dataclass, field

import numpy as np

from .report import Report
from .threads import Threads
from .values import Array, differ

SECTOR = 32
SEVERAL = -1


@dataclass
class Segment:
    """The addresses [low, high) of a tensor argument, within the memory of its storage."""

    low: int
    high: int
    memory: Array  #: uint8, of the whole storage
    base: int  #: address of its first byte, a multiple of 16
    name: str  #: of the argument
    written: Array | None = None  #: of each byte, whether somebody wrote it; None: all
    writer: Array | None = None  #: of each byte, the CTA of this launch that stored it, plus one
    reader: Array | None = None  #: of each byte, the CTA of this launch that loaded it, plus one, or SEVERAL
    _views: dict[tuple[int, int], Array] = field(default_factory=dict)

    def view(self, count: int, width: int) -> Array:
        """The memory as [·, count] elements of `width` bytes."""
        if (count, width) not in self._views:
            size = count * width
            self._views[count, width] = self.memory[: len(self.memory) // size * size].view(f"u{width}").reshape(-1, count)
        return self._views[count, width]


class GlobalMemory:
    """Loads and stores of a batch of threads.

    Faults: an address outside the argument's elements, one that is no multiple of the access's width, a load of bytes that nobody wrote;
    bytes that one CTA of a launch loads and another stores, which nothing orders; and different values stored to one byte, by two CTAs or
    by two threads at once.
    """

    def __init__(self, threads: Threads, segments: list[Segment], report: Report, counting: bool):
        self.threads, self.report, self.counting = threads, report, counting
        self.segments = sorted(segments, key=lambda s: s.low)
        self.lows = np.array([s.low for s in self.segments], "i8")
        self.highs = np.array([s.high for s in self.segments], "i8")

    def load(self, address: Array, count: int, width: int, active: Array | None, line: str) -> Array:
        """`count` elements of `width` bytes each: [count, threads]. Zero where a thread is not active."""
        out = np.zeros((self.threads.count, count), f"u{width}")
        for segment, chosen in self._parts(address, count * width, active, line, "load"):
            offset = address[chosen] - segment.base
            out[chosen] = segment.view(count, width)[offset // (count * width)]
            self._check_loaded(segment, offset, count * width, chosen, line)
        return np.ascontiguousarray(out.T)

    def copied(self, address: Array, size: int, active: Array | None, line: str) -> Array:
        """Bytes that a cp.async reads: uint8 [threads, size]."""
        out = np.zeros((self.threads.count, size), "u1")
        for segment, chosen in self._parts(address, size, active, line, "cp.async"):
            offset = address[chosen] - segment.base
            out[chosen] = segment.memory[offset[:, None] + np.arange(size)]
            self._check_loaded(segment, offset, size, chosen, line)
        return out

    def store(self, address: Array, values: list[Array], width: int, active: Array | None, line: str) -> None:
        """Each thread's values, one after another."""
        size, data = len(values) * width, np.stack(values, 1)
        for segment, chosen in self._parts(address, size, active, line, "store"):
            offset = address[chosen] - segment.base
            at = offset[:, None] + np.arange(size)
            mine = np.ascontiguousarray(data[chosen]).view("u1")
            cta = (self.threads.ctaid[chosen] + 1)[:, None]
            if segment.writer is None:
                segment.writer = np.zeros(len(segment.memory), "i4")
            before = segment.writer[at]
            clash = (before != 0) & (before != cta) & differ(segment.memory[at], mine, width)
            segment.view(len(values), width)[offset // size] = data[chosen]
            segment.writer[at] = cta
            lost = differ(segment.memory[at], mine, width)
            clash |= lost & (segment.writer[at] != cta)
            if segment.reader is not None:
                reader = segment.reader[at]
                if ((reader != 0) & (reader != cta)).any():
                    self.report.fault("store over what another CTA loads", line, 1, segment.name)
            for wrong, what in ((clash, "two CTAs store different values"), (lost & ~clash, "two threads store different values at once")):
                if wrong.any():
                    self.report.fault(what, line, wrong.any(1).sum(), segment.name)
            if segment.written is not None:
                segment.written[at] = True

    def _parts(self, address: Array, size: int, active: Array | None, line: str, what: str) -> list[tuple[Segment, Array]]:
        """(segment, numbers of threads), after the checks of what is accessed there."""
        chosen = self.threads.chosen(active)
        if not len(chosen):
            return []
        at = address[chosen]
        crooked = at % size != 0
        if crooked.any():
            self.report.fault(f"misaligned {what}", line, crooked.sum(), f"{size} bytes at {int(at[crooked][0]):#x}")
            chosen, at = chosen[~crooked], at[~crooked]
            if not len(chosen):
                return []
        low, high = int(at.min()), int(at.max()) + size
        only = bisect.bisect_right(self.lows, low) - 1
        if only >= 0 and high <= self.segments[only].high:  # as most accesses are
            if self.counting:
                self._count(address, size, active, line, what, self.segments[only].name)
            return [(self.segments[only], chosen)]
        which = np.searchsorted(self.lows, at, side="right") - 1
        inside = (which >= 0) & (at + size <= self.highs[which]) if len(self.lows) else np.zeros(len(at), bool)
        if not inside.all():
            first = int(np.flatnonzero(~inside)[0])
            self.report.fault(f"out-of-bounds {what}", line, (~inside).sum(), self._place(int(at[first]), size, int(chosen[first])))
        return [(self.segments[k], chosen[inside & (which == k)]) for k in np.unique(which[inside])]

    def _place(self, address: int, size: int, thread: int) -> str:
        """Words for an address that belongs to no argument, from the nearest one below it."""
        at = max(bisect.bisect_right(self.lows, address) - 1, 0)
        where = f"{address:#x}"
        if self.segments:
            near = self.segments[at]
            where = f"{near.name}{address - near.low:+d} of {near.high - near.low} bytes"
        return f"{size} bytes at {where}, {self.threads.name(thread)}"

    def _check_loaded(self, segment: Segment, offset: Array, size: int, chosen: Array, line: str) -> None:
        cta = (self.threads.ctaid[chosen] + 1)[:, None]
        if segment.reader is None:
            segment.reader = np.zeros(len(segment.memory), "i4")
        at = offset[:, None] + np.arange(size)
        if segment.written is not None:
            raw = ~segment.written[at].all(1)
            if raw.any():
                place = f"{segment.name}{int(offset[raw][0]) + segment.base - segment.low:+d}"
                self.report.fault("load of bytes that nobody wrote", line, raw.sum(), place)
        if segment.writer is not None:
            writer = segment.writer[at]
            foreign = ((writer != 0) & (writer != cta)).any(1)
            if foreign.any():
                self.report.fault("load of what another CTA stores", line, foreign.sum(), segment.name)
        before = segment.reader[at]
        segment.reader[at] = cta
        shared = (segment.reader[at] != cta) | ((before != 0) & (before != cta))
        segment.reader[at[shared]] = SEVERAL

    def _count(self, address: Array, size: int, active: Array | None, line: str, what: str, name: str) -> None:
        """Sectors that each warp touches, and the different bytes that it wants of them, of one argument."""
        places = address.reshape(-1, 32)
        if active is not None:
            places = np.where(active.reshape(-1, 32), places, -1)
        places = np.sort(places, 1)

        def different(sorted_rows: Array) -> int:
            return int((np.diff(sorted_rows, axis=1, prepend=-1) != 0).sum())

        found = {f"{what} sectors": different(places // SECTOR), f"{what} bytes": different(places) * size}  # of no thread, −1 // 32 is −1
        self.report.arguments[name].update(found)
        for each, number in found.items():
            self.report.count(each, line, number)
        self.report.counts[f"{what} of {size} bytes"] += int(self.threads.some(active, 32).sum())
