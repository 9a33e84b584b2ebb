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
def tap(step, STEPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """(r, s, c) of a step along the K axis (r, s, c): a tap, and [BLOCK_K] channels of it, which may pass the last.

    Each tap begins a step of its own, STEPS of a tap and R·S·STEPS in all, so that r and s are scalars.
    """
    if R * S == 1:  # without the divisions, which nothing folds
        return 0, 0, step * BLOCK_K + tl.arange(0, BLOCK_K)
    else:
        return step // STEPS // S, step // STEPS % S, step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def tile_moments(y, valid, count):
    """(mean, M2) [1, channels] of the valid rows of a tile [rows, channels] in float32; `count` is their number, float32.

    Where `valid` is None, all are.

    M2 = Σ (y − mean)² is about the tile's own mean: E[y²] − E[y]² loses all digits where the mean is much larger than the deviation.
    """
    inverse = 1.0 / count
    if valid is not None:
        mean = (tl.sum(tl.where(valid, y, 0.0), axis=0) * inverse)[None, :]
        away = tl.where(valid, y - mean, 0.0)
    else:
        mean = (tl.sum(y, axis=0) * inverse)[None, :]
        away = y - mean
    return mean, tl.sum(away * away, axis=0)[None, :]
