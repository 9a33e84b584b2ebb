"""Forward convolution: the norm, ReLU and residual of its input on load; the statistics of its output before it leaves.

In inference its output's own affine map, residual and ReLU instead.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..problem import ConvProblem, ceil_div
from ..tuning import Configuration
from ..tuning.heuristic_fprop import FEW_CHANNELS
from ..values import ConvGeometry, Source, problem_of
from .elements import pack_bits, passes_gradient, preactivation, relu, vector
from .implicit_gemm import pixel, tap, tile, tile_moments
from .launch import SHAPES, PreparedLaunch, packed_mask


@triton.jit
def conv_fprop_norm_act_stats_kernel(
    x_ptr,  # [N, H, W, C]
    scale_ptr,  # [C] float32, as bias; None where x is materialised
    bias_ptr,
    residual_ptr,  # [N, H, W, C] or None
    residual_scale_ptr,  # [C] float32, or None where the residual is materialised
    residual_bias_ptr,
    weight_ptr,  # [K, C, R, S], of any strides; with FLAT_C [R, ROW, K]
    y_ptr,  # [rows, K], rows = N·P·Q
    act_ptr,  # [N, H, W, C] or None
    mask_ptr,  # [N, H, W, ⌈C/8⌉] uint8, or None
    out_scale_ptr,  # [K] floating, or None for one
    out_bias_ptr,  # [K] floating, or None where y is the convolution and nothing else
    out_residual_ptr,  # [rows, K] or None
    count_ptr,  # [parts] int64, one part an M tile; None where nobody asks for statistics
    mean_ptr,  # [parts, K] float32, as m2
    m2_ptr,
    one_ptr,  # [1] float32: 1.0
    rows,
    C,
    K,
    weight_k,  # strides of the weight, in elements
    weight_c,
    weight_r,
    weight_s,
    H: tl.constexpr,  # as W, P, Q and C_STEPS: 0 where an output pixel is an input pixel. Divisions by what is known are short.
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C_STEPS: tl.constexpr,  # steps of a tap
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    FLAT_C: tl.constexpr,  # C where the K axis runs over whole filter rows of S·C elements, else 0
    LEAD: tl.constexpr,  # with FLAT_C: elements of weight 0 before each filter row, so that windows begin at a multiple of ALIGNED
    ALIGNED: tl.constexpr,  # with FLAT_C: elements
    WHOLE_STEPS: tl.constexpr,  # no step along K passes the last channel
    WHOLE_TILES: tl.constexpr,  # no M tile passes the last row
    OUT_RELU: tl.constexpr,
    PRECISION: tl.constexpr,  # of a float32 product: "tf32" or "ieee"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = round(Σ act·weight) with act = round(relu(fma(x, scale, bias) + residual)), or x; where asked, M tiles' mean and M2 of y.

    GEMM axes: M output pixels, N filters, K taps and channels. One program computes BLOCK_M x BLOCK_N of y, in float32, and
    rounds it once; its statistics are of what it rounded. The program of N tile 0 writes act and the mask that it read in passing,
    which a 1x1 convolution with stride 1 and no padding does once.

    In inference there are no statistics, and y = round(relu(fma(Σ act·weight, out_scale, out_bias) + out_residual)).

    K goes tap by tap in blocks of channels, or, where channels are few, over whole filter rows: S·C consecutive elements of an
    image's row. Three channels padded to the 16 that a step has at least would be five times the products; a stem's 7x7x3 = 147
    take 160 this way. LEAD = 1 more before each row lets a 2-byte element travel with its neighbour, 4 bytes at a time.

    Bytes: reads what the windows cover of x, and of the residual, the weight, and y's residual; writes y, act, the mask, and 8 bytes
    per M tile and filter. The N tiles of an M tile, and the taps of a window, read the same x again, from L2. FLOPs: 2·rows·K·R·S·C.
    Floor: max(FLOPs / rate, bytes / bandwidth), as `roofline` counts them. Deterministic.
    """
    m, n = tile(tl.cdiv(K, BLOCK_N))
    start = m * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    filters = n * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_row = tl.full([BLOCK_M, 1], 1, tl.int1) if WHOLE_TILES else (start + lane < rows)[:, None]
    valid_filter = (filters < K)[None, :]
    # 64-bit offsets end at the tile's first pixel or image; from there on 32 bits do, and live in half the registers.
    PADDED: tl.constexpr = PADDING_H + PADDING_W > 0
    if R * S * STRIDE_H * STRIDE_W == 1 and not PADDED:  # an output pixel is an input pixel
        origin = start.to(tl.int64)
        corner = lane
    else:
        image, p, q = pixel(start + lane, P, Q)
        top = p * STRIDE_H - PADDING_H
        left = q * STRIDE_W - PADDING_W
        first_image = start // (P * Q)
        origin = first_image.to(tl.int64) * (H * W)
        corner = ((image - first_image) * H + top) * W + left
    if FLAT_C:
        ROW: tl.constexpr = (LEAD + S * FLAT_C + ALIGNED - 1) // ALIGNED * ALIGNED
        steps = tl.cdiv(R * ROW, BLOCK_K)
        x_at = tl.multiple_of(corner * FLAT_C - LEAD, ALIGNED)[:, None]
        edge = tl.multiple_of(left * FLAT_C - LEAD, ALIGNED)[:, None]
    else:
        steps = R * S * C_STEPS if C_STEPS else tl.cdiv(C, BLOCK_K)
        x_at = (corner * C)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        if FLAT_C:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            r = k // ROW
            element = k % ROW
            s = (element - LEAD) // FLAT_C
            c = (element - LEAD) % FLAT_C
            inside = (r < R) & (element >= LEAD) & (element < LEAD + S * FLAT_C)
            h = top[:, None] + r * DILATION_H
            # In elements of an image row; LEAD's are read, since weights of 0 undo them and narrower masks would narrow the loads.
            on_image = (r < R) & (h >= 0) & (h < H) & (edge + element >= 0) & (edge + element < W * FLAT_C)
            valid = valid_row & on_image
            at = x_at + (r * DILATION_H * W * FLAT_C + element)
        else:
            r, s, c = tap(step, C_STEPS, R, S, BLOCK_K)
            inside = tl.full([BLOCK_K], 1, tl.int1) if WHOLE_STEPS else c < C
            valid = valid_row & inside[None, :]
            if PADDED:
                h = top + r * DILATION_H
                w = left + s * DILATION_W
                on_image = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
                valid = valid & on_image
            at = x_at + ((r * DILATION_H * W + s * DILATION_W) * C + c)
        a = tl.load(x_ptr + origin * C + at, mask=valid, other=0.0)
        if scale_ptr is not None:
            residual = None
            residual_scale = None
            residual_bias = None
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + origin * C + at, mask=valid, other=0.0).to(tl.float32)
                if residual_scale_ptr is not None:
                    residual_scale = vector(residual_scale_ptr, c, inside)
                    residual_bias = vector(residual_bias_ptr, c, inside)
            scale = vector(scale_ptr, c, inside)
            bias = vector(bias_ptr, c, inside)
            if PADDED:
                # A tap on padding is 0: what was loaded there is, and so must its bias be. As a load, the mask reaches the registers of
                # a matrix instruction's operand as x does; computed, it would send the tile through shared memory once more.
                kept = tl.load(one_ptr + tl.zeros(on_image.shape, tl.int32), mask=on_image, other=0.0)
                bias = bias * kept
                if residual_scale_ptr is not None:
                    residual_bias = residual_bias * kept
            z = preactivation(a.to(tl.float32), scale, bias, residual, residual_scale, residual_bias)
            act = relu(z)
            a = act.to(a.dtype)
            if act_ptr is not None:
                writes = n == 0  # the other N tiles read the same
                if writes:
                    tl.store(act_ptr + origin * C + at, a, mask=valid)
                    if mask_ptr is not None:
                        width = tl.cdiv(C, 8)
                        octets = step * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
                        bits = pack_bits(passes_gradient(z) & valid, BLOCK_M, BLOCK_K)
                        mask_at = lane[:, None] * width + octets[None, :]
                        tl.store(mask_ptr + origin * width + mask_at, bits, mask=valid_row & (octets < width)[None, :])
        if FLAT_C:
            weight_at = (k * K)[:, None] + filters[None, :]
            inside = r < R
        else:
            weight_at = (r * weight_r + s * weight_s + c * weight_c)[:, None] + (filters * weight_k)[None, :]
        b = tl.load(weight_ptr + weight_at, mask=inside[:, None] & valid_filter, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_N]
    if out_bias_ptr is not None:
        out_residual = None
        if out_residual_ptr is not None:
            out_residual_at = start.to(tl.int64) * K + lane[:, None] * K + filters[None, :]
            out_residual = tl.load(out_residual_ptr + out_residual_at, mask=valid_row & valid_filter, other=0.0).to(tl.float32)
        out_scale = None
        if out_scale_ptr is not None:
            out_scale = vector(out_scale_ptr, filters, filters < K)
        acc = preactivation(acc, out_scale, vector(out_bias_ptr, filters, filters < K), out_residual, None, None)
        if OUT_RELU:
            acc = relu(acc)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + start.to(tl.int64) * K + lane[:, None] * K + filters[None, :], y, mask=valid_row & valid_filter)
    if count_ptr is not None:
        count = tl.minimum(rows - start, BLOCK_M)
        mean, m2 = tile_moments(y.to(tl.float32), None if WHOLE_TILES else valid_row, count.to(tl.float32))
        part_at = m.to(tl.int64) * K + filters[None, :]
        tl.store(mean_ptr + part_at, mean, mask=valid_filter)
        tl.store(m2_ptr + part_at, m2, mask=valid_filter)
        if n == 0:
            tl.store(count_ptr + m, count.to(tl.int64))


@lru_cache
def one(device: torch.device) -> Tensor:
    """[1] float32: 1.0. Asked for when a backend is chosen for a device: a launch may be within a compiler's memory pool or a CUDA graph.

    It outlives both, and holds a number whatever mode of PyTorch is active.
    """
    with _disable_current_modes():
        return torch.ones(1, device=device)


def fprop(
    source: Source,
    weight: Tensor,
    geometry: ConvGeometry,
    write_act: bool,
    save_mask: bool,
    configuration: Configuration,
    allow_tf32: bool,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
    """The convolution of the activation that `source` stands for -> (y, act, mask, (counts, means, m2s)).

    y [N, K, P, Q] is channels_last, in x's dtype. `write_act` asks for the activation itself, as the convolution reads it, and
    `save_mask` for its packed ReLU mask; else they are None. counts [parts] int64, means and m2s [parts, K] float32 are of y as
    rounded, for `batch_stats.merge_moments`; without `statistics` they are neither made nor returned: None stands for the three.
    `weight` [K, C, R, S] may have any strides; it is read 16 bytes at a time where C is its fastest axis (channels_last) or S·R = 1.
    `allow_tf32` lets float32 products be TF32.

    Raises ValueError for groups, for a split K axis, for an act that is not there or that no program would write whole (only a 1x1
    convolution with stride 1 and no padding reads each value once), and for sizes that 32 bits can't count within a tile.
    """
    x = source.x
    prepared = _prepared(problem_of(x, weight, geometry), weight.stride(), configuration, x.dtype, allow_tf32, False)
    if write_act and not (source.pending and prepared.problem.pointwise):
        raise ValueError(
            f"write_act: expected False, unless a pending source enters a 1x1 convolution with stride 1 and no padding; "
            f"got {prepared.problem}"
        )
    if save_mask and not write_act:
        raise ValueError("save_mask: expected False where write_act is")
    act = torch.empty_like(x, memory_format=torch.channels_last) if write_act else None
    mask = packed_mask(x) if save_mask else None
    counts = means = m2s = None
    if statistics:
        counts = torch.empty(prepared.parts, dtype=torch.int64, device=x.device)
        means = torch.empty((prepared.parts, weight.shape[0]), dtype=torch.float32, device=x.device)
        m2s = torch.empty_like(means)
    y = prepared.run(source, weight, act_ptr=act, mask_ptr=mask, count_ptr=counts, mean_ptr=means, m2_ptr=m2s)
    return y, act, mask, (counts, means, m2s) if statistics else None


def fprop_affine_act(
    x: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    scale: Tensor | None,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    *,
    configuration: Configuration,
    allow_tf32: bool,
) -> Tensor:
    """`Reference.conv_affine_act` in one kernel, rounded once: relu(conv(x)·scale + bias + residual). Arguments as of `fprop`.

    `scale`, None for one, and `bias` are [K], floating; `residual` [N, K, P, Q] is channels_last, in x's dtype, or None. Raises
    ValueError as `fprop` does.
    """
    prepared = _prepared(problem_of(x, weight, geometry), weight.stride(), configuration, x.dtype, allow_tf32, relu)
    return prepared.run(Source(x), weight, out_scale_ptr=scale, out_bias_ptr=bias, out_residual_ptr=residual)


def row_of_filter(elements: int, lead: int, aligned: int) -> int:
    """The length of a filter's row with `lead` zeros before its elements, and as many behind them as make a multiple of `aligned`."""
    return ceil_div(lead + elements, aligned) * aligned


def filter_rows(weight: Tensor, lead: int, aligned: int) -> Tensor:
    """[1, R, ROW, K] of a weight [K, C, R, S]: behind `lead` zeros the S·C elements of a filter row, then zeros to a multiple of `aligned`.

    In a stem's own layout neighbouring filters are 147 elements apart, and each is loaded by itself; so they are copied with one access.
    """
    k, c, r, s = weight.shape
    rows = weight.new_zeros(1, r, row_of_filter(s * c, lead, aligned), k)
    rows[:, :, lead : lead + s * c] = weight.permute(2, 3, 1, 0).reshape(1, r, s * c, k)
    return rows


class _Prepared(NamedTuple):
    """A convolution of a shape."""

    problem: ConvProblem
    parts: int  #: M tiles, of each of which there may be statistics
    filter_rows: tuple[int, int] | None  #: (lead, aligned) of `filter_rows`, where channels are few
    launch: PreparedLaunch

    def run(self, source: Source, weight: Tensor, **asked: Tensor | None) -> Tensor:
        """y, of a launch with the outputs and the epilogue that are asked for."""
        x, conv = source.x, self.problem
        y = torch.empty((conv.n, conv.k, conv.p, conv.q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        if self.filter_rows:
            weight = filter_rows(weight, *self.filter_rows)
        self.launch(
            x.device, x_ptr=x, scale_ptr=source.scale, bias_ptr=source.bias, residual_ptr=source.residual,
            residual_scale_ptr=source.residual_scale, residual_bias_ptr=source.residual_bias, weight_ptr=weight, y_ptr=y,
            one_ptr=one(x.device), **asked,
        )  # fmt: skip
        return y


@lru_cache(SHAPES)
def _prepared(
    problem: ConvProblem, weight_stride: tuple[int, ...], configuration: Configuration, dtype: torch.dtype, allow_tf32: bool, relu: bool
) -> _Prepared:
    """Raises ValueError for what the kernel can't take."""
    n, c, h, w = problem.n, problem.c, problem.h, problem.w
    k, r, s, p, q = problem.k, problem.r, problem.s, problem.p, problem.q
    stride, padding, dilation = problem.stride, problem.padding, problem.dilation
    if problem.groups != 1:
        raise ValueError(f"geometry: expected groups = 1; got {problem.groups}")
    if configuration.splits != 1:
        raise ValueError(f"configuration: expected splits = 1, since an epilogue is of whole sums; got {configuration.splits}")
    rows = n * p * q
    spanned = 0 if problem.pointwise else min(n, configuration.block_m // (p * q) + 2) * h * w * c
    if max(spanned, rows + configuration.block_m) >= 2**31:
        raise ValueError(f"source: expected fewer than 2**31 elements in the images of a tile, and output pixels; got {spanned} and {rows}")
    flat = c if c < FEW_CHANNELS and r * s > 1 and dilation[1] == 1 else 0
    # 4 bytes at a time, which a copy that does not wait needs, where a window's step keeps to them and Triton can know it.
    pairs = flat > 0 and dtype.itemsize == 2 and w % 16 == 0 and stride[1] * c % 2 == 0
    lead, aligned = padding[1] * c % 2 if pairs else 0, 2 if pairs else 1
    row = row_of_filter(s * c, lead, aligned)
    if flat:
        weight_stride = r * row * k, row * k, k, 1  # of `filter_rows`
    weight_k, weight_c, weight_r, weight_s = weight_stride
    steps = 0 if problem.pointwise else ceil_div(c, configuration.block_k)
    geometry = dict.fromkeys("HWPQ", 0) if problem.pointwise else {"H": h, "W": w, "P": p, "Q": q}
    parts = ceil_div(rows, configuration.block_m)
    launch = PreparedLaunch(
        conv_fprop_norm_act_stats_kernel, parts * ceil_div(k, configuration.block_n), configuration.warps, configuration.stages,
        rows=rows, C=c, K=k, **geometry,
        weight_k=weight_k, weight_c=weight_c, weight_r=weight_r, weight_s=weight_s, R=r, S=s, STRIDE_H=stride[0],
        STRIDE_W=stride[1], PADDING_H=padding[0], PADDING_W=padding[1], DILATION_H=dilation[0], DILATION_W=dilation[1],
        C_STEPS=steps, FLAT_C=flat, LEAD=lead, ALIGNED=aligned,
        WHOLE_STEPS=c % configuration.block_k == 0, OUT_RELU=relu,
        # In float32 ptxas keeps more alive without masks: on sm_80 a raw residual's kernel spills.
        WHOLE_TILES=rows % configuration.block_m == 0 and dtype.itemsize == 2,
        PRECISION="ieee" if dtype == torch.float32 and not allow_tf32 else "tf32",
        BLOCK_M=configuration.block_m, BLOCK_N=configuration.block_n, BLOCK_K=configuration.block_k,
    )  # fmt: skip
    return _Prepared(problem, parts, (lead, aligned) if flat else None, launch)
