"""Products of small matrices by warps, and how their operands come from shared memory. PTX ISA 9, "Warp-level matrix instructions"."""

import numpy as np

from .report import Report
from .shared import SharedMemory
from .threads import Threads
from .values import Array

#: Shapes of mma.sync by the type of its operands.
SHAPES = {"bf16": ("m16n8k16", "m16n8k8"), "f16": ("m16n8k16", "m16n8k8"), "tf32": ("m16n8k8", "m16n8k4")}


def operand(registers: Array, kind: str) -> Array:
    """float32 of registers uint32 [...]: [..., 2] of two 16-bit floats each, [..., 1] of TF32, whose last 13 bits no product sees."""
    if kind == "tf32":
        return (registers & np.uint32(0xFFFFE000)).view("f4")[..., None]
    low, high = registers << np.uint32(16), registers & np.uint32(0xFFFF0000)
    if kind == "bf16":
        return np.stack([low.view("f4"), high.view("f4")], -1)
    return np.stack([(x >> np.uint32(16)).astype("u2").view("f2").astype("f4") for x in (low, high)], -1)


class MatrixUnit:
    """ldmatrix, stmatrix and mma.sync of a batch of threads. Products are summed in float32, in an order of NumPy's."""

    def __init__(self, threads: Threads, shared: SharedMemory, report: Report):
        self.threads, self.shared, self.report = threads, shared, report

    def load(self, address: Array, count: int, transposed: bool, active: Array | None, line: str) -> list[Array]:
        """ldmatrix of `count` 8x8 matrices of 16-bit elements: a register uint32 of each."""
        self.threads.whole(active, 32, "ldmatrix", line, self.report)
        rows = self.shared.rows(address, self._addressing(count, active), line)
        matrices = rows.view("u2").reshape(self.threads.warps, 4, 8, 8)[:, :count]
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        registers = np.ascontiguousarray(matrices).view("u4").reshape(self.threads.warps, count, 32)
        return [np.ascontiguousarray(registers[:, n]).reshape(-1) for n in range(count)]

    def store(self, address: Array, registers: list[Array], transposed: bool, active: Array | None, line: str) -> None:
        """stmatrix: the inverse of `load`."""
        self.threads.whole(active, 32, "stmatrix", line, self.report)
        count, warps = len(registers), self.threads.warps
        rows = np.zeros((warps, 4, 8, 4), "u4")
        rows[:, :count] = np.stack([register.reshape(warps, 8, 4) for register in registers], 1)
        if transposed:
            rows = np.ascontiguousarray(rows.view("u2").swapaxes(2, 3)).view("u4")
        words = rows.reshape(-1, 4)
        active = self._addressing(count, active)
        self.shared.store(address, [np.ascontiguousarray(words[:, n]) for n in range(4)], 4, active, line)

    def multiply(self, kind: str, a: list[Array], b: list[Array], c: list[Array], active: Array | None, line: str) -> list[Array]:
        """mma.sync: a [16, K] · b [K, 8] + c [16, 8], whose registers are in the order of PTX; four registers float32."""
        warps = self.threads.warps
        self.report.counts["mma"] += self.threads.whole(active, 32, "mma", line, self.report)

        def rows(registers: list[Array]) -> Array:
            """[warps, 8, K] of registers that hold rows lane // 4; K in an order of its own, the same for a and b."""
            words = np.stack(registers, -1).reshape(warps, 8, 4, len(registers))
            return operand(words, kind).reshape(warps, 8, -1)

        left = np.concatenate([rows(a[0::2]), rows(a[1::2])], 1)  # rows 0 … 7, and 8 … 15
        product = np.matmul(left, rows(b).swapaxes(1, 2)).reshape(warps, 2, 8, 4, 2)
        return [np.ascontiguousarray(product[:, n // 2, :, :, n % 2]).reshape(-1) + c[n] for n in range(4)]

    def _addressing(self, count: int, active: Array | None) -> Array | None:
        """The threads whose addresses `count` matrices use."""
        if count == 4:
            return active
        return self.threads.lane < 8 * count if active is None else active & (self.threads.lane < 8 * count)
