"""norm + residual + ReLU: the activation, written once."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..values import Source
from . import tiling
from .elements import pack_bits, passes_gradient, preactivation, relu, vector
from .launch import SHAPES, PreparedLaunch, matrix_shape, packed_mask


@triton.jit
def norm_add_act_kernel(
    x_ptr,  # [rows, C]
    scale_ptr,  # [C] float32, as bias
    bias_ptr,
    residual_ptr,  # [rows, C] or None
    residual_scale_ptr,  # [C] float32, or None where the residual is materialised
    residual_bias_ptr,
    act_ptr,  # [rows, C]
    mask_ptr,  # [rows, ⌈C/8⌉] uint8, or None
    rows,
    C,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """act = round(relu(fma(x, scale, bias) + residual)), and one bit an element of ReLU's mask.

    Reads x and the residual, writes act: 4 or 6 bytes an element of 2 bytes, and 1/8 byte with the mask. FLOPs: 3 to 6.
    """
    channel_programs = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // channel_programs).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) % channel_programs
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    valid = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * C + channels[None, :]
    x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
    residual = None
    residual_scale = None
    residual_bias = None
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if residual_scale_ptr is not None:
            residual_scale = vector(residual_scale_ptr, channels, inside)
            residual_bias = vector(residual_bias_ptr, channels, inside)
    z = preactivation(x, vector(scale_ptr, channels, inside), vector(bias_ptr, channels, inside), residual, residual_scale, residual_bias)
    act = z
    if RELU:
        act = relu(z)
    tl.store(act_ptr + at, act.to(act_ptr.dtype.element_ty), mask=valid)
    if mask_ptr is not None:
        octets = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        width = tl.cdiv(C, 8)
        bits = pack_bits(passes_gradient(z) & valid, BLOCK_M, BLOCK_C)
        tl.store(mask_ptr + row[:, None] * width + octets[None, :], bits, mask=(row < rows)[:, None] & (octets < width)[None, :])


@lru_cache(SHAPES)
def _prepared(rows: int, channels: int, itemsize: int, relu: bool) -> PreparedLaunch:
    tile = tiling.elementwise(rows, channels, itemsize)
    return PreparedLaunch(
        norm_add_act_kernel, tile.programs, tile.warps,
        rows=rows, C=channels, RELU=relu, BLOCK_M=tile.block_rows, BLOCK_C=tile.block_channels,
    )  # fmt: skip


def norm_add_act(source: Source, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor | None]:
    """`Reference.norm_add_act` in one kernel."""
    if save_mask and not (relu and source.residual is not None):
        raise ValueError("save_mask: expected False without a ReLU and a residual")
    x = source.x
    act = torch.empty_like(x, memory_format=torch.channels_last)
    mask = packed_mask(x) if save_mask else None
    _prepared(*matrix_shape(x), x.element_size(), relu)(
        x.device, x_ptr=x, scale_ptr=source.scale, bias_ptr=source.bias, residual_ptr=source.residual,
        residual_scale_ptr=source.residual_scale, residual_bias_ptr=source.residual_bias, act_ptr=act, mask_ptr=mask,
    )  # fmt: skip
    return act, mask
