"""Which tiles a forward convolution takes where nothing was measured. Pure functions of the shape and the architecture.

The reasons are arithmetic and what the compiler says (docs/kernels/fprop.md). Tuning by measurement: not done.
"""

from dataclasses import replace

from ..problem import ConvProblem
from .configuration import Configuration

#: Fewer channels than the smallest step along K are not padded to one: the kernel's K axis then runs over whole filter rows.
FEW_CHANNELS = 16
#: Multiprocessors of an architecture's largest GPU: A100; H100 and H200. Later architectures count as the latest here.
MULTIPROCESSORS = {8: 108, 9: 132}
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
    (8, 4, False, False): Configuration(64, 128, 32, warps=8, stages=3),
    (8, 4, False, True): Configuration(64, 128, 32, warps=8, stages=3),
    (8, 4, True, False): Configuration(64, 128, 16, warps=8, stages=4),
    (8, 4, True, True): Configuration(64, 128, 16, warps=8, stages=4),
}
#: Fewest rows and filters of a tile that is cut down for want of programs: one wgmma of a warp group.
LEAST = 64


def _power_of_two(value: int, most: int) -> int:
    return min(max(1 << max(value - 1, 0).bit_length(), 16), most)


def configuration(problem: ConvProblem, itemsize: int, capability: tuple[int, int], prologue: bool) -> Configuration:
    """Tiles for `kernels.fprop` of elements of `itemsize` bytes (2 or 4) on a GPU of compute capability `capability`, 8.0 or later.

    `prologue` tells whether a norm is applied on load.
    """
    architecture = min(capability[0], max(MULTIPROCESSORS))
    taps = problem.r * problem.s
    tile = TILES[architecture, itemsize, prologue, taps > 1]
    block_m, block_n = tile.block_m, _power_of_two(problem.k, tile.block_n)
    rows = problem.n * problem.p * problem.q

    def programs() -> int:
        return -(-rows // block_m) * -(-problem.k // block_n)

    # Smaller tiles where whole ones would not give each multiprocessor two.
    while block_m > LEAST and programs() < 2 * MULTIPROCESSORS[architecture]:
        block_m //= 2
    while block_n > LEAST and programs() < 2 * MULTIPROCESSORS[architecture]:
        block_n //= 2
    few = problem.c < FEW_CHANNELS and taps > 1
    axis = taps * problem.c if few else problem.c
    # A stem's 154 elements are 160 in steps of 32, and 192 in steps of 64.
    block_k = _power_of_two(axis, min(32, tile.block_k) if few else tile.block_k)
    steps = -(-axis // block_k) * (1 if few else taps)
    # What is cut from a tile of eight warps' 128 x 128 is four warps'. TF32 on 8.x spills with four.
    warps = tile.warps if (block_m, block_n) == (tile.block_m, tile.block_n) or (architecture, itemsize) == (8, 4) else 4
    return replace(
        tile, block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=min(tile.stages, steps + 1)
    )
