"""Backward of norm + residual + ReLU: the reduction to (dz, s1, s2), and batch norm's backward."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..values import Source
from . import tiling
from .elements import batch_norm_backward, passes_gradient, unpack_bits, vector
from .launch import SHAPES, PreparedLaunch, matrix_shape, multiprocessors


@triton.jit
def norm_backward_reduce_kernel(
    d_ptr,  # [rows, C]; [rows / PIXELS, C] with PIXELS
    dact_ptr,  # [rows, C] or None
    x_ptr,  # [rows, C]
    mean_ptr,  # [C] float32, as all vectors
    invstd_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,  # [rows, C] where the residual is raw, else None, as its mean and invstd
    residual_mean_ptr,
    residual_invstd_ptr,
    mask_ptr,  # [rows, ⌈C/8⌉] uint8, or None: recomputed from x
    dz_ptr,  # [rows, C]
    s1_ptr,  # [partials, C] float32, as s2 and residual_s2
    s2_ptr,
    residual_s2_ptr,
    rows,
    pixels,
    C,
    STEPS,
    RELU: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz = round((d + dact)·mask), and per program Σ dz, Σ dz·x̂, Σ dz·x̂ of a raw residual, over dz as rounded.

    With PIXELS, d is the gradient of a global average pool: one value for `pixels` rows, divided by their number.
    Reads d, dact, x and a raw residual, writes dz: 6 to 10 bytes an element of 2 bytes, 1/8 with the mask, and 8 or 12 bytes per
    program and channel. FLOPs: 6 to 12. Deterministic.
    """
    channel_programs = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // channel_programs
    block = tl.program_id(0) % channel_programs
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    mean = vector(mean_ptr, channels, inside)
    invstd = vector(invstd_ptr, channels, inside)
    first = part.to(tl.int64) * STEPS * BLOCK_M
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    residual_s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(STEPS):
        row = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * C + channels[None, :]
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if PIXELS:
            d = tl.load(d_ptr + (row // pixels)[:, None] * C + channels[None, :], mask=valid, other=0.0).to(tl.float32)
            d = tl.div_rn(d, tl.zeros_like(d) + tl.cast(pixels, tl.float32))
        else:
            d = tl.load(d_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if dact_ptr is not None:
            d += tl.load(dact_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if RELU:
            if mask_ptr is not None:
                octets = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
                width = tl.cdiv(C, 8)
                here = (row < rows)[:, None] & (octets < width)[None, :]
                packed = tl.load(mask_ptr + row[:, None] * width + octets[None, :], mask=here, other=0)
                keep = unpack_bits(packed, BLOCK_M, BLOCK_C)
            else:
                z = tl.fma(x, vector(scale_ptr, channels, inside), vector(bias_ptr, channels, inside))
                keep = passes_gradient(z)
            d = tl.where(keep, d, 0.0)
        rounded = d.to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + at, rounded, mask=valid)
        dz = rounded.to(tl.float32)
        s1 += dz
        # Past the end x is 0 and dz too; 0·x̂ is 0, for x̂ of finite statistics.
        s2 += dz * ((x - mean) * invstd)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + at, mask=valid, other=0.0).to(tl.float32)
            residual_mean = vector(residual_mean_ptr, channels, inside)
            residual_invstd = vector(residual_invstd_ptr, channels, inside)
            residual_s2 += dz * ((residual - residual_mean) * residual_invstd)
    sums_at = part * C + channels
    tl.store(s1_ptr + sums_at, tl.sum(s1, axis=0), mask=inside)
    tl.store(s2_ptr + sums_at, tl.sum(s2, axis=0), mask=inside)
    if residual_ptr is not None:
        tl.store(residual_s2_ptr + sums_at, tl.sum(residual_s2, axis=0), mask=inside)


@triton.jit
def sums_finalise_kernel(
    partial_ptr,  # [sums, partials, C] float32
    s1_ptr,  # [groups, C] float32, as all that follow
    s2_ptr,
    residual_s2_ptr,  # None where there are two sums
    partials,
    groups,  # of STEPS·BLOCK_M partial results
    C,
    STEPS,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds each group's partial sums in a fixed order. Reads 4 bytes per partial sum and channel, writes 4 a channel, group and sum."""
    channel_programs = tl.cdiv(C, BLOCK_C)
    row = tl.program_id(0) // channel_programs
    which = row // groups
    group = row % groups
    channels = (tl.program_id(0) % channel_programs) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(STEPS):
        part = (group * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = (part < partials)[:, None] & inside[None, :]
        total += tl.load(partial_ptr + (which * partials + part)[:, None] * C + channels[None, :], mask=valid, other=0.0)
    result = tl.sum(total, axis=0)
    at = group * C + channels
    # Branches, since the interpreter of Triton 3.9 takes no mask that a scalar is a part of.
    if which == 0:
        tl.store(s1_ptr + at, result, mask=inside)
    if which == 1:
        tl.store(s2_ptr + at, result, mask=inside)
    if residual_s2_ptr is not None:  # noqa: SIM102  (decided while compiling; joined by `and`, both would be computed)
        if which == 2:
            tl.store(residual_s2_ptr + at, result, mask=inside)


@triton.jit
def norm_backward_apply_kernel(
    dz_ptr,  # [rows, C]
    y_ptr,  # [rows, C]
    mean_ptr,  # [C] float32, as all vectors
    invstd_ptr,
    gamma_ptr,  # or None
    s1_ptr,
    s2_ptr,
    dy_ptr,  # [rows, C]
    rows,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy = round(gamma·invstd·(dz − s1/n − x̂·s2/n)), n = rows. Ioffe & Szegedy 2015, section 3.

    Reads dz and y, writes dy: 6 bytes an element of 2 bytes. FLOPs: 6.
    """
    channel_programs = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // channel_programs).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = (tl.program_id(0) % channel_programs) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    valid = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * C + channels[None, :]
    dz = tl.load(dz_ptr + at, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=valid, other=0.0).to(tl.float32)
    gamma = None
    if gamma_ptr is not None:
        gamma = vector(gamma_ptr, channels, inside)
    mean = vector(mean_ptr, channels, inside)
    invstd = vector(invstd_ptr, channels, inside)
    s1 = vector(s1_ptr, channels, inside)
    s2 = vector(s2_ptr, channels, inside)
    dy = batch_norm_backward(dz, y, mean, invstd, gamma, s1, s2, 1.0 / tl.cast(rows, tl.float32))
    tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=valid)


@lru_cache(SHAPES)
def _prepared_finalise(kinds: int, partials: int, channels: int) -> tuple[PreparedLaunch, int]:
    """The launch, and how many results of each kind and channel it makes."""
    merge = tiling.finalisation(partials, channels)
    groups = merge.row_programs
    launch = PreparedLaunch(
        sums_finalise_kernel, kinds * merge.programs, merge.warps,
        partials=partials, groups=groups, C=channels, STEPS=merge.steps, BLOCK_M=merge.block_rows, BLOCK_C=merge.block_channels,
    )  # fmt: skip
    return launch, groups


class PartialSums:
    """The sums of a backward reduction: per program first, then finalised. s1, s2 and, of a raw residual, its s2; each [partials, C]."""

    def __init__(self, partials: int, channels: int, device: torch.device, raw_residual: bool = False):
        self.device = device
        self.partial = torch.empty((3 if raw_residual else 2, partials, channels), dtype=torch.float32, device=device)
        self.s1, self.s2 = self.partial[0], self.partial[1]
        self.residual_s2 = self.partial[2] if raw_residual else None

    def finalise(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(s1, s2, residual_s2), each [C] float32."""
        partial = self.partial
        kinds, partials, channels = partial.shape
        while True:  # twice, where the partial results are many
            launch, groups = _prepared_finalise(kinds, partials, channels)
            if groups == 1:
                # The results are tensors of their own, since what an operator hands out may not share memory.
                sums = [torch.empty(channels, dtype=torch.float32, device=self.device) for _ in range(kinds)]
            else:
                sums = torch.empty((kinds, groups, channels), dtype=torch.float32, device=self.device)
            third = sums[2] if kinds == 3 else None
            launch(self.device, partial_ptr=partial, s1_ptr=sums[0], s2_ptr=sums[1], residual_s2_ptr=third)
            if groups == 1:
                return sums[0], sums[1], third
            partial, partials = sums, groups


@lru_cache(SHAPES)
def _prepared_reduce(matrix: tuple[int, int], itemsize: int, relu: bool, pixels: int, multiprocessors: int) -> tuple[PreparedLaunch, int]:
    """The launch, and how many partial sums it makes."""
    rows, channels = matrix
    tile = tiling.reduction(rows, channels, itemsize, multiprocessors, loads=1)
    launch = PreparedLaunch(
        norm_backward_reduce_kernel, tile.programs, tile.warps,
        rows=rows, pixels=pixels, C=channels, STEPS=tile.steps, RELU=relu, PIXELS=pixels > 0,
        BLOCK_M=tile.block_rows, BLOCK_C=tile.block_channels,
    )  # fmt: skip
    return launch, tile.row_programs


def norm_backward_reduce(
    d: Tensor, dact: Tensor | None, source: Source, mask: Tensor | None, relu: bool, pixels: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`Reference.norm_backward_reduce` in two kernels; with `pixels` = H·W, d is [N, C, 1, 1], of a global average pool."""
    x = source.x
    dz = torch.empty_like(x, memory_format=torch.channels_last)
    raw = source.residual_mean is not None
    launch, partials = _prepared_reduce(matrix_shape(x), x.element_size(), relu, pixels, multiprocessors(x.device))
    sums = PartialSums(partials, x.shape[1], x.device, raw)
    launch(
        x.device, d_ptr=d, dact_ptr=dact, x_ptr=x, mean_ptr=source.mean, invstd_ptr=source.invstd, scale_ptr=source.scale,
        bias_ptr=source.bias, residual_ptr=source.residual if raw else None, residual_mean_ptr=source.residual_mean,
        residual_invstd_ptr=source.residual_invstd, mask_ptr=mask, dz_ptr=dz, s1_ptr=sums.s1, s2_ptr=sums.s2,
        residual_s2_ptr=sums.residual_s2,
    )  # fmt: skip
    return dz, *sums.finalise()


@lru_cache(SHAPES)
def _prepared_apply(rows: int, channels: int, itemsize: int) -> PreparedLaunch:
    tile = tiling.elementwise(rows, channels, itemsize)
    return PreparedLaunch(
        norm_backward_apply_kernel, tile.programs, tile.warps, rows=rows, C=channels, BLOCK_M=tile.block_rows, BLOCK_C=tile.block_channels
    )


def norm_backward_apply(dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None, s1: Tensor, s2: Tensor) -> Tensor:
    """`Reference.norm_backward_apply` in one kernel."""
    dy = torch.empty_like(y, memory_format=torch.channels_last)
    _prepared_apply(*matrix_shape(y), y.element_size())(
        y.device, dz_ptr=dz, y_ptr=y, mean_ptr=mean, invstd_ptr=invstd, gamma_ptr=gamma, s1_ptr=s1, s2_ptr=s2, dy_ptr=dy
    )
    return dy
