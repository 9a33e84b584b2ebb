"""norm + ReLU + max pool, and its backward."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import output_size
from ..values import Source
from . import tiling
from .elements import passes_gradient, relu, vector
from .launch import SHAPES, PreparedLaunch, multiprocessors
from .norm_backward import PartialSums


@triton.jit
def norm_act_max_pool_kernel(
    x_ptr,  # [N, H, W, C]
    scale_ptr,  # [C] float32, as bias
    bias_ptr,
    out_ptr,  # [N, P, Q, C]
    index_ptr,  # [N, P, Q, C] uint8
    rows,  # N·P·Q
    H,
    W,
    P,
    Q,
    C,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = max over the window of round(relu(fma(x, scale, bias))); index = the tap r·KERNEL + s that won.

    Compares rounded activations, and the first of equals wins, as in PyTorch; a NaN wins. Padding never does.
    Reads x, once from memory where the cache holds the rows that windows share; writes out and index: 2 bytes an element of x
    and 3 an element of out, for elements of 2 bytes. FLOPs: 4 a tap.
    """
    channel_programs = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // channel_programs).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = (tl.program_id(0) % channel_programs) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    valid = (row < rows)[:, None] & inside[None, :]
    q = row % Q
    p = (row // Q) % P
    image = row // Q // P
    scale = vector(scale_ptr, channels, inside)
    bias = vector(bias_ptr, channels, inside)
    best = tl.full([BLOCK_M, BLOCK_C], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
    for r in tl.static_range(KERNEL):
        for s in tl.static_range(KERNEL):
            h = p * STRIDE - PADDING + r
            w = q * STRIDE - PADDING + s
            hit = valid & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            x = tl.load(x_ptr + ((image * H + h) * W + w)[:, None] * C + channels[None, :], mask=hit, other=0.0)
            act = relu(tl.fma(x.to(tl.float32), scale, bias)).to(out_ptr.dtype.element_ty).to(tl.float32)
            # A comparison with NaN is false, so a NaN is let in by name, and nothing gets past one.
            wins = hit & ((act > best) | ((act != act) & (best == best)))
            best = tl.where(wins, act, best)
            index = tl.where(wins, r * KERNEL + s, index)
    at = row[:, None] * C + channels[None, :]
    tl.store(out_ptr + at, best.to(out_ptr.dtype.element_ty), mask=valid)
    tl.store(index_ptr + at, index.to(tl.uint8), mask=valid)


@triton.jit
def norm_act_max_pool_backward_kernel(
    dout_ptr,  # [N, P, Q, C]
    index_ptr,  # [N, P, Q, C] uint8
    x_ptr,  # [N, H, W, C]
    mean_ptr,  # [C] float32, as all vectors
    invstd_ptr,
    scale_ptr,
    bias_ptr,
    dz_ptr,  # [N, H, W, C]
    s1_ptr,  # [partials, C] float32, as s2
    s2_ptr,
    rows,  # N·H·W
    H,
    W,
    P,
    Q,
    C,
    STEPS,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz = round(mask · Σ dout over the windows that the pixel won), and per program Σ dz, Σ dz·x̂ over dz as rounded.

    A gather: at most ⌈KERNEL/STRIDE⌉² windows hold a pixel, and each says which of its taps won. No atomics.
    Reads x and, once from memory, dout and index; writes dz: 4 bytes an element of x and 3 an element of out, for elements of 2
    bytes. FLOPs: 8 and 1 a window.
    """
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    channel_programs = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // channel_programs
    channels = (tl.program_id(0) % channel_programs) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    scale = vector(scale_ptr, channels, inside)
    bias = vector(bias_ptr, channels, inside)
    mean = vector(mean_ptr, channels, inside)
    invstd = vector(invstd_ptr, channels, inside)
    first = part.to(tl.int64) * STEPS * BLOCK_M
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(STEPS):
        row = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = (row < rows)[:, None] & inside[None, :]
        w = row % W
        h = (row // W) % H
        image = row // W // H
        d = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for i in tl.static_range(REACH):
            for j in tl.static_range(REACH):
                p = (h + PADDING) // STRIDE - i
                q = (w + PADDING) // STRIDE - j
                r = h + PADDING - p * STRIDE
                s = w + PADDING - q * STRIDE
                holds = (p >= 0) & (p < P) & (q >= 0) & (q < Q) & (r < KERNEL) & (s < KERNEL)
                hit = valid & holds[:, None]
                at = ((image * P + p) * Q + q)[:, None] * C + channels[None, :]
                won = tl.load(index_ptr + at, mask=hit, other=255).to(tl.int32)
                dout = tl.load(dout_ptr + at, mask=hit, other=0.0).to(tl.float32)
                d += tl.where(won == (r * KERNEL + s)[:, None], dout, 0.0)
        at = row[:, None] * C + channels[None, :]
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        d = tl.where(passes_gradient(tl.fma(x, scale, bias)), d, 0.0)
        rounded = d.to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + at, rounded, mask=valid)
        dz = rounded.to(tl.float32)
        s1 += dz
        s2 += dz * ((x - mean) * invstd)
    sums_at = part * C + channels
    tl.store(s1_ptr + sums_at, tl.sum(s1, axis=0), mask=inside)
    tl.store(s2_ptr + sums_at, tl.sum(s2, axis=0), mask=inside)


@lru_cache(SHAPES)
def _prepared_forward(shape: tuple[int, ...], itemsize: int, kernel_size: int, stride: int, padding: int) -> PreparedLaunch:
    n, channels, height, width = shape
    p, q = (output_size(extent, kernel_size, stride, padding) for extent in (height, width))
    tile = tiling.elementwise(n * p * q, channels, itemsize, loads=1)  # of each of nine taps
    return PreparedLaunch(
        norm_act_max_pool_kernel, tile.programs, tile.warps,
        rows=n * p * q, H=height, W=width, P=p, Q=q, C=channels, KERNEL=kernel_size, STRIDE=stride, PADDING=padding,
        BLOCK_M=tile.block_rows, BLOCK_C=tile.block_channels,
    )  # fmt: skip


def norm_act_max_pool(source: Source, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """`Reference.norm_act_max_pool` in one kernel."""
    x = source.x
    n, channels, height, width = x.shape
    p, q = (output_size(extent, kernel_size, stride, padding) for extent in (height, width))
    out = torch.empty((n, channels, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    index = torch.empty_like(out, dtype=torch.uint8)
    _prepared_forward(x.shape, x.element_size(), kernel_size, stride, padding)(
        x.device, x_ptr=x, scale_ptr=source.scale, bias_ptr=source.bias, out_ptr=out, index_ptr=index
    )
    return out, index


@lru_cache(SHAPES)
def _prepared_backward(
    shape: tuple[int, ...], itemsize: int, window: tuple[int, int, int], multiprocessors: int
) -> tuple[PreparedLaunch, int]:
    """The launch, and how many partial sums it makes."""
    (n, channels, height, width), (kernel_size, stride, padding) = shape, window
    rows = n * height * width
    tile = tiling.reduction(rows, channels, itemsize, multiprocessors, loads=1)
    p, q = (output_size(extent, kernel_size, stride, padding) for extent in (height, width))
    launch = PreparedLaunch(
        norm_act_max_pool_backward_kernel, tile.programs, tile.warps,
        rows=rows, H=height, W=width, P=p, Q=q, C=channels, STEPS=tile.steps, KERNEL=kernel_size, STRIDE=stride, PADDING=padding,
        BLOCK_M=tile.block_rows, BLOCK_C=tile.block_channels,
    )  # fmt: skip
    return launch, tile.row_programs


def norm_act_max_pool_backward(
    dout: Tensor, index: Tensor, source: Source, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`Reference.norm_act_max_pool_backward` in two kernels."""
    x = source.x
    dz = torch.empty_like(x, memory_format=torch.channels_last)
    launch, partials = _prepared_backward(x.shape, x.element_size(), (kernel_size, stride, padding), multiprocessors(x.device))
    sums = PartialSums(partials, x.shape[1], x.device)
    launch(
        x.device, dout_ptr=dout, index_ptr=index, x_ptr=x, mean_ptr=source.mean, invstd_ptr=source.invstd, scale_ptr=source.scale,
        bias_ptr=source.bias, dz_ptr=dz, s1_ptr=sums.s1, s2_ptr=sums.s2,
    )  # fmt: skip
    return dz, *sums.finalise()[:2]
