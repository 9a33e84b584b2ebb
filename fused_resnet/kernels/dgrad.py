"""Gradient of a convolution's input: batch norm's backward on load, and what the input's own norm needs before it leaves."""

from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import ConvProblem, ceil_div
from ..tuning import Configuration
from ..values import ConvOutput, Source, problem_of
from .elements import batch_norm_backward, passes_gradient, unpack_bits, vector
from .implicit_gemm import pixel, tile
from .launch import SHAPES, PreparedLaunch
from .norm_backward import PartialSums


@triton.jit
def first_tap(parity, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """The first tap t with t·DILATION ≡ parity (mod STRIDE): pixels of other parities lie between its steps. TAPS where there is none."""
    first = TAPS
    for back in tl.static_range(1 - min(TAPS, STRIDE), 1):  # from the last down to tap 0, so that the first of them stays
        first = tl.where(-back * DILATION % STRIDE == parity, -back, first)
    return first


@triton.jit
def conv_dgrad_norm_backward_kernel(
    dz_ptr,  # [N, P, Q, K]: the gradient of norm(y), or where y_ptr is None that of y
    y_ptr,  # [N, P, Q, K], or None
    y_mean_ptr,  # [K] float32, as the four that follow
    y_invstd_ptr,
    gamma_ptr,  # or None
    s1_ptr,  # None where running statistics normalise y, as s2
    s2_ptr,
    dy_ptr,  # [N, P, Q, K] or None
    weight_ptr,  # [K, C, R, S], of any strides
    dact_ptr,  # [N, H, W, C] or None
    compact_ptr,  # [N, ⌈H/COMPACT⌉, ⌈W/COMPACT⌉, C] or None
    x_ptr,  # [N, H, W, C] raw, or None where the input is materialised
    mean_ptr,  # [C] float32, as invstd, scale, bias
    invstd_ptr,
    scale_ptr,
    bias_ptr,
    mask_ptr,  # [N, H, W, ⌈C/8⌉] uint8, or None where the mask is recomputed
    residual_ptr,  # [N, H, W, C] raw, or None
    residual_mean_ptr,
    residual_invstd_ptr,
    dx_ptr,  # [N, H, W, C]
    x_s1_ptr,  # [parts, C] float32, one part an M tile, as the two that follow
    x_s2_ptr,
    residual_s2_ptr,
    pixels,  # N·H·W
    inverse_outputs,  # 1 / (N·P·Q), float32
    C,
    K,
    weight_k,  # strides of the weight, in elements
    weight_c,
    weight_r,
    weight_s,
    N,  # images; 1 where an input pixel is an output pixel
    H: tl.constexpr,  # as W, P, Q and K_STEPS: 0 where nobody asks. Divisions by what is known are short.
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    K_STEPS: tl.constexpr,  # steps of a tap
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    NEXT_R: tl.constexpr,  # from a tap of a parity to its next
    NEXT_S: tl.constexpr,
    COMPACT: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,  # no step along K passes the last filter
    PRECISION: tl.constexpr,  # of a float32 product: "tf32" or "ieee"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """d = Σ dy·weight + dact + compact; dx = round(d·mask), its sum and its sums with x̂; or dx = round(d).

    The GEMM's axes: M over input pixels, N over C, K over (r, s, k). With stride, pixels are grouped by the parities of h + padding and
    w + padding: those of a group meet the same taps, and no tap is multiplied that lands between outputs. A group without taps, as
    three of four of a strided 1x1 are, is what is added to zero.
    """
    m, n = tile(tl.cdiv(C, BLOCK_N))
    channels = n * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_channel = (channels < C)[None, :]
    lane = tl.arange(0, BLOCK_M)
    POINTWISE: tl.constexpr = R * S * STRIDE_H * STRIDE_W == 1 and PADDING_H + PADDING_W == 0
    # 64-bit offsets end at the tile's first pixel or image; from there on 32 bits do.
    if POINTWISE:  # an input pixel is an output pixel
        start = m * BLOCK_M
        valid_row = (start + lane < pixels)[:, None]
        taps_s = 1
        taps = 1
        out_origin = start.to(tl.int64)
        in_origin = out_origin
        in_at = lane
    else:
        # Groups take turns in launch order, since they read the same rows of dy.
        group = m % (STRIDE_H * STRIDE_W)
        parity_h = group // STRIDE_W
        parity_w = group % STRIDE_W
        first_h = (parity_h + PADDING_H * (STRIDE_H - 1)) % STRIDE_H  # the first h of that parity: h + PADDING_H ≡ parity_h
        first_w = (parity_w + PADDING_W * (STRIDE_W - 1)) % STRIDE_W
        height = tl.cdiv(H - first_h, STRIDE_H)
        width = tl.cdiv(W - first_w, STRIDE_W)
        start = m // (STRIDE_H * STRIDE_W) * BLOCK_M
        # A group may be empty, and divided by all the same.
        image, i, j = pixel(start + lane, tl.maximum(height, 1), tl.maximum(width, 1))
        valid_row = (start + lane < N * height * width)[:, None]
        first_image = start // (tl.maximum(height, 1) * tl.maximum(width, 1))
        h = first_h + i * STRIDE_H
        w = first_w + j * STRIDE_W
        first_r = first_tap(parity_h, R, STRIDE_H, DILATION_H)
        first_s = first_tap(parity_w, S, STRIDE_W, DILATION_W)
        taps_s = tl.cdiv(S - first_s, NEXT_S)
        taps = tl.cdiv(R - first_r, NEXT_R) * taps_s
        top = (h + PADDING_H - parity_h) // STRIDE_H
        left = (w + PADDING_W - parity_w) // STRIDE_W
        out_origin = first_image.to(tl.int64) * (P * Q)
        in_origin = first_image.to(tl.int64) * (H * W)
        in_at = ((image - first_image) * H + h) * W + w
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks = K_STEPS if K_STEPS else tl.cdiv(K, BLOCK_K)
    for step in range(taps * blocks):
        k = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = tl.full([BLOCK_K], 1, tl.int1) if WHOLE_STEPS else k < K
        if POINTWISE:
            r = 0
            s = 0
            valid = valid_row & inside[None, :]
            at = (lane * K)[:, None] + k[None, :]
        else:
            r = first_r + step // blocks // taps_s * NEXT_R
            s = first_s + step // blocks % taps_s * NEXT_S
            p = top - (r * DILATION_H - parity_h) // STRIDE_H
            q = left - (s * DILATION_W - parity_w) // STRIDE_W
            valid = valid_row & inside[None, :] & ((p >= 0) & (p < P) & (q >= 0) & (q < Q))[:, None]
            at = ((((image - first_image) * P + p) * Q + q) * K)[:, None] + k[None, :]
        a = tl.load(dz_ptr + out_origin * K + at, mask=valid, other=0.0)
        if y_ptr is not None:
            y = tl.load(y_ptr + out_origin * K + at, mask=valid, other=0.0).to(tl.float32)
            invstd = vector(y_invstd_ptr, k, inside)
            gamma = None
            if gamma_ptr is not None:
                gamma = vector(gamma_ptr, k, inside)
            if s1_ptr is not None:
                s1 = vector(s1_ptr, k, inside)
                s2 = vector(s2_ptr, k, inside)
                mean = vector(y_mean_ptr, k, inside)
                dy = batch_norm_backward(a.to(tl.float32), y, mean, invstd, gamma, s1, s2, inverse_outputs)
            else:
                dy = a.to(tl.float32) * (invstd if gamma is None else invstd * gamma)
            a = dy.to(a.dtype)
            if dy_ptr is not None:
                first_n = n == 0  # the other N tiles make the same
                if first_n:
                    tl.store(dy_ptr + out_origin * K + at, a, mask=valid)
        weight_at = (k * weight_k + r * weight_r + s * weight_s)[:, None] + (channels * weight_c)[None, :]
        b = tl.load(weight_ptr + weight_at, mask=inside[:, None] & valid_channel, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_N]

    valid = valid_row & valid_channel
    at = (in_at * C)[:, None] + channels[None, :]
    if dact_ptr is not None:
        acc += tl.load(dact_ptr + in_origin * C + at, mask=valid, other=0.0).to(tl.float32)
    if compact_ptr is not None:
        if COMPACT == 1:
            compact_origin = in_origin
            compact_at = at
            there = valid
        else:
            if POINTWISE:
                image, h, w = pixel(start + lane, H, W)
                first_image = start // (H * W)
            compact_h = tl.cdiv(H, COMPACT)
            compact_w = tl.cdiv(W, COMPACT)
            compact_origin = first_image.to(tl.int64) * compact_h * compact_w
            compact_at = ((((image - first_image) * compact_h + h // COMPACT) * compact_w + w // COMPACT) * C)[:, None] + channels[None, :]
            there = valid & ((h % COMPACT == 0) & (w % COMPACT == 0))[:, None]
        acc += tl.load(compact_ptr + compact_origin * C + compact_at, mask=there, other=0.0).to(tl.float32)
    if x_ptr is not None:
        x = tl.load(x_ptr + in_origin * C + at, mask=valid, other=0.0).to(tl.float32)
        if mask_ptr is not None:
            octets = n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
            octet_count = tl.cdiv(C, 8)
            octet_at = (in_at * octet_count)[:, None] + octets[None, :]
            packed = tl.load(mask_ptr + in_origin * octet_count + octet_at, mask=valid_row & (octets < octet_count)[None, :], other=0)
            keep = unpack_bits(packed, BLOCK_M, BLOCK_N)
        else:
            keep = passes_gradient(tl.fma(x, vector(scale_ptr, channels, channels < C), vector(bias_ptr, channels, channels < C)))
        acc = tl.where(keep & valid, acc, 0.0)
    dx = acc.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + in_origin * C + at, dx, mask=valid)
    if x_ptr is not None:
        dz = dx.to(tl.float32)  # the sums are those of what the readers of dx will see
        xhat = (x - vector(mean_ptr, channels, channels < C)) * vector(invstd_ptr, channels, channels < C)
        part_at = m.to(tl.int64) * C + channels
        tl.store(x_s1_ptr + part_at, tl.sum(dz, axis=0), mask=channels < C)
        # The product first, then the sum. Left to the compiler, a thread with one row makes one operation of its own product and its
        # neighbour's, and the neighbour of the other two: they differ in the last bit, and which of them is stored would be chance.
        # A product that is chosen is one that stands.
        tl.store(x_s2_ptr + part_at, tl.sum(tl.where(valid, dz * xhat, 0.0), axis=0), mask=channels < C)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + in_origin * C + at, mask=valid, other=0.0).to(tl.float32)
            xhat = (residual - vector(residual_mean_ptr, channels, channels < C)) * vector(residual_invstd_ptr, channels, channels < C)
            tl.store(residual_s2_ptr + part_at, tl.sum(tl.where(valid, dz * xhat, 0.0), axis=0), mask=channels < C)


@lru_cache(SHAPES)
def _prepared(
    problem: ConvProblem, weight_stride: tuple[int, ...], configuration: Configuration, compact_stride: int, allow_tf32: bool
) -> tuple[PreparedLaunch, int]:
    """The launch, and its M tiles, of each of which there are partial sums. Raises ValueError for what the kernel can't take."""
    (n, c, h, w), (k, r, s), (p, q) = (
        (problem.n, problem.c, problem.h, problem.w),
        (problem.k, problem.r, problem.s),
        (problem.p, problem.q),
    )
    (stride_h, stride_w), padding, dilation = problem.stride, problem.padding, problem.dilation
    if problem.groups != 1:
        raise ValueError(f"output.geometry: expected groups = 1; got {problem.groups}")
    if configuration.splits != 1:
        raise ValueError(f"configuration: expected splits = 1, since the mask is of whole sums; got {configuration.splits}")
    # A tile's pixels lie in a few images; those of a group with the fewest pixels in the most.
    images = min(n, configuration.block_m // max(1, h // stride_h * (w // stride_w)) + 2)
    spanned = 0 if problem.pointwise else images * max(h * w * c, p * q * k)
    if max(spanned, n * h * w + configuration.block_m, n * p * q) >= 2**31:
        raise ValueError(f"source: expected fewer than 2**31 elements in the images of a tile, and pixels; got {spanned} and {n * h * w}")
    rows = n * ceil_div(h, stride_h) * ceil_div(w, stride_w)  # of the largest group of pixels
    parts = stride_h * stride_w * ceil_div(rows, configuration.block_m)
    weight_k, weight_c, weight_r, weight_s = weight_stride
    # What divides pixels; of a projection's grid the image's extents alone.
    known = {"H": h, "W": w} if not problem.pointwise or compact_stride > 1 else {}
    known |= {} if problem.pointwise else {"P": p, "Q": q, "K_STEPS": ceil_div(k, configuration.block_k)}
    extents = dict.fromkeys(("H", "W", "P", "Q", "K_STEPS"), 0) | known
    launch = PreparedLaunch(
        conv_dgrad_norm_backward_kernel, parts * ceil_div(c, configuration.block_n), configuration.warps, configuration.stages,
        pixels=n * h * w, inverse_outputs=1 / (n * p * q), C=c, K=k, weight_k=weight_k, weight_c=weight_c, weight_r=weight_r,
        weight_s=weight_s, N=1 if problem.pointwise else n, **extents, WHOLE_STEPS=k % configuration.block_k == 0,
        R=r, S=s, STRIDE_H=stride_h, STRIDE_W=stride_w, PADDING_H=padding[0], PADDING_W=padding[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1], NEXT_R=stride_h // gcd(stride_h, dilation[0]),
        NEXT_S=stride_w // gcd(stride_w, dilation[1]), COMPACT=compact_stride or 1,
        PRECISION="tf32" if allow_tf32 else "ieee",
        BLOCK_M=configuration.block_m, BLOCK_N=configuration.block_n, BLOCK_K=configuration.block_k,
    )  # fmt: skip
    return launch, parts


def dgrad(
    output: ConvOutput,
    source: Source,
    mask: Tensor | None,
    dact: Tensor | None,
    compact: Tensor | None,
    compact_stride: int,
    *,
    apply_norm: bool,
    write_dy: bool,
    configuration: Configuration,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradient of what `source` stands for, by one convolution of it -> (dx, s1, s2, residual_s2, dy).

    With `apply_norm` the prologue makes dy of `output`'s dz, y and sums as `Reference.norm_backward_apply` does, and `write_dy` hands it
    out; else output.dz is dy. To the convolution's gradient are added `dact` [N, C, H, W] and `compact` [N, C, ⌈H/compact_stride⌉,
    ⌈W/compact_stride⌉], which is zero between its pixels. For a pending source dx is its dz and that of its residual: masked by the packed
    `mask`, or where it is None by relu(norm(x)) recomputed, with its sums s1, s2 and, of a raw residual, residual_s2, each [C] float32.
    For a materialised one they are None, and of source.x nothing but the shape is used.

    All tensors are channels_last. Bytes: dy (or dz and y), the weight, dx, and of the epilogue x, mask, residual, dact, compact; partial
    sums of 4 bytes a channel and M tile. FLOPs: 2·N·P·Q·K·C·R·S. Raises ValueError for groups, for a split K axis, for `apply_norm`
    unless the convolution is 1x1 with stride 1 and no padding (others read each pixel of dy again and again), and for sizes that 32 bits
    can't count within a tile.
    """
    x, dz, weight = source.x, output.dz, output.weight
    problem = problem_of(x, weight, output.geometry)
    launch, parts = _prepared(problem, weight.stride(), configuration, compact_stride, allow_tf32)
    if apply_norm and not problem.pointwise:
        raise ValueError(
            f"apply_norm: expected False, unless the convolution is 1x1 with stride 1 and no padding; got {problem.r}x{problem.s}, "
            f"{output.geometry}"
        )
    if write_dy and not apply_norm:
        raise ValueError("write_dy: expected False where apply_norm is, since dy is there")
    dx = torch.empty(x.shape, dtype=dz.dtype, device=dz.device, memory_format=torch.channels_last)
    dy = torch.empty_like(dz, memory_format=torch.channels_last) if write_dy else None
    tensors = {"dz_ptr": dz, "weight_ptr": weight, "dact_ptr": dact, "compact_ptr": compact, "dx_ptr": dx, "dy_ptr": dy}
    if apply_norm:
        tensors |= {"y_ptr": output.y, "y_invstd_ptr": output.invstd, "gamma_ptr": output.gamma}
        if output.training:
            tensors |= {"y_mean_ptr": output.mean, "s1_ptr": output.s1, "s2_ptr": output.s2}
    if not source.pending:
        launch(dx.device, **tensors)
        return dx, None, None, None, dy
    raw = source.residual_mean is not None
    sums = PartialSums(parts, x.shape[1], dx.device, raw)
    launch(
        dx.device, **tensors, x_ptr=x, mean_ptr=source.mean, invstd_ptr=source.invstd, scale_ptr=source.scale if mask is None else None,
        bias_ptr=source.bias if mask is None else None, mask_ptr=mask, residual_ptr=source.residual if raw else None,
        residual_mean_ptr=source.residual_mean, residual_invstd_ptr=source.residual_invstd,
        x_s1_ptr=sums.s1, x_s2_ptr=sums.s2, residual_s2_ptr=sums.residual_s2,
    )  # fmt: skip
    return dx, *sums.finalise(), dy
