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
def tap_steps(C, R: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr, FLAT_C: tl.constexpr):
    """How many steps of BLOCK_K the axis (r, s, c) takes, by `tap`."""
    if FLAT_C:
        steps = tl.cdiv(R * S * FLAT_C, BLOCK_K)
    else:
        steps = R * S * tl.cdiv(C, BLOCK_K)
    return steps


@triton.jit
def tap(step, C, R: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr, FLAT_C: tl.constexpr):
    """(r, s, c) of a step along the axis (r, s, c): c is [BLOCK_K] and may pass C.

    Each tap begins a step of its own, so that r and s are scalars. With FLAT_C, which is C as a constant, steps go over taps and
    channels alike, and r and s are [BLOCK_K] too; r may pass R. That is for few channels: padded to a step, most would be padding.
    """
    k = tl.arange(0, BLOCK_K)
    if FLAT_C:
        k += step * BLOCK_K
        r = k // (S * FLAT_C)
        s = k // FLAT_C % S
        c = k % FLAT_C
    elif R * S == 1:
        r = 0
        s = 0
        c = step * BLOCK_K + k
    else:
        blocks = tl.cdiv(C, BLOCK_K)
        r = step // blocks // S
        s = step // blocks % S
        c = step % blocks * BLOCK_K + k
    return r, s, c


@triton.jit
def tile_moments(y, valid, count):
    """(mean, M2) [1, channels] of the valid rows of a tile [rows, channels] in float32; `count` is their number, float32.

    M2 = Σ (y − mean)² is about the tile's own mean: E[y²] − E[y]² loses all digits where the mean is much larger than the deviation.
    """
    mean = (tl.sum(tl.where(valid, y, 0.0), axis=0) / count)[None, :]
    away = tl.where(valid, y - mean, 0.0)
    return mean, tl.sum(away * away, axis=0)[None, :]
