"""Device functions of single tiles, [rows, channels] in float32."""

import triton
import triton.language as tl


@triton.jit
def relu(z):
    """max(z, 0) that keeps NaN: a comparison with NaN is false. A maximum would turn NaN into 0 on a GPU."""
    return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def passes_gradient(z):
    """Where ReLU lets a gradient through: z > 0 or z is NaN."""
    return (z <= 0.0) == 0


@triton.jit
def pack_bits(keep, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """bool [ROWS, CHANNELS] -> uint8 [ROWS, CHANNELS // 8], channel c in bit c % 8 of byte c // 8."""
    bits = tl.reshape(keep.to(tl.int32), [ROWS, CHANNELS // 8, 8]) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The inverse of `pack_bits`."""
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [ROWS, CHANNELS]) != 0


@triton.jit
def vector(pointer, channels, inside):
    """A vector of per-channel float32, [1, channels]."""
    return tl.load(pointer + channels, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def preactivation(x, scale, bias, residual, residual_scale, residual_bias):
    """z = fma(x, scale, bias) + residual; scale is None for one, the residual is None, materialised (residual_scale None) or raw."""
    z = x + bias if scale is None else tl.fma(x, scale, bias)
    if residual is not None:
        if residual_scale is not None:
            z += tl.fma(residual, residual_scale, residual_bias)
        else:
            z += residual
    return z


@triton.jit
def batch_norm_backward(dz, y, mean, invstd, gamma, s1, s2, inverse_n):
    """dy = gamma·invstd·(dz − s1/n − x̂·s2/n), x̂ = (y − mean)·invstd; gamma may be None. Ioffe & Szegedy 2015, section 3."""
    scale = invstd
    if gamma is not None:
        scale = invstd * gamma
    # What belongs to a channel first: three operations an element are left, and no division.
    return scale * (dz - s1 * inverse_n - (y - mean) * (invstd * (s2 * inverse_n)))
