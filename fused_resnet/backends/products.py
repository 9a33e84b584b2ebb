"""On a CPU, convolutions as matrix products where those were measured to be faster than the framework's convolution.

An activation [N, C, H, W] in channels_last is a matrix [pixels, channels], so a 1x1 convolution is a product without another trip over
memory, and one with a stride is that of every stride-th pixel. A 3x3 one needs its windows written out first, which pays where there are
few pixels and many channels. Errors are those of the framework's convolution: the same inputs, fp32 sums, one rounding.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..problem import ConvProblem

#: The most bytes that the windows of a 3x3 convolution may take, and the fewest channels on both sides.
WINDOW_BYTES, WINDOW_CHANNELS = 2**24, 512


def as_product(kind: str, conv: ConvProblem, dtype: torch.dtype) -> bool:
    """Whether `kind` (fprop, dgrad, wgrad) of a convolution is a product here: a rule of its shape and dtype (docs/kernels/cpu.md)."""
    if dtype != torch.bfloat16 or conv.groups > 1 or max(conv.dilation) > 1 or len(set(conv.stride)) > 1:
        return False
    if (conv.r, conv.s) == (1, 1):
        return not any(conv.padding) and (kind == "wgrad" or conv.stride[0] > 1)
    pixels = conv.n * conv.p * conv.q
    windows = pixels * conv.r * conv.s * conv.c * dtype.itemsize
    return kind == "wgrad" and windows <= WINDOW_BYTES and min(conv.c, conv.k) >= WINDOW_CHANNELS


def _pixels(x: Tensor, stride: int = 1) -> Tensor:
    """[N, C, H, W] in channels_last -> [pixels, C], of every stride-th pixel in both directions."""
    return x.permute(0, 2, 3, 1)[:, ::stride, ::stride].reshape(-1, x.shape[1])


def _image(pixels: Tensor, n: int, p: int, q: int) -> Tensor:
    """The inverse, without a stride: [N, K, P, Q] in channels_last."""
    return pixels.view(n, p, q, -1).permute(0, 3, 1, 2)


def _windows(x: Tensor, conv: ConvProblem) -> Tensor:
    """The windows of x as rows: [pixels of the output, R·S·C]."""
    (stride, _), (up, left) = conv.stride, conv.padding
    padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, up, up))
    taps = [
        padded[:, r : r + stride * (conv.p - 1) + 1 : stride, s : s + stride * (conv.q - 1) + 1 : stride].reshape(-1, conv.c)
        for r in range(conv.r)
        for s in range(conv.s)
    ]
    return torch.cat(taps, 1)


def fprop(x: Tensor, weight: Tensor, conv: ConvProblem) -> Tensor:
    """y [N, K, P, Q] of a 1x1 convolution."""
    return _image(torch.mm(_pixels(x, conv.stride[0]), weight[:, :, 0, 0].T), conv.n, conv.p, conv.q)


def dgrad(dy: Tensor, weight: Tensor, conv: ConvProblem) -> Tensor:
    """dx [N, C, H, W] of a 1x1 convolution with a stride: zero between the pixels that it read."""
    dx = dy.new_zeros((conv.n, conv.h, conv.w, conv.c))
    stride = conv.stride[0]
    dx[:, ::stride, ::stride] = torch.mm(_pixels(dy), weight[:, :, 0, 0]).view(conv.n, conv.p, conv.q, conv.c)
    return dx.permute(0, 3, 1, 2)


def wgrad(x: Tensor, dy: Tensor, conv: ConvProblem) -> Tensor:
    """dw [K, C, R, S] in channels_last."""
    rows = _pixels(x, conv.stride[0]) if conv.r == conv.s == 1 else _windows(x, conv)
    return torch.mm(_pixels(dy).T, rows).view(conv.k, conv.r, conv.s, conv.c).permute(0, 3, 1, 2)
