"""What the convolution kernels share: tiles in launch order, and pixels of a GEMM's rows. All tensors are NHWC."""

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
