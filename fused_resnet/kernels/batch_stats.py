"""Statistics of a raw convolution output, and the affine map that normalises it."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .elements import vector
from .launch import SHAPES, PreparedLaunch, matrix_shape, multiprocessors


@triton.jit
def batch_stats_partial_kernel(
    y_ptr,  # [rows, C]
    mean_ptr,  # [partials, C] float32
    m2_ptr,  # [partials, C] float32
    rows,
    C,
    STEPS,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The mean of each program's rows, and M2 = Σ (y − mean)² about it, per channel.

    Reads y once; writes 8 bytes per program and channel. FLOPs: about 6 an element. Deterministic.
    Welford's update at each position of the tile, of differences from the program's first row, so that no large numbers are ever
    subtracted: E[y²] − E[y]² loses all digits where the mean is much larger than the deviation. The positions are merged by
    Chan, Golub & LeVeque 1979.
    """
    channel_programs = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // channel_programs
    channels = (tl.program_id(0) % channel_programs) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    lane = tl.arange(0, BLOCK_M)
    first = part.to(tl.int64) * STEPS * BLOCK_M
    shift = vector(y_ptr + first * C, channels, inside)
    mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(STEPS):
        row = first + step * BLOCK_M + lane
        valid = (row < rows)[:, None] & inside[None, :]
        y = tl.load(y_ptr + row[:, None] * C + channels[None, :], mask=valid, other=0.0).to(tl.float32)
        y -= shift
        delta = tl.where(valid, y - mean, 0.0)  # a row past the end changes nothing
        mean += delta * (1.0 / (step + 1))
        m2 += delta * tl.where(valid, y - mean, 0.0)
    # How many rows each position saw.
    count = tl.minimum(tl.maximum((rows - first - lane + BLOCK_M - 1) // BLOCK_M, 0), STEPS).to(tl.float32)[:, None]
    total = tl.sum(count)
    # A product that is chosen is one that stands: see `dgrad`.
    merged = (tl.sum(tl.where(count > 0, count * mean, 0.0), axis=0) / total)[None, :]
    away = mean - merged
    merged_m2 = tl.sum(m2 + count * away * away, axis=0)
    tl.store(mean_ptr + part * C + channels[None, :], shift + merged, mask=inside[None, :])
    tl.store(m2_ptr + part * C + channels, merged_m2, mask=inside)


@triton.jit
def part_count(counts_ptr, part, partials, rows, rows_per_partial):
    """How many rows each partial result stands for, float32: `counts`, or else rows_per_partial in all but the last."""
    if counts_ptr is not None:
        count = tl.load(counts_ptr + part, mask=part < partials, other=0)
    else:
        count = tl.minimum(tl.maximum(rows - part.to(tl.int64) * rows_per_partial, 0), rows_per_partial)
    return count.to(tl.float32)[:, None]


@triton.jit
def merge_moments_kernel(
    partial_mean_ptr,  # [partials, C] float32
    partial_m2_ptr,  # [partials, C] float32
    counts_ptr,  # [partials] int64, or None: of rows_per_partial each
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    count_ptr,  # [groups] int64, or None: rows that each group stands for
    mean_ptr,  # [groups, C] float32, as all that follow
    m2_ptr,  # None, or the only result beside the mean
    invstd_ptr,  # this and all that follow: None with m2, and of one group
    var_ptr,
    scale_ptr,
    bias_ptr,
    partials,
    rows,
    rows_per_partial,
    C,
    eps,
    STEPS,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges the partial (count, mean, M2) of each group of STEPS·BLOCK_M in a fixed order; folds gamma and beta into scale and bias.

    Chan, Golub & LeVeque 1979: M2 = Σ M2ᵢ + Σ nᵢ (meanᵢ − mean)². Two passes over the partial results, which the cache holds.
    Reads 8 bytes per partial result and channel, writes 20 bytes a channel.
    """
    channel_programs = tl.cdiv(C, BLOCK_C)
    group = tl.program_id(0) // channel_programs
    channels = tl.program_id(0) % channel_programs * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    first = group * STEPS * BLOCK_M
    lane = first + tl.arange(0, BLOCK_M)
    # About the first partial mean: the sum is then of differences, and as precise as they are small.
    shift = tl.load(partial_mean_ptr + first * C + channels, mask=inside, other=0.0)
    offset = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    counted = tl.zeros([BLOCK_M, 1], tl.float32)
    for step in range(STEPS):
        part = step * BLOCK_M + lane
        valid = (part < partials)[:, None] & inside[None, :]
        count = part_count(counts_ptr, part, partials, rows, rows_per_partial)
        counted += count
        mean = tl.load(partial_mean_ptr + part[:, None] * C + channels[None, :], mask=valid, other=0.0)
        offset += tl.where(valid, count * (mean - shift[None, :]), 0.0)
    n = tl.sum(counted)
    merged = shift + tl.sum(offset, axis=0) / n
    m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(STEPS):
        part = step * BLOCK_M + lane
        valid = (part < partials)[:, None] & inside[None, :]
        count = part_count(counts_ptr, part, partials, rows, rows_per_partial)
        mean = tl.load(partial_mean_ptr + part[:, None] * C + channels[None, :], mask=valid, other=0.0)
        own = tl.load(partial_m2_ptr + part[:, None] * C + channels[None, :], mask=valid, other=0.0)
        m2 += tl.where(valid, own + count * (mean - merged[None, :]) * (mean - merged[None, :]), 0.0)
    total_m2 = tl.sum(m2, axis=0)
    at = group * C + channels
    tl.store(mean_ptr + at, merged, mask=inside)
    if count_ptr is not None:
        tl.store(count_ptr + group, n.to(tl.int64))
    if m2_ptr is not None:
        tl.store(m2_ptr + at, total_m2, mask=inside)
    else:
        var = total_m2 / n
        invstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
        scale = invstd
        if gamma_ptr is not None:
            scale = invstd * tl.load(gamma_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        bias = -merged * scale
        if beta_ptr is not None:
            bias = tl.fma(-merged, scale, tl.load(beta_ptr + channels, mask=inside, other=0.0).to(tl.float32))
        tl.store(invstd_ptr + channels, invstd, mask=inside)
        tl.store(var_ptr + channels, var, mask=inside)
        tl.store(scale_ptr + channels, scale, mask=inside)
        tl.store(bias_ptr + channels, bias, mask=inside)


#: What merging gives: all, of a norm that is to be applied; else what is merged again.
MOMENTS, COEFFICIENTS = ("mean", "m2"), ("mean", "invstd", "var", "scale", "bias")


@lru_cache(SHAPES)
def _prepared_merge(partials: int, channels: int, rows: int, rows_per_partial: int, eps: float) -> tuple[PreparedLaunch, int]:
    """The launch, and how many results of each channel it makes."""
    merge = tiling.finalisation(partials, channels)
    launch = PreparedLaunch(
        merge_moments_kernel, merge.programs, merge.warps,
        partials=partials, rows=rows, rows_per_partial=rows_per_partial, C=channels, eps=eps, STEPS=merge.steps,
        BLOCK_M=merge.block_rows, BLOCK_C=merge.block_channels,
    )  # fmt: skip
    return launch, merge.row_programs


def _merge(
    means: Tensor,
    m2s: Tensor,
    counts: Tensor | None = None,
    rows: int = 0,
    rows_per_partial: int = 0,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, ...]:
    """(mean, M2), or with `eps` (mean, invstd, var, scale, bias), of partial results [partials, C]."""
    partials, channels = means.shape
    launch, groups = _prepared_merge(partials, channels, rows, rows_per_partial, eps or 0.0)
    device, last = means.device, groups == 1
    shape = channels if last else (groups, channels)
    names = MOMENTS if eps is None or not last else COEFFICIENTS
    results = {f"{name}_ptr": torch.empty(shape, dtype=torch.float32, device=device) for name in names}
    if last:
        launch(device, partial_mean_ptr=means, partial_m2_ptr=m2s, counts_ptr=counts, gamma_ptr=gamma, beta_ptr=beta, **results)
        return tuple(results.values())
    count = torch.empty(groups, dtype=torch.int64, device=device)
    launch(device, partial_mean_ptr=means, partial_m2_ptr=m2s, counts_ptr=counts, count_ptr=count, **results)
    return _merge(*results.values(), count, gamma=gamma, beta=beta, eps=eps)


@lru_cache(SHAPES)
def _prepared_partial(rows: int, channels: int, itemsize: int, multiprocessors: int) -> tuple[PreparedLaunch, int, int]:
    """The launch, how many partial results it makes, and of how many rows each."""
    tile = tiling.reduction(rows, channels, itemsize, multiprocessors, loads=2)
    launch = PreparedLaunch(
        batch_stats_partial_kernel, tile.programs, tile.warps,
        rows=rows, C=channels, STEPS=tile.steps, BLOCK_M=tile.block_rows, BLOCK_C=tile.block_channels,
    )  # fmt: skip
    return launch, tile.row_programs, tile.rows_per_program


def _reduce(y: Tensor, **coefficients: Tensor | float | None) -> tuple[Tensor, ...]:
    """The partial results of y, merged."""
    rows, channels = matrix_shape(y)
    launch, partials, rows_per_partial = _prepared_partial(rows, channels, y.element_size(), multiprocessors(y.device))
    means = torch.empty((partials, channels), dtype=torch.float32, device=y.device)
    m2s = torch.empty_like(means)
    launch(y.device, y_ptr=y, mean_ptr=means, m2_ptr=m2s)
    return _merge(means, m2s, rows=rows, rows_per_partial=rows_per_partial, **coefficients)


def batch_stats(y: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """`Reference.batch_stats` in two kernels: y is read once."""
    return _reduce(y, gamma=gamma, beta=beta, eps=eps)


def batch_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """`Reference.batch_moments` in two kernels: y is read once."""
    return _reduce(y)


def merge_moments(counts: Tensor, means: Tensor, m2s: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """`Reference.merge_moments` in one kernel."""
    return _merge(means, m2s, counts, gamma=gamma, beta=beta, eps=eps)
