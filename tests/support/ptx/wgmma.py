"""Products of matrices by warp groups of 128 threads, sm_90. PTX ISA 9, "Asynchronous warpgroup-level matrix instructions".

What has been issued is computed at once, but its result is NaN to its threads until they wait for its group, and what it reads of shared
memory must not be written until then.
"""

from dataclasses import dataclass

import numpy as np

from .matrix import operand
from .report import Report, UnknownInstruction
from .shared import SharedMemory
from .threads import Threads
from .values import Array

#: Bytes of a row in shared memory by the descriptor's swizzle.
SWIZZLES = (16, 128, 64, 32)


@dataclass
class Result:
    """What a register holds once its threads have waited."""

    value: Array
    group: Array
    pending: Array  #: of which threads


class WarpGroups:
    """The wgmma instructions of a batch of threads. Products are summed in float32, in an order of NumPy's."""

    def __init__(self, threads: Threads, shared: SharedMemory, report: Report):
        self.threads, self.shared, self.report = threads, shared, report
        self.committed, self.finished = np.zeros(threads.count, "i4"), np.zeros(threads.count, "i4")
        self.results: dict[int, Result] = {}  # of register numbers
        self.reads: list[tuple[Array, int, int]] = []  # grains that are read, a thread of the group, the group's number

    def multiply(
        self, kind: str, columns: int, registers: list, out: list[int], a: list[Array] | Array, b: Array, accumulate: Array,
        transposed: tuple[bool, bool], active: Array | None, line: str,
    ) -> None:  # fmt: skip
        """wgmma.mma_async: a [64, K] · b [K, columns], added to the registers numbered `out` where `accumulate`.

        `a` is four registers, or descriptors as `b` is; `registers` are the threads' own.
        """
        groups = self.threads.count // 128
        self.report.counts["wgmma"] += self.threads.whole(active, 128, "wgmma", line, self.report)
        use = self.threads.some(active, 128)
        for argument in (accumulate, b, *([] if isinstance(a, list) else [a])):
            together = argument.reshape(groups, 128)
            if (together != together[:, :1])[use].any():
                self.report.fault("wgmma whose operands differ within a warp group", line)
        right = self._matrix(b[::128], columns, kind, transposed[1], use, line)
        if isinstance(a, list):
            words = np.stack(a).reshape(2, 2, self.threads.warps, 8, 4)  # half of K, half of the rows, warp, row, column
            left = operand(words, kind).transpose(2, 1, 3, 0, 4, 5)
            left = np.ascontiguousarray(left).reshape(groups, 64, -1)
        else:
            left = self._matrix(a[::128], 64, kind, transposed[0], use, line)
        product = np.matmul(left, right.swapaxes(1, 2))
        product = product.reshape(self.threads.warps, 2, 8, columns // 8, 4, 2)  # warp, half of its rows, row, eight, pair, column
        product = np.ascontiguousarray(product.transpose(3, 1, 5, 0, 2, 4)).reshape(columns // 2, -1)
        everywhere = np.ones(self.threads.count, bool) if active is None else active
        for number, new in zip(out, product, strict=True):
            old = registers[number]
            before = self.results.get(number) or Result(old, self.committed, np.zeros(self.threads.count, bool))
            value = np.where(before.pending, before.value, old)
            self.results[number] = Result(
                np.where(everywhere, np.where(accumulate, value, np.float32(0)) + new, value),
                np.where(everywhere, self.committed, before.group),
                before.pending | everywhere,
            )
            registers[number] = np.where(everywhere, np.float32(np.nan), old)

    def commit(self, active: Array | None) -> None:
        """wgmma.commit_group."""
        self.committed = self.committed + (1 if active is None else active.astype("i4"))
        self.report.most("max wgmma groups in flight", int((self.committed - self.finished).max()))

    def wait(self, pending: int, registers: list, active: Array | None) -> None:
        """wgmma.wait_group: the results of all groups but the last `pending` are there, and what they read is free."""
        ready = np.maximum(self.finished, self.committed - pending)
        self.finished = ready if active is None else np.where(active, ready, self.finished)
        for number, result in list(self.results.items()):
            done = result.pending & (result.group < self.finished)
            registers[number] = np.where(done, result.value, registers[number])
            result.pending = result.pending & ~done
            if not result.pending.any():
                del self.results[number]
        left = []
        for grains, thread, group in self.reads:
            if group < self.finished[thread]:
                self.shared.busy[grains] -= 1
            else:
                left.append((grains, thread, group))
        self.reads = left

    def _matrix(self, descriptor: Array, rows: int, kind: str, transposed: bool, use: Array, line: str) -> Array:
        """float32 [groups, rows, K] of a matrix in shared memory: 32 bytes along K of each row.

        A descriptor holds a start, a leading and a stride byte offset, each divided by 16, and the swizzle, which exchanges 16-byte parts
        of rows. K-major (not transposed), eight rows follow each other and `stride` leads to the next eight. MN-major, `wide` bytes along
        the rows do, for each of eight K, and `leading` leads to more rows, `stride` to the next eight K.
        """
        size = 4 if kind == "tf32" else 2
        descriptor = np.where(use, descriptor, descriptor[use][0])
        start, leading, stride = ((descriptor >> n & 0x3FFF) << 4 for n in (0, 16, 32))
        swizzle = descriptor >> 62 & 3
        if (descriptor >> 49 & 7).any() or any(len(np.unique(x)) > 1 for x in (swizzle, leading, stride)):
            raise UnknownInstruction(f"wgmma with a base offset, or layouts that differ between warp groups ({line})")
        wide, leading, stride = SWIZZLES[int(swizzle[0])], int(leading[0]), int(stride[0])
        row, k = np.arange(rows)[:, None], np.arange(32 // size)[None]
        if not transposed:
            along = k * size if wide > 16 else k * size // 16 * leading + k * size % 16
            offset = row // 8 * stride + row % 8 * wide + along
        elif wide > 16:
            per = wide // size
            offset = row // per * leading + row % per * size + k // 8 * stride + k % 8 * wide
        else:
            raise UnknownInstruction(f"wgmma of a transposed matrix without a swizzle ({line})")
        at = start[:, None, None] + offset
        at = at ^ ((at >> 7 & (wide // 16 - 1)) << 4)
        if ((at + size > self.shared.size) & use[:, None, None]).any():
            self.report.fault("out-of-bounds shared read by wgmma", line, 1, f"{int(at.max())} of {self.shared.size}")
            at = np.minimum(at, self.shared.size - size)
        at = at + self.shared.begin[::128][:, None, None]
        for group in np.flatnonzero(use):
            self._note_read(np.unique(at[group] // self.shared.grain), 128 * group, line)
        words = self.shared.bytes.view(f"u{size}")[at // size]
        if kind == "tf32":
            return operand(words, kind)[..., 0]
        return (words.astype("u4") << np.uint32(16)).view("f4") if kind == "bf16" else words.view("f2").astype("f4")

    def _note_read(self, grains: Array, thread: int, line: str) -> None:
        if self.shared.unfenced[grains].any():
            self.report.fault("wgmma reads what was stored with no fence.proxy.async behind", line, self.shared.unfenced[grains].sum())
        self.report.count("wgmma of unfenced copies", line, int(self.shared.unfenced_copies[grains].any()))
        self.shared.note_read(grains[None], np.array([thread]), line)
        self.shared.busy[grains] += 1
        self.reads.append((grains, thread, int(self.committed[thread])))
