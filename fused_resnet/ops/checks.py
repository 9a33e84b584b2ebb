"""What the operators expect of their arguments. Every error names the argument, what it was, and what was expected."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..problem import output_size
from ..values import Conv, ConvGeometry, Source

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VECTORS = ("mean", "invstd", "scale", "bias")
RESIDUAL_VECTORS = tuple(f"residual_{name}" for name in VECTORS)
NORM_VECTORS = ("gamma", "beta", "running_mean", "running_var")


def check_activation(name: str, t: Tensor, like: Tensor | None = None) -> None:
    """An activation: a floating [N, C, H, W] in channels_last; of the shape, dtype and device of `like`, if given.

    Layout is checked and never mended here: a copy behind the user's back would cost what the fusion saves.
    """
    if t.dim() != 4:
        raise ValueError(f"{name}: expected a tensor of rank 4, [N, C, H, W]; got shape {list(t.shape)}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16; got {t.dtype}")
    if 0 in t.shape[1:]:
        raise ValueError(f"{name}: expected at least one value an image; got shape {list(t.shape)}")
    if not is_channels_last(t):
        raise ValueError(f"{name}: expected memory_format=torch.channels_last; got strides {list(t.stride())} for shape {list(t.shape)}")
    if like is not None:
        if t.shape != like.shape:
            raise ValueError(f"{name}: expected shape {list(like.shape)}; got {list(t.shape)}")
        _same_kind(name, t, like)


def is_channels_last(t: Tensor) -> bool:
    """Whether t [N, C, H, W] is in channels_last, without gaps."""
    if t.is_contiguous(memory_format=torch.channels_last):
        return True
    # Where a compiler leaves sizes open, PyTorch 2.11 says no to some tensors that are: so look.
    _, c, h, w = t.shape
    dense = (h * w * c, 1, w * c, c)
    return all(size == 1 or stride == wanted for size, stride, wanted in zip(t.shape, t.stride(), dense, strict=True))


def _same_kind(name: str, t: Tensor, like: Tensor) -> None:
    if t.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype}, the dtype of x; got {t.dtype}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, the device of x; got one on {t.device}")


def check_vectors(names: Sequence[str], vectors: Sequence[Tensor | None], size: int, x: Tensor) -> None:
    """Per-channel vectors: each a floating [size] on the device of x, or None."""
    device, shape = x.device, (size,)
    for i, t in enumerate(vectors):  # seen at every call of an operator: one line where all is well
        if t is None or (t.shape == shape and t.device == device and t.dtype in FLOATS):
            continue
        name = names[i]
        if t.shape != shape:
            raise ValueError(f"{name}: expected shape [{size}], one value per channel; got {list(t.shape)}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating dtype; got {t.dtype}")
        if t.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, the device of x; got one on {t.device}")


def check_source(source: Source) -> None:
    """The activation that an operator reads, pending or not."""
    x = source.x
    check_activation("x", x)
    if not source.pending:
        return
    channels = x.shape[1]
    check_vectors(VECTORS, source[1:5], channels, x)
    if source.residual is None:
        return
    check_activation("residual", source.residual, like=x)
    given = source[6:]
    absent = sum([t is None for t in given])
    if absent == len(given):
        return
    if absent:
        raise ValueError("residual_mean, residual_invstd, residual_scale, residual_bias: expected all four, or none")
    check_vectors(RESIDUAL_VECTORS, given, channels, x)


def check_inference(x: Tensor, weight: Tensor, geometry: ConvGeometry, scale: Tensor | None, bias: Tensor, residual: Tensor | None) -> None:
    """The arguments of `conv_affine_act`."""
    check_activation("x", x)
    shape = check_weight(x, weight, geometry)
    check_vectors(("scale", "bias"), (scale, bias), shape[1], x)
    if residual is not None:
        check_residual(residual, shape, x)


def check_residual(residual: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """What is added to a convolution of x, whose output has this shape."""
    check_activation("residual", residual)
    if residual.shape != shape:
        raise ValueError(f"residual: expected shape {list(shape)}, that of the output; got {list(residual.shape)}")
    _same_kind("residual", residual, x)


def check_conv(x: Tensor, conv: Conv) -> tuple[int, ...]:
    """A convolution of x [N, C, H, W] and its norm -> the shape [N, K, P, Q] of its output."""
    norm = conv.norm
    n, k, p, q = shape = check_weight(x, conv.weight, conv.geometry)
    check_vectors(NORM_VECTORS, norm[:4], k, x)
    if norm.training:
        if n * p * q == 1 and not norm.group:  # PyTorch's own words
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")
    elif norm.running_mean is None or norm.running_var is None:
        raise ValueError("running_mean, running_var: expected tensors where training is False; got None")
    return shape


def check_weight(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> tuple[int, ...]:
    """A convolution of x [N, C, H, W] -> the shape [N, K, P, Q] of its output."""
    if weight.dtype is not x.dtype or weight.device != x.device:
        _same_kind("weight", weight, x)
    try:
        return _known_shape(x.shape, weight.shape, *geometry)
    except TypeError:  # sizes that a compiler leaves open, and lists, have no hash
        return _output_shape(x.shape, weight.shape, *geometry)


def _output_shape(
    image: Sequence[int], filters: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> tuple[int, ...]:
    """[N, K, P, Q] of a convolution of `image` with `filters`, if there is one."""
    if len(filters) != 4:
        raise ValueError(f"weight: expected a tensor of rank 4, [K, C/groups, R, S]; got shape {list(filters)}")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or min(values) < least:
            raise ValueError(f"{name}: expected two integers of at least {least}; got {list(values)}")
    (n, c, h, w), (k, c_group, r, s) = image, filters
    if groups < 1 or k % groups:
        raise ValueError(f"groups: expected a divisor of the {k} output channels; got {groups}")
    if c_group * groups != c:
        raise ValueError(
            f"x: expected {c_group * groups} channels, as weight {list(filters)} reads with groups = {groups}; "
            f"got {c} in [N, C, H, W] = {list(image)}"
        )
    p = output_size(h, r, stride[0], padding[0], dilation[0])
    q = output_size(w, s, stride[1], padding[1], dilation[1])
    if p < 1 or q < 1:
        raise ValueError(f"x: expected a spatial size that a {r}x{s} window fits into; got {h}x{w} with padding {list(padding)}")
    return n, k, p, q


#: The same, found once for each problem: a network asks for the same shapes at every step.
_known_shape = lru_cache(maxsize=4096)(_output_shape)


def check_pool(x: Tensor, kernel_size: int, stride: int, padding: int) -> list[int]:
    """A square max pool of x -> the shape of its output."""
    if not 1 <= kernel_size <= 16:  # a tap's number goes into a byte
        raise ValueError(f"kernel_size: expected 1 to 16; got {kernel_size}")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1; got {stride}")
    if not 0 <= padding <= kernel_size // 2:
        raise ValueError(f"padding: expected 0 to {kernel_size // 2}, half of kernel_size; got {padding}")
    n, c, h, w = x.shape
    p, q = (output_size(size, kernel_size, stride, padding) for size in (h, w))
    if p < 1 or q < 1:
        raise ValueError(f"x: expected a spatial size that a {kernel_size}x{kernel_size} window fits into; got {h}x{w}")
    return [n, c, p, q]
