"""Which tiles a gradient of a weight takes where nothing was measured. Pure functions of the shape and the architecture.

The reasons are arithmetic and what the compiler says (docs/kernels/wgrad.md). Tuning by measurement: not done.
"""

from dataclasses import replace

from ..problem import ConvProblem, ceil_div
from .configuration import Configuration
from .gpu import MULTIPROCESSORS, architecture, power_of_two
from .heuristic_fprop import FEW_CHANNELS

#: (architecture, bytes of an element, prologue) -> tiles for many channels and filters.
TILES = {
    (9, 2, False): Configuration(128, 128, 64, warps=8, stages=3),
    (9, 2, True): Configuration(128, 128, 32, warps=8, stages=2),  # with three, Triton 3.8 takes 132 registers: one program, not two
    (9, 4, False): Configuration(64, 128, 32, warps=4, stages=3),
    (9, 4, True): Configuration(64, 128, 16, warps=4, stages=3),  # with steps of 32, Triton 3.9 spills
    (8, 2, False): Configuration(64, 128, 32, warps=8, stages=3),  # with four, one that is not split spills
    (8, 2, True): Configuration(64, 128, 32, warps=4, stages=2),  # with three, Triton 3.9 spills
    (8, 4, False): Configuration(64, 64, 32, warps=4, stages=3),
    (8, 4, True): Configuration(64, 64, 32, warps=4, stages=3),
}
#: With few channels each element of an activation has an address of its own: short steps, and small tiles, keep them in registers.
FEW_CHANNELS_TILE = Configuration(64, 64, 32, warps=4, stages=3)
WARPS_A_MULTIPROCESSOR = 16  #: as registers let it: two programs of eight warps, or at best four of four
LEAST_STEPS = 8  #: of a split
#: Partial results are written and read, 8 bytes an element and split: where the rest is bound by memory, at most this part of what is read.
MOST_WORKSPACE = 1 / 8
#: Assumed of both, to weigh idle multiprocessors against partial results: a multiprocessor's products, and bytes, a second. A step's
#: instructions take twice as long as its products.
FLOPS_A_SECOND, BYTES_A_SECOND = {8: 2.3e12, 9: 6.0e12}, {8: 1.8e12, 9: 3.0e12}
ISSUE = 2.0


def m_tiles(problem: ConvProblem, block_m: int) -> int:
    """Tiles along (r, s, c): over the channels of each tap, or over taps and channels together where channels are few."""
    taps = problem.r * problem.s
    if problem.c < FEW_CHANNELS and taps > 1:
        return ceil_div(taps * problem.c, block_m)
    return taps * ceil_div(problem.c, block_m)


def configuration(problem: ConvProblem, itemsize: int, capability: tuple[int, int], prologue: bool) -> Configuration:
    """Tiles for `kernels.wgrad` of elements of `itemsize` bytes (2 or 4) on a GPU of compute capability `capability`, 8.0 or later.

    `prologue` tells whether a norm is applied on load.
    """
    on = architecture(capability)
    taps, rows = problem.r * problem.s, problem.n * problem.p * problem.q
    few = problem.c < FEW_CHANNELS and taps > 1
    tile = FEW_CHANNELS_TILE if few else TILES[on, itemsize, prologue]
    block_m = power_of_two(taps * problem.c if few else problem.c, tile.block_m)
    block_n = power_of_two(problem.k, tile.block_n)
    # Long steps, whose arithmetic of coordinates is shared by more products, fit where the tile is small.
    small = on == 9 and itemsize == 2 and prologue and (block_m, block_n) == (64, 64)
    block_k = power_of_two(rows, 2 * tile.block_k if small else tile.block_k)
    warps = tile.warps if block_m * block_n >= tile.block_m * tile.block_n // 2 else 4
    # As many splits as fill the GPU once: more would be waves of their own and more partial results.
    tiles = m_tiles(problem, block_m) * ceil_div(problem.k, block_n)
    programs = MULTIPROCESSORS[on] * WARPS_A_MULTIPROCESSOR // warps
    steps = ceil_div(rows, block_k)
    moved = (problem.n * problem.h * problem.w * problem.c + rows * problem.k) * itemsize
    partial = 8 * taps * problem.c * problem.k  # bytes of a split
    most = max(1, steps // LEAST_STEPS)
    filling = max(1, min(programs // tiles, most, int(MOST_WORKSPACE * moved / partial)))

    def seconds(splits: int) -> float:
        """Estimated time: of the busiest multiprocessor, and of the partial results."""
        of_step = ISSUE * 2 * block_m * block_n * block_k * itemsize / 2 / FLOPS_A_SECOND[on]
        busiest = ceil_div(tiles * splits, MULTIPROCESSORS[on]) * ceil_div(steps, splits) * of_step
        awake = min(1, tiles * splits / MULTIPROCESSORS[on])  # the others' part of the bandwidth is lost
        return max(busiest, moved / BYTES_A_SECOND[on] / awake) + partial * splits * (splits > 1) / BYTES_A_SECOND[on]

    # Beyond what costs little, as many as gain more than their partial results cost: idle multiprocessors are dearer than bytes.
    splits = min(range(filling, max(filling, min(most, 4 * MULTIPROCESSORS[on] // tiles + 1)) + 1), key=seconds)
    return replace(tile, block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=min(tile.stages, steps + 1), splits=splits)
