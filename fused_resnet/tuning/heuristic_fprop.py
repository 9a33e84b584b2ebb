"""Which tiles a forward convolution takes where nothing was measured. Pure functions of the shape and the architecture.

The reasons are arithmetic and what the compiler says (docs/kernels/fprop.md). Tuning by measurement: not done.
"""

from dataclasses import replace

from ..problem import ConvProblem, ceil_div
from .configuration import Configuration
from .gpu import MULTIPROCESSORS, architecture, power_of_two

#: Fewer channels than the smallest step along K are not padded to one: the kernel's K axis then runs over whole filter rows.
FEW_CHANNELS = 16
#: (architecture, bytes of an element, prologue, more than one tap) -> tiles for many rows and filters. The largest accumulator with
#: which two programs or more share a multiprocessor, so that one's epilogue hides behind another's main loop, as far as registers let
#: it: a prologue's short steps keep few of its values alive at a time.
TILES = {
    (9, 2, False, False): Configuration(128, 128, 64, warps=8, stages=3),
    (9, 2, False, True): Configuration(128, 128, 64, warps=8, stages=3),
    (9, 2, True, False): Configuration(64, 128, 32, warps=4, stages=4),
    (9, 2, True, True): Configuration(128, 128, 32, warps=8, stages=4),
    (9, 4, False, False): Configuration(128, 128, 32, warps=8, stages=3),
    (9, 4, False, True): Configuration(128, 128, 32, warps=8, stages=3),
    (9, 4, True, False): Configuration(64, 128, 16, warps=4, stages=4),
    (9, 4, True, True): Configuration(64, 128, 16, warps=4, stages=4),
    (8, 2, False, False): Configuration(64, 128, 32, warps=4, stages=4),
    (8, 2, False, True): Configuration(64, 128, 32, warps=4, stages=4),
    (8, 2, True, False): Configuration(64, 128, 16, warps=4, stages=5),
    (8, 2, True, True): Configuration(64, 128, 32, warps=4, stages=4),
    (8, 4, False, False): Configuration(64, 128, 16, warps=8, stages=3),  # with four, Triton 3.9 spills
    (8, 4, False, True): Configuration(64, 128, 16, warps=8, stages=4),
    (8, 4, True, False): Configuration(64, 128, 16, warps=8, stages=4),
    (8, 4, True, True): Configuration(64, 128, 16, warps=8, stages=4),
}
#: Fewest rows and filters of a tile that is cut down for want of programs: one wgmma of a warp group.
LEAST = 64


def configuration(problem: ConvProblem, itemsize: int, capability: tuple[int, int], prologue: bool) -> Configuration:
    """Tiles for `kernels.fprop` of elements of `itemsize` bytes (2 or 4) on a GPU of compute capability `capability`, 8.0 or later.

    `prologue` tells whether a norm is applied on load.
    """
    on = architecture(capability)
    taps = problem.r * problem.s
    tile = TILES[on, itemsize, prologue, taps > 1]
    block_m, block_n = tile.block_m, power_of_two(problem.k, tile.block_n)
    rows = problem.n * problem.p * problem.q

    def programs() -> int:
        return ceil_div(rows, block_m) * ceil_div(problem.k, block_n)

    # Smaller tiles where whole ones would not give each multiprocessor two.
    while block_m > LEAST and programs() < 2 * MULTIPROCESSORS[on]:
        block_m //= 2
    while block_n > LEAST and programs() < 2 * MULTIPROCESSORS[on]:
        block_n //= 2
    few = problem.c < FEW_CHANNELS and taps > 1
    axis = taps * problem.c if few else problem.c
    # A stem's 154 elements are 160 in steps of 32, and 192 in steps of 64.
    block_k = power_of_two(axis, min(32, tile.block_k) if few else tile.block_k)
    steps = ceil_div(axis, block_k) * (1 if few else taps)
    # What is cut from a tile of eight warps' 128 x 128 is four warps'. On 8.x the smallest tile is eight warps': with four, Triton 3.8's
    # ptxas spills four registers to fit one program more, and TF32 spills with every Triton. Steps of 16 are too small for eight: a
    # thread would copy 8 bytes of the filter. A float32 stem is eight warps' everywhere: in IEEE precision Triton 3.9's ptxas spills
    # with four on 9.0.
    cut = (block_m, block_n) != (tile.block_m, tile.block_n)
    eight = on == 8 and (itemsize == 4 or ((block_m, block_n) == (LEAST, LEAST) and block_k >= 32 and not few))
    eight = eight or (few and itemsize == 4)
    warps = 8 if eight else 4 if cut else tile.warps
    # With four stages Triton 3.6's ptxas keeps the smallest tile to 80 registers, and spills where a norm's 3x3 has a stride.
    short = (on, itemsize, prologue, block_m, block_n) == (8, 2, True, LEAST, LEAST) and taps > 1
    stages = min(3 if short else tile.stages, steps + 1)
    return replace(tile, block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages)
