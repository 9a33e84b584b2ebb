"""Which tiles a gradient of an input takes where nothing was measured. Pure functions of the task and the architecture.

The reasons are arithmetic and what the compiler says (docs/kernels/dgrad.md). Tuning by measurement: not done.
"""

from dataclasses import replace

from ..policy import pays_to_apply_norm
from ..problem import ConvProblem, ceil_div
from .configuration import Configuration
from .gpu import MULTIPROCESSORS, architecture, power_of_two

#: (architecture, bytes of an element, prologue) -> tiles for many rows and channels. The epilogue has as many values alive as the
#: accumulator has, of x and x̂ too: 64 x 128 with four warps leaves two or three programs a multiprocessor, of which one computes
#: while another is in its epilogue. A prologue has those of a step of dz and of y besides, so its steps are short.
TILES = {
    (9, 2, False): Configuration(64, 128, 64, warps=4, stages=3),
    (9, 2, True): Configuration(64, 128, 32, warps=4, stages=4),
    (9, 4, False): Configuration(64, 64, 32, warps=4, stages=3),
    (9, 4, True): Configuration(64, 64, 32, warps=4, stages=3),
    (8, 2, False): Configuration(64, 128, 32, warps=4, stages=2),  # with three, Triton 3.8 spills; so does 3.6 with steps of 64
    (8, 2, True): Configuration(64, 64, 32, warps=4, stages=4),
    (8, 4, False): Configuration(64, 64, 32, warps=4, stages=3),
    (8, 4, True): Configuration(64, 64, 16, warps=4, stages=3),
}
LEAST = 64  #: channels of a tile that is cut down for want of programs


def configuration(problem: ConvProblem, itemsize: int, capability: tuple[int, int]) -> Configuration:
    """Tiles for `kernels.dgrad` of elements of `itemsize` bytes (2 or 4) on a GPU of compute capability `capability`, 8.0 or later."""
    on = architecture(capability)
    prologue = pays_to_apply_norm(problem)
    tile = TILES[on, itemsize, prologue]
    block_n, block_k = power_of_two(problem.c, tile.block_n), power_of_two(problem.k, tile.block_k)
    programs = ceil_div(problem.n * problem.h * problem.w, tile.block_m) * ceil_div(problem.c, block_n)
    if not prologue and programs < 2 * MULTIPROCESSORS[on]:
        block_n = min(block_n, LEAST)
    if (on, itemsize, prologue) == (8, 2, False) and block_n <= LEAST:
        tile = replace(tile, stages=3)  # for which half the tile has room; with two, Triton 3.6 spills
    steps = ceil_div(problem.k, block_k) * problem.r * problem.s
    return replace(tile, block_n=block_n, block_k=block_k, stages=min(tile.stages, steps + 1))
