"""The norm's statistics from Σ y and Σ y², which cuDNN's graphs hand out, without the digits that such sums lose."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import vector
from .launch import SHAPES, PreparedLaunch, matrix_shape

#: Σ y² over M2 = Σ (y − mean)², which is 1 + (mean/deviation)², from which on the sums are not trusted. The difference loses as many
#: digits: sums of float32 whose relative error is 1e-6 give a variance that is right to 6e-5, a quarter of float16's half ulp.
LIMIT = 64.0
BLOCK_M, BLOCK_C = 64, 16


@triton.jit
def moments_of_sums_kernel(
    y_ptr,  # [rows, C]
    sum_ptr,  # [C] float32, as all vectors but gamma and beta
    square_sum_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    mean_ptr,
    invstd_ptr,
    var_ptr,
    scale_ptr,
    bias_ptr,
    rows,
    C,
    eps,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean = Σ y/n and M2 = Σ y² − (Σ y)²/n where that keeps its digits; else both again from y, in two passes about its first row.

    Reads 8 bytes and writes 20 bytes a channel; of channels that are not trusted, y twice, by one program for 16 channels: slow, and
    rare. The decision is made on the device, so nothing waits for it and a CUDA graph may capture it. Deterministic.
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    n = rows * 1.0
    total = tl.load(sum_ptr + channels, mask=inside, other=0.0)
    squares = tl.load(square_sum_ptr + channels, mask=inside, other=0.0)
    mean = total / n
    m2 = tl.fma(-total, mean, squares)
    untrusted = (squares > LIMIT * m2) & inside  # false for a NaN, which stays one
    if tl.max(untrusted.to(tl.int32)) > 0:
        lane = tl.arange(0, BLOCK_M)
        first = vector(y_ptr, channels, inside)
        offset = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start in range(0, rows, BLOCK_M):
            row = start + lane.to(tl.int64)
            valid = (row < rows)[:, None] & inside[None, :]
            y = tl.load(y_ptr + row[:, None] * C + channels[None, :], mask=valid, other=0.0).to(tl.float32)
            offset += tl.where(valid, y - first, 0.0)
        again = first + (tl.sum(offset, axis=0) / n)[None, :]
        away = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start in range(0, rows, BLOCK_M):
            row = start + lane.to(tl.int64)
            valid = (row < rows)[:, None] & inside[None, :]
            y = tl.load(y_ptr + row[:, None] * C + channels[None, :], mask=valid, other=0.0).to(tl.float32)
            away += tl.where(valid, (y - again) * (y - again), 0.0)
        mean = tl.where(untrusted, tl.reshape(again, [BLOCK_C]), mean)
        m2 = tl.where(untrusted, tl.sum(away, axis=0), m2)
    var = m2 / n
    invstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = invstd
    if gamma_ptr is not None:
        scale = invstd * tl.load(gamma_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    bias = -mean * scale
    if beta_ptr is not None:
        bias = tl.fma(-mean, scale, tl.load(beta_ptr + channels, mask=inside, other=0.0).to(tl.float32))
    tl.store(mean_ptr + channels, mean, mask=inside)
    tl.store(invstd_ptr + channels, invstd, mask=inside)
    tl.store(var_ptr + channels, var, mask=inside)
    tl.store(scale_ptr + channels, scale, mask=inside)
    tl.store(bias_ptr + channels, bias, mask=inside)


@lru_cache(SHAPES)
def _prepared(rows: int, channels: int, eps: float, limit: float) -> PreparedLaunch:
    return PreparedLaunch(
        moments_of_sums_kernel, triton.cdiv(channels, BLOCK_C), 4,
        rows=rows, C=channels, eps=eps, LIMIT=limit, BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C,
    )  # fmt: skip


def moments_of_sums(y: Tensor, total: Tensor, squares: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """`Reference.batch_stats` of y [N, K, P, Q] from its sums: total = Σ y and squares = Σ y², [K] float32."""
    rows, channels = matrix_shape(y)
    names = ("mean", "invstd", "var", "scale", "bias")
    results = {f"{name}_ptr": torch.empty(channels, dtype=torch.float32, device=y.device) for name in names}
    launch = _prepared(rows, channels, eps, LIMIT)
    launch(y.device, y_ptr=y, sum_ptr=total, square_sum_ptr=squares, gamma_ptr=gamma, beta_ptr=beta, **results)
    return tuple(results.values())
