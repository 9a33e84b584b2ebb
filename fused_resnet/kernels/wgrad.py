"""Gradient of a convolution's weight: the activation made on load, pixels split over programs, partial results added in order."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import ConvProblem, ceil_div
from ..reference import like_weight
from ..tuning import Configuration
from ..tuning.heuristic_fprop import FEW_CHANNELS
from ..tuning.heuristic_wgrad import m_tiles
from ..values import ConvGeometry, Source, problem_of
from .elements import relu, vector
from .implicit_gemm import pixel, tile
from .launch import SHAPES, PreparedLaunch
from .tiling import finalisation_of_splits


@triton.jit
def conv_wgrad_norm_act_kernel(
    x_ptr,  # [N, H, W, C]
    scale_ptr,  # [C] float32, as bias; None where x is materialised
    bias_ptr,
    dy_ptr,  # [rows, K], rows = N·P·Q
    out_ptr,  # [splits, elements of the weight]: dw, or partial results in float32
    rows,
    rows_per_split,  # a multiple of BLOCK_K
    C,
    K,
    out_split,  # strides of out, in elements
    out_k,
    out_c,
    out_r,
    out_s,
    H: tl.constexpr,  # as W, P and Q: 0 where an output pixel is an input pixel. Divisions by what is known are short.
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    FLAT_C: tl.constexpr,  # C where the M axis runs over (r, s, c) without gaps, else 0
    PRECISION: tl.constexpr,  # of a float32 product: "tf32" or "ieee"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = Σ act·dy over the pixels of a split, act = round(relu(fma(x, scale, bias))) or x; a tap on padding adds nothing.

    The GEMM's axes: M over (r, s, c), N over K, K over output pixels. It computes dwᵀ, so that the operand that is made on load is A.
    """
    n_tiles = tl.cdiv(K, BLOCK_N)
    m_tiles = tl.cdiv(R * S * FLAT_C, BLOCK_M) if FLAT_C else R * S * tl.cdiv(C, BLOCK_M)
    # The tiles of one split follow each other, so that its pixels are read from L2 but for the first time.
    m, n = tile(n_tiles)
    split = m // m_tiles
    m = m % m_tiles
    lane = tl.arange(0, BLOCK_M)
    if FLAT_C:
        element = m * BLOCK_M + lane
        r = element // (S * FLAT_C)
        s = element // FLAT_C % S
        c = element % FLAT_C
        inside = element < R * S * FLAT_C
    else:
        blocks = tl.cdiv(C, BLOCK_M)
        r = m // blocks // S
        s = m // blocks % S
        c = m % blocks * BLOCK_M + lane
        inside = c < C
    filters = n * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_filter = (filters < K)[None, :]
    scale = None
    bias = None
    if scale_ptr is not None:
        scale = vector(scale_ptr, c, inside)
        bias = vector(bias_ptr, c, inside)
    PADDED: tl.constexpr = PADDING_H + PADDING_W > 0
    first = split * rows_per_split
    steps = tl.cdiv(tl.minimum(rows - first, rows_per_split), BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        start = first + step * BLOCK_K
        step_lane = tl.arange(0, BLOCK_K)
        valid_row = (start + step_lane < rows)[:, None]
        # 64-bit offsets end at the step's first pixel or image; from there on 32 bits do.
        if R * S * STRIDE_H * STRIDE_W == 1 and not PADDED:  # an output pixel is an input pixel
            origin = start.to(tl.int64)
            at = (step_lane * C)[:, None] + c[None, :]
            valid = valid_row & inside[None, :]
        else:
            image, p, q = pixel(start + step_lane, P, Q)
            first_image = start // (P * Q)
            origin = first_image.to(tl.int64) * (H * W)
            h = (p * STRIDE_H - PADDING_H)[:, None] + r * DILATION_H
            w = (q * STRIDE_W - PADDING_W)[:, None] + s * DILATION_W
            on_image = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            valid = valid_row & inside[None, :] & on_image
            at = (((image - first_image)[:, None] * H + h) * W + w) * C + c[None, :]
            if not FLAT_C:
                # A tap on padding adds nothing: its pixel's dy is not loaded. To mask act instead, which is not 0 there, would take the
                # coordinates of each of the operand's registers once more.
                valid_row = valid_row & on_image
        a = tl.load(x_ptr + origin * C + at, mask=valid, other=0.0)
        if scale_ptr is not None:
            a = relu(tl.fma(a.to(tl.float32), scale, bias)).to(a.dtype)
            if FLAT_C:
                a = tl.where(valid, a, 0.0)
        dy_at = (step_lane * K)[:, None] + filters[None, :]
        b = tl.load(dy_ptr + start.to(tl.int64) * K + dy_at, mask=valid_row & valid_filter, other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_N]
    element_at = r * out_r + s * out_s + c * out_c
    out_at = split.to(tl.int64) * out_split + element_at[:, None] + (filters * out_k)[None, :]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & valid_filter)


@triton.jit
def wgrad_finalise_kernel(
    partial_ptr,  # [splits, elements] float32
    dw_ptr,  # [elements]
    splits,
    elements,
    STEPS,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dw = round(Σ partial) in a fixed order, BLOCK_S splits at a time. Reads 4 bytes an element and split, writes dw."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    for step in range(STEPS):
        split = step * BLOCK_S + tl.arange(0, BLOCK_S)
        there = (split < splits)[:, None] & (at < elements)[None, :]
        total += tl.load(partial_ptr + split.to(tl.int64)[:, None] * elements + at[None, :], mask=there, other=0.0)
    tl.store(dw_ptr + at, tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty), mask=at < elements)


class _Prepared(NamedTuple):
    """The gradient of a weight of a shape."""

    splits: int
    launch: PreparedLaunch
    finalise: PreparedLaunch | None  #: adds the splits


@lru_cache(SHAPES)
def _prepared(problem: ConvProblem, dw_stride: tuple[int, ...], configuration: Configuration, allow_tf32: bool) -> _Prepared:
    """Raises ValueError for what the kernel can't take."""
    (n, c, h, w), (k, r, s), (p, q) = (
        (problem.n, problem.c, problem.h, problem.w),
        (problem.k, problem.r, problem.s),
        (problem.p, problem.q),
    )
    stride, padding, dilation = problem.stride, problem.padding, problem.dilation
    if problem.groups != 1:
        raise ValueError(f"geometry: expected groups = 1; got {problem.groups}")
    rows, elements = n * p * q, problem.weight_elements
    spanned = 0 if problem.pointwise else min(n, configuration.block_k // (p * q) + 2) * h * w * c
    if max(spanned, rows + configuration.block_k) >= 2**31:
        raise ValueError(f"source: expected fewer than 2**31 elements in the images of a step, and output pixels; got {spanned} and {rows}")
    rows_per_split = ceil_div(ceil_div(rows, configuration.splits), configuration.block_k) * configuration.block_k
    splits = ceil_div(rows, rows_per_split)  # none of them is empty
    flat = c if c < FEW_CHANNELS and r * s > 1 else 0
    out_k, out_c, out_r, out_s = dw_stride
    extents = dict.fromkeys("HWPQ", 0) if problem.pointwise else {"H": h, "W": w, "P": p, "Q": q}
    programs = splits * m_tiles(problem, configuration.block_m) * ceil_div(k, configuration.block_n)
    launch = PreparedLaunch(
        conv_wgrad_norm_act_kernel, programs, configuration.warps, configuration.stages,
        rows=rows, rows_per_split=rows_per_split, C=c, K=k, out_split=elements, out_k=out_k, out_c=out_c, out_r=out_r, out_s=out_s,
        **extents, R=r, S=s, STRIDE_H=stride[0], STRIDE_W=stride[1], PADDING_H=padding[0], PADDING_W=padding[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1], FLAT_C=flat, PRECISION="tf32" if allow_tf32 else "ieee",
        BLOCK_M=configuration.block_m, BLOCK_N=configuration.block_n, BLOCK_K=configuration.block_k,
    )  # fmt: skip
    if splits == 1:
        return _Prepared(splits, launch, None)
    tile = finalisation_of_splits(splits, elements)
    finalise = PreparedLaunch(
        wgrad_finalise_kernel, tile.channel_programs, tile.warps,
        splits=splits, elements=elements, STEPS=tile.steps, BLOCK_S=tile.block_rows, BLOCK=tile.block_channels,
    )  # fmt: skip
    return _Prepared(splits, launch, finalise)


def wgrad(source: Source, dy: Tensor, weight: Tensor, geometry: ConvGeometry, configuration: Configuration, allow_tf32: bool) -> Tensor:
    """The gradient of `weight` [K, C, R, S], in its dtype and strides, from dy [N, K, P, Q] and the activation that `source` stands for.

    A pending source is activated again on load; one with a residual raises ValueError, since its activation was written. So do groups,
    and sizes that 32 bits can't count within a step.
    The sum over N·P·Q pixels is split into `configuration.splits` ranges, whose results a second kernel adds in a fixed order.

    Bytes: x as far as windows touch it, dy, dw, and with splits 8 bytes an element of the weight and split. FLOPs: 2·N·P·Q·K·C·R·S.
    """
    if source.residual is not None:
        raise ValueError("source: expected no residual: its activation exists, and is what wgrad reads")
    dw = torch.empty_like(weight)  # of the weight's strides if those leave no gaps
    splits, launch, finalise = _prepared(problem_of(source.x, weight, geometry), dw.stride(), configuration, allow_tf32)
    out = dw if splits == 1 else torch.empty((splits, dw.numel()), dtype=torch.float32, device=dw.device)
    launch(dy.device, x_ptr=source.x, scale_ptr=source.scale, bias_ptr=source.bias, dy_ptr=dy, out_ptr=out)
    if finalise:
        finalise(dw.device, partial_ptr=out, dw_ptr=dw)
    return like_weight(dw, weight)
