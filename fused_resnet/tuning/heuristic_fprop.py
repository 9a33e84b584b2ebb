"""Which tiles a forward convolution takes where nothing was measured. Pure functions of the shape and the architecture.

The reasons are arithmetic and what the compiler says (docs/kernels/fprop.md). Tuning by measurement: not done.
"""

from ..problem import ConvProblem
from .configuration import Configuration

#: Multiprocessors and bytes of shared memory of one, of the largest GPU of an architecture: A100; H100 and H200.
MULTIPROCESSORS = {8: 108, 9: 132}
SHARED_MEMORY = {8: 163 * 1024, 9: 227 * 1024}


def _power_of_two(value: int, least: int, most: int) -> int:
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)


def configuration(problem: ConvProblem, itemsize: int, capability: tuple[int, int], prologue: bool) -> Configuration:
    """Tiles for `kernels.fprop` of elements of `itemsize` bytes on a GPU of compute capability `capability` (8.0 or later).

    `prologue` tells whether a norm is applied on load.
    """
    major = min(capability[0], max(MULTIPROCESSORS))
    rows, taps = problem.n * problem.p * problem.q, problem.r * problem.s
    block_n = _power_of_two(problem.k, 16, 128)
    # A step along K is a whole cache line of a pixel's channels; the K axis of few channels runs over taps and channels alike.
    axis = problem.c if problem.c >= 16 or taps == 1 else taps * problem.c
    block_k = _power_of_two(axis, 16, 128 // itemsize)
    # Half the rows where whole tiles would leave multiprocessors idle.
    block_m = 128
    while block_m > 64 and -(-rows // block_m) * -(-problem.k // block_n) < 2 * MULTIPROCESSORS[major]:
        block_m //= 2
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    return Configuration(block_m, block_n, block_k, warps, stages=3)
