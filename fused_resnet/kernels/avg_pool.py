"""norm + residual + ReLU + global average pool: the tail of a ResNet. Its backward is that of `norm_add_act`, from [N, C, 1, 1]."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..values import Source
from . import tiling
from .elements import pack_bits, passes_gradient, preactivation, relu, vector
from .launch import SHAPES, PreparedLaunch, packed_mask
from .norm_backward import norm_backward_reduce


@triton.jit
def norm_add_act_avg_pool_kernel(
    x_ptr,  # [N, pixels, C]
    scale_ptr,  # [C] float32, as bias
    bias_ptr,
    residual_ptr,  # [N, pixels, C] or None
    residual_scale_ptr,  # [C] float32, or None where the residual is materialised
    residual_bias_ptr,
    out_ptr,  # [N, C]
    mask_ptr,  # [N, pixels, ⌈C/8⌉] uint8, or None
    pixels,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = round(mean over the pixels of round(relu(fma(x, scale, bias) + residual))), and one bit an element of ReLU's mask.

    A program takes an image and a block of channels. The activation itself is never written.
    Reads x and the residual, writes the mask: 2 or 4 bytes an element of 2 bytes, and 1/8. FLOPs: 4 to 7. Deterministic.
    """
    channel_programs = tl.cdiv(C, BLOCK_C)
    image = (tl.program_id(0) // channel_programs).to(tl.int64)
    block = tl.program_id(0) % channel_programs
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    scale = vector(scale_ptr, channels, inside)
    bias = vector(bias_ptr, channels, inside)
    residual_scale = None
    residual_bias = None
    if residual_scale_ptr is not None:
        residual_scale = vector(residual_scale_ptr, channels, inside)
        residual_bias = vector(residual_bias_ptr, channels, inside)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, pixels, BLOCK_M):
        pixel = first + tl.arange(0, BLOCK_M)
        valid = (pixel < pixels)[:, None] & inside[None, :]
        row = image * pixels + pixel
        at = row[:, None] * C + channels[None, :]
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        residual = None
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + at, mask=valid, other=0.0).to(tl.float32)
        z = preactivation(x, scale, bias, residual, residual_scale, residual_bias)
        act = relu(z).to(x_ptr.dtype.element_ty).to(tl.float32)
        total += tl.where(valid, act, 0.0)  # past the end act is relu(bias)
        if mask_ptr is not None:
            octets = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
            width = tl.cdiv(C, 8)
            bits = pack_bits(passes_gradient(z) & valid, BLOCK_M, BLOCK_C)
            here = (pixel < pixels)[:, None] & (octets < width)[None, :]
            tl.store(mask_ptr + row[:, None] * width + octets[None, :], bits, mask=here)
    summed = tl.sum(total, axis=0)
    mean = tl.div_rn(summed, tl.zeros_like(summed) + tl.cast(pixels, tl.float32))
    tl.store(out_ptr + image * C + channels, mean.to(out_ptr.dtype.element_ty), mask=inside)


@lru_cache(SHAPES)
def _prepared(images: int, channels: int, pixels: int, itemsize: int) -> PreparedLaunch:
    tile = tiling.per_image(pixels, channels, itemsize)
    return PreparedLaunch(
        norm_add_act_avg_pool_kernel, images * tile.channel_programs, tile.warps,
        pixels=pixels, C=channels, BLOCK_M=tile.block_rows, BLOCK_C=tile.block_channels,
    )  # fmt: skip


def norm_add_act_avg_pool(source: Source) -> tuple[Tensor, Tensor | None]:
    """`Reference.norm_add_act_avg_pool` in one kernel."""
    x = source.x
    n, channels, height, width = x.shape
    out = torch.empty((n, channels, 1, 1), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    mask = None if source.residual is None else packed_mask(x)
    _prepared(n, channels, height * width, x.element_size())(
        x.device, x_ptr=x, scale_ptr=source.scale, bias_ptr=source.bias, residual_ptr=source.residual,
        residual_scale_ptr=source.residual_scale, residual_bias_ptr=source.residual_bias, out_ptr=out, mask_ptr=mask,
    )  # fmt: skip
    return out, mask


def norm_add_act_avg_pool_backward(dout: Tensor, source: Source, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`Reference.norm_add_act_avg_pool_backward` in two kernels."""
    return norm_backward_reduce(dout, None, source, mask, relu=True, pixels=source.x.shape[2] * source.x.shape[3])
