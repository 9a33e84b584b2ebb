"""What the convolution kernels share: tiles in launch order, pixels of a GEMM's rows, taps of its K axis. All tensors are NHWC."""

import triton
import triton.language as tl


@triton.jit
def tile(n_tiles):
    """(m, n) of this program's tile. The N tiles of one M tile follow each other, so that their common rows are read from L2."""
    program = tl.program_id(0)
    return program // n_tiles, program % n_tiles


@triton.jit
def pixel(row, HEIGHT, WIDTH):
    """(image, y, x) of a row of the matrix [N·HEIGHT·WIDTH, channels]."""
    x = row % WIDTH
    rest = row // WIDTH
    return rest // HEIGHT, rest % HEIGHT, x


@triton.jit
def tap(step, C, R: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """(r, s, c) of a step along the K axis (r, s, c): a tap, and [BLOCK_K] channels of it, which may pass C.

    Each tap begins a step of its own, R·S·⌈C / BLOCK_K⌉ in all, so that r and s are scalars.
    """
    if R * S == 1:  # without the divisions, which nothing folds
        return 0, 0, step * BLOCK_K + tl.arange(0, BLOCK_K)
    else:
        blocks = tl.cdiv(C, BLOCK_K)
        return step // blocks // S, step // blocks % S, step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def tile_moments(y, valid, count):
    """(mean, M2) [1, channels] of the valid rows of a tile [rows, channels] in float32; `count` is their number, float32.

    M2 = Σ (y − mean)² is about the tile's own mean: E[y²] − E[y]² loses all digits where the mean is much larger than the deviation.
    """
    mean = (tl.sum(tl.where(valid, y, 0.0), axis=0) / count)[None, :]
    away = tl.where(valid, y - mean, 0.0)
    return mean, tl.sum(away * away, axis=0)[None, :]
