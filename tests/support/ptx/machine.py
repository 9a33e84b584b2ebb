"""Programs of a launch from beginning to end: registers, branches, shuffles.

The threads of several CTAs run at once, as arrays. Threads that branch apart go on under a mask, those of the lowest block first, until all
are in one place again.
"""

import numpy as np

from .matrix import MatrixUnit
from .memory import GlobalMemory, Segment
from .parse import END
from .report import Report
from .shared import SharedMemory
from .threads import Threads
from .translate import Code
from .values import POISON, Array
from .wgmma import WarpGroups

#: Threads that run at once, about: what NumPy does per call costs as much as some thousand elements.
THREADS = 2048


class Machine:
    """A batch of CTAs of a launch. What `translate` writes calls its units and methods."""

    def __init__(
        self, code: Code, ctas: list[int], programs: int, arguments: list[int], segments: list[Segment], report: Report, counting: bool
    ):
        self.code, self.arguments, self.report, self.counting = code, arguments, report, counting
        self.threads = Threads(ctas, code.program.threads)
        self.tid, self.ctaid, self.laneid = self.threads.tid, self.threads.ctaid, self.threads.lane
        self.nctaid = np.full(self.threads.count, programs, "i4")
        self.memory = GlobalMemory(self.threads, segments, report, counting)
        self.shared = SharedMemory(self.threads, code.program.shared, code.grain, self.memory, report, counting)
        self.matrix = MatrixUnit(self.threads, self.shared, report)
        self.wgmma = WarpGroups(self.threads, self.shared, report)

    def parameter(self, number: int, dtype: str) -> Array:
        """A kernel argument, of whose bits the launch gave an integer."""
        width = np.dtype(dtype).itemsize
        bits = np.array(self.arguments[number] & ((1 << 8 * width) - 1), f"u{width}")
        return np.full(self.threads.count, bits.view(dtype))

    def shuffle(self, mode: str, value: Array, by: Array, active: Array | None, line: str) -> Array:
        """shfl.sync among all lanes of a warp."""
        lane, by = self.threads.lane, by & 31
        if mode == "bfly":
            source = lane ^ by
        elif mode == "idx":
            source = by
        elif mode == "up":
            source = np.where(lane >= by, lane - by, lane)
        else:
            source = np.where(lane + by < 32, lane + by, lane)
        source = source.astype("i8").reshape(-1, 32)
        if active is not None:
            rows = active.reshape(-1, 32)
            if (~np.take_along_axis(rows, source, 1) & rows).any():
                self.report.fault("shfl from a lane that is not active", line)
        return np.take_along_axis(value.reshape(-1, 32), source, 1).reshape(-1)

    def run(self) -> None:
        """All threads, to their end."""
        code = self.code
        # No array is ever written to: a register is given another. What the compiler leaves undefined may be read, and must not matter.
        poison = {dtype: np.full(self.threads.count, POISON[dtype], dtype) for dtype in set(code.registers)}
        registers = [poison[dtype] for dtype in code.registers]
        constants = [np.full(self.threads.count, value) for value in code.constants]
        at: Array | None = None  # of each thread its block, where they have branched apart
        here = 0
        while here != END:
            active = None if at is None else at == here
            if active is not None and active.all():
                at = active = None
            if self.counting:
                self._count(here, active)
            block = (code.together if active is None else code.apart)[here]
            taken, target, following = block(registers, self, constants, active)
            if at is not None:
                at[active] = target if taken is None else np.where(taken, target, following)[active]
                here = int(at.min())
            elif taken is None or taken.all():
                here = target
            elif not taken.any():
                here = following
            else:
                at = np.where(taken, target, following)
                here = int(at.min())

    def _count(self, block: int, active: Array | None) -> None:
        warps = int(self.threads.some(active, 32).sum())
        for instruction in self.code.program.blocks[block]:
            self.report.instructions[instruction.opcode] += warps


def execute(
    code: Code,
    programs: int,
    arguments: list[int],
    segments: list[Segment],
    report: Report,
    counting: bool = False,
    most: int | None = None,
) -> None:
    """All programs of a launch, or the first `most`; what is wrong goes into `report`, and where `counting`, sectors and wavefronts do.

    `arguments` are the bits of the kernel's arguments, in the order of its parameters; `segments` what their pointers may reach.
    """
    batch = max(1, THREADS // code.program.threads)
    with np.errstate(all="ignore"):
        end = min(programs, most or programs)
        for first in range(0, end, batch):
            ctas = list(range(first, min(first + batch, end)))
            Machine(code, ctas, programs, arguments, segments, report, counting).run()
