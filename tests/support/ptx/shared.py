"""Shared memory of several CTAs, who touched what in it, and the copies that are on their way to it.

The shadow keeps, of each grain of a few bytes, its last writer and its readers with their epochs: how many barriers they had passed. Two
accesses of different threads with no barrier between are ordered by nothing, unless a bar.warp.sync of their common warp is.
"""

from dataclasses import dataclass

import numpy as np

from .memory import GlobalMemory
from .report import Report
from .threads import Threads
from .values import Array, differ

NOBODY, SEVERAL = -1, -2
BANKS = 32


@dataclass
class Copy:
    """What one cp.async has read, until it lands."""

    threads: Array
    address: Array
    data: Array  #: uint8 [threads, bytes]
    group: Array  #: of each thread
    grains: Array
    line: str

    def part(self, chosen: Array) -> "Copy":
        """That of some of its threads."""
        return Copy(self.threads[chosen], self.address[chosen], self.data[chosen], self.group[chosen], self.grains[chosen], self.line)


class SharedMemory:
    """Loads, stores and copies of a batch of threads. Addresses begin at 0 in each CTA.

    Faults: out of bounds or misaligned, a read of bytes that nobody wrote, of a copy in flight, or of another thread's with no barrier
    between; a write over what another thread reads or writes with none between, over a copy in flight or what a wgmma reads.
    """

    def __init__(self, threads: Threads, size: int, grain: int, memory: GlobalMemory, report: Report, counting: bool):
        self.threads, self.size, self.grain = threads, size, grain
        self.memory, self.report, self.counting = memory, report, counting
        stride = -(-max(size, 16) // 16) * 16
        self.bytes = np.full(stride * threads.ctas, 0xFF, "u1")
        self.begin = threads.local_cta * stride  # of each thread's CTA
        grains = stride * threads.ctas // grain
        self.written, self.in_flight = np.zeros(grains, bool), np.zeros(grains, "i2")
        self.writer, self.reader, self.reader_warp = (np.full(grains, NOBODY, "i4") for _ in range(3))
        self.write_epoch, self.read_epoch = np.full(grains, -1, "i4"), np.full(grains, -1, "i4")
        self.write_warp_epoch, self.read_warp_epoch = np.zeros(grains, "i4"), np.zeros(grains, "i4")
        self.epoch, self.warp_epoch = np.zeros(threads.count, "i4"), np.zeros(threads.count, "i4")
        self.committed, self.landed = np.zeros(threads.count, "i4"), np.zeros(threads.count, "i4")  # groups of copies
        self.copies: list[Copy] = []
        #: Grains that wgmmas still read, and those that stores and copies wrote since the last fence that lets wgmma see them.
        self.busy = np.zeros(grains, "i2")
        self.unfenced, self.unfenced_copies = np.zeros(grains, bool), np.zeros(grains, bool)

    # ---- accesses

    def load(self, address: Array, count: int, width: int, active: Array | None, line: str) -> Array:
        """`count` elements of `width` bytes each: [count, threads]. Zero where a thread is not active."""
        size = count * width
        chosen, at, grains = self._place(address, size, active, line, "read")
        self._count_wavefronts(address, size, active, line, "read")
        self.note_read(grains, chosen, line)
        out = np.zeros((self.threads.count, count), f"u{width}")
        out[chosen] = self._as(size).view(f"u{width}")[at // size]
        return np.ascontiguousarray(out.T)

    def rows(self, address: Array, active: Array | None, line: str) -> Array:
        """16 bytes of each active thread, as ldmatrix reads them: uint8 [threads, 16]."""
        chosen, at, grains = self._place(address, 16, active, line, "ldmatrix")
        self._count_wavefronts(address, 16, active, line, "ldmatrix")
        self.note_read(grains, chosen, line)
        out = np.zeros((self.threads.count, 16), "u1")
        out[chosen] = self._as(16)[at // 16]
        return out

    def store(self, address: Array, values: list[Array], width: int, active: Array | None, line: str) -> None:
        """Each thread's values, one after another."""
        size = len(values) * width
        chosen, at, grains = self._place(address, size, active, line, "write")
        if not len(chosen):
            return
        self._count_wavefronts(address, size, active, line, "write")
        data = np.ascontiguousarray(np.stack(values, 1)[chosen]).view("u1").reshape(-1, size)
        memory = self._as(size)
        changes = np.repeat(differ(memory[at // size], data, width).any(1)[:, None], grains.shape[1], 1)
        self._note_write(grains, chosen, line, changes)
        memory[at // size] = data
        lost = differ(memory[at // size], data, width).any(1)
        if lost.any():
            others = np.flatnonzero(at == at[np.flatnonzero(lost)[0]])
            names = " and ".join(self.threads.name(chosen[k]) for k in others[:2])
            self.report.fault("two threads write different values to shared memory at once", line, lost.sum(), names)

    def copy(self, to: Array, source: Array, size: int, read: Array | None, active: Array | None, line: str) -> None:
        """cp.async of `size` bytes, of which `read` (each thread's; None: all) come from global memory and the rest are zeros."""
        chosen, at, grains = self._place(to, size, active, line, "cp.async")
        if not len(chosen):
            return
        reads = np.ones(self.threads.count, bool) if active is None else active.copy()
        if read is not None:
            if ((read[chosen] != 0) & (read[chosen] != size)).any():
                self.report.fault("cp.async of a part of its bytes", line)
            reads &= read != 0
        data = self.memory.copied(source, size, reads, line)
        self._count_wavefronts(to, size, active, line, "cp.async")
        self.report.counts[f"cp.async of {size} bytes"] += len(np.unique(self.threads.warp[chosen]))
        self._report_unordered(self._read_by_others(grains, chosen), line, "cp.async over what was read without a barrier", chosen)
        self._report_unordered(self._written_by_others(grains, chosen), line, "cp.async over what was written without a barrier", chosen)
        for taken, what in ((self.busy, "where a wgmma reads"), (self.in_flight, "where another is in flight")):
            if taken[grains].any():
                self.report.fault(f"cp.async {what}", line, taken[grains].any(1).sum())
        self.in_flight[grains] += 1
        self.copies.append(Copy(chosen, at, data[chosen], self.committed[chosen].copy(), grains, line))

    # ---- what orders them

    def commit(self, active: Array | None) -> None:
        """cp.async.commit_group: copies from here on belong to a group of their own."""
        self.committed += 1 if active is None else active.astype("i4")
        self.report.most("max groups in flight", int((self.committed - self.landed).max()))

    def wait(self, pending: int, active: Array | None) -> None:
        """cp.async.wait_group: all groups land but the last `pending`."""
        ready = np.maximum(self.landed, self.committed - pending)
        self.landed = ready if active is None else np.where(active, ready, self.landed)
        left = []
        for copy in self.copies:
            lands = copy.group < self.landed[copy.threads]
            if not lands.all():
                left.append(copy.part(~lands) if lands.any() else copy)
            if lands.any():
                done = copy.part(lands)
                self._as(done.data.shape[1])[done.address // done.data.shape[1]] = done.data
                self.in_flight[done.grains] = 0
                self._note_write(done.grains, done.threads, done.line, None)
        self.copies = left

    def barrier(self, active: Array | None, line: str) -> None:
        """bar.sync of all threads of a CTA."""
        self.report.counts["barriers"] += self.threads.whole(active, self.threads.of_cta, "bar.sync", line, self.report)
        self.epoch += 1 if active is None else active.astype("i4")

    def warp_barrier(self, active: Array | None) -> None:
        """bar.warp.sync."""
        self.warp_epoch += 1 if active is None else active.astype("i4")

    def fence(self, active: Array | None) -> None:
        """fence.proxy.async: what was written is from here on seen by wgmma."""
        for written in (self.unfenced, self.unfenced_copies):
            written.reshape(self.threads.ctas, -1)[self.threads.some(active, self.threads.of_cta)] = False

    # ---- the shadow

    def note_read(self, grains: Array, chosen: Array, line: str) -> None:
        """Check a read of grains [threads, ·] by the threads `chosen`, and remember it."""
        if not len(chosen):
            return
        if self.in_flight[grains].any():
            self.report.fault("shared read of a cp.async in flight", line, self.in_flight[grains].any(1).sum(), self._name(chosen))
        if not self.written[grains].all():
            self.report.fault("shared read of bytes that nobody wrote", line, (~self.written[grains]).any(1).sum(), self._name(chosen))
        self._report_unordered(self._written_by_others(grains, chosen), line, "shared read after write without a barrier", chosen)
        me, warp, epoch = (np.broadcast_to(x[chosen][:, None], grains.shape) for x in (self.threads.number, self.threads.warp, self.epoch))
        stale = self.read_epoch[grains] != epoch
        before, before_warp = self.reader[grains], self.reader_warp[grains]
        self.reader[grains], self.reader_warp[grains] = me, warp
        several = (self.reader[grains] != me) | (~stale & (before != me))
        several_warps = (self.reader_warp[grains] != warp) | (~stale & (before_warp != warp))
        self.reader[grains[several]] = SEVERAL
        self.reader_warp[grains[several_warps]] = SEVERAL
        self.read_epoch[grains] = epoch
        self.read_warp_epoch[grains] = np.broadcast_to(self.warp_epoch[chosen][:, None], grains.shape)

    def _note_write(self, grains: Array, chosen: Array, line: str, changes: Array | None) -> None:
        """As `note_read`, of a write; `changes`: where it is of another value than was there. None of a copy that lands."""
        if self.busy[grains].any():
            self.report.fault("shared write where a wgmma reads", line, self.busy[grains].any(1).sum(), self._name(chosen))
        if changes is not None:
            if self.in_flight[grains].any():
                self.report.fault("shared write where a cp.async is in flight", line, self.in_flight[grains].any(1).sum())
            self._report_unordered(self._read_by_others(grains, chosen), line, "shared write after read without a barrier", chosen)
            written = self._written_by_others(grains, chosen)
            self._report_unordered(
                written and tuple(w & changes for w in written), line, "shared write after write without a barrier", chosen
            )
        (self.unfenced_copies if changes is None else self.unfenced)[grains] = True
        self.written[grains] = True
        for shadow, value in (
            (self.writer, self.threads.number), (self.write_epoch, self.epoch), (self.write_warp_epoch, self.warp_epoch),
        ):  # fmt: skip
            shadow[grains] = np.broadcast_to(value[chosen][:, None], grains.shape)

    def _read_by_others(self, grains: Array, chosen: Array) -> tuple[Array, Array] | None:
        return self._by_others(self.reader, self.reader_warp, self.read_epoch, self.read_warp_epoch, grains, chosen)

    def _written_by_others(self, grains: Array, chosen: Array) -> tuple[Array, Array] | None:
        return self._by_others(self.writer, None, self.write_epoch, self.write_warp_epoch, grains, chosen)

    def _by_others(self, who, warps, epochs, warp_epochs, grains, chosen) -> tuple[Array, Array] | None:
        """Where another thread's access since the last barrier is ordered by nothing: (of another warp, of the same)."""
        number, warp = self.threads.number[chosen][:, None], self.threads.warp[chosen][:, None]
        last = who[grains]
        hit = (last != number) & (last != NOBODY) & (epochs[grains] == self.epoch[chosen][:, None])
        if not hit.any():
            return None
        same = (last >> 5 if warps is None else warps[grains]) == warp
        hit &= ~(same & (warp_epochs[grains] != self.warp_epoch[chosen][:, None]))
        return hit & ~same, hit & same

    def _report_unordered(self, found: tuple[Array, Array] | None, line: str, what: str, chosen: Array) -> None:
        for hit, where in zip(found or (), ("between warps", "within a warp"), strict=False):
            rows = hit.any(1)
            if rows.any():
                self.report.fault(f"{what} {where}", line, rows.sum(), self.threads.name(chosen[np.flatnonzero(rows)[0]]))

    # ---- addresses

    def _as(self, size: int) -> Array:
        """The memory as rows of `size` bytes."""
        return self.bytes[: len(self.bytes) // size * size].reshape(-1, size)

    def _name(self, chosen: Array) -> str:
        return self.threads.name(chosen[0])

    def _place(self, address: Array, size: int, active: Array | None, line: str, what: str) -> tuple[Array, Array, Array]:
        """(threads, places in `bytes`, grains [threads, ·]) of an access, after the checks of its address."""
        chosen = self.threads.chosen(active)
        at = address[chosen].astype("i8")
        for wrong, how in ((at % size != 0, "misaligned"), ((at < 0) | (at + size > self.size), "out-of-bounds")):
            if wrong.any():
                example = f"{size} bytes at {int(at[wrong][0])} of {self.size}, {self.threads.name(chosen[wrong][0])}"
                self.report.fault(f"{how} shared {what}", line, wrong.sum(), example)
        right = (at % size == 0) & (at >= 0) & (at + size <= self.size)
        chosen, at = chosen[right], at[right] + self.begin[chosen[right]]
        return chosen, at, (at // self.grain)[:, None] + np.arange(max(1, size // self.grain))

    def _count_wavefronts(self, address: Array, size: int, active: Array | None, line: str, what: str) -> None:
        """Wavefronts of an access by its fullest bank, and the fewest that as many different words could take."""
        if not self.counting:
            return
        words = max(1, size // 4)
        per = 32 // words  # threads that are served together
        wanted = (address.astype("i8") // 4)[:, None] + np.arange(words)
        if active is not None:
            wanted = np.where(active[:, None], wanted, -1)
        wanted = np.sort(wanted.reshape(-1, per * words), 1)
        new = np.diff(wanted, axis=1, prepend=-1) != 0
        group = np.broadcast_to(np.arange(len(wanted))[:, None], wanted.shape)
        hits = np.bincount(group[new] * BANKS + wanted[new] % BANKS, minlength=BANKS * len(wanted)).reshape(-1, BANKS)
        self.report.count(f"shared {what} wavefronts", line, int(hits.max(1).sum()))
        self.report.count(f"shared {what} ideal", line, int((-(-hits.sum(1) // BANKS)).sum()))
