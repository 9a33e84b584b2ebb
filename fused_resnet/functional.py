"""One layer at a time, with ordinary tensors and ordinary gradients."""

import torch.nn.functional as F
from torch import Tensor

from . import ops
from .nn.block import to_nhwc
from .nn.modules import autocast_dtype, runs_modules
from .ops import Conv, ConvGeometry, Norm
from .ops.checks import check_conv, check_residual, check_vectors


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    training: bool = True,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    relu: bool = True,
) -> Tensor:
    """relu(batch_norm(conv2d(x, weight)) + residual), as [N, K, P, Q] in channels_last.

    x [N, C, H, W] and residual [N, K, P, Q] may have any layout: like a network's entry, this converts to channels_last.
    weight [K, C/groups, R, S] is of x's dtype, except under autocast, which casts both. gamma, beta, running_mean, running_var
    are [K] or None. In training the batch's statistics normalise, and the running ones, where given, are updated in place
    with `momentum`, as torch.nn.functional.batch_norm does; otherwise the running ones normalise. Gradients flow to x, weight,
    gamma, beta and residual; differentiating twice raises RuntimeError. Where the backend in force is "off", and within transforms of
    torch.func and forward-mode AD, PyTorch's three functions do the work, and differentiate as they do.

    Raises ValueError or TypeError, naming the argument, where shapes, dtypes or devices do not fit.
    """
    if dtype := autocast_dtype(x):
        x, weight = x.to(dtype), weight.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    conv = Conv(
        weight,
        Norm(gamma, beta, *((None, None) if training else (running_mean, running_var)), training, eps),
        ConvGeometry.of(stride, padding, dilation, groups),
    )
    if ops.is_transformed():  # PyTorch's functions check for themselves
        return _by_pytorch(x, conv, running_mean, running_var, momentum, residual, relu)
    x = _channels_last("x", x)
    residual = None if residual is None else _channels_last("residual", residual)
    check_vectors(("running_mean", "running_var"), (running_mean, running_var), weight.shape[0], x)
    if runs_modules(x, x.dtype):
        shape = check_conv(x, conv)
        if residual is not None:
            check_residual(residual, shape, x)
        return _by_pytorch(x, conv, running_mean, running_var, momentum, residual, relu)
    if not training and ops.inferring(x, weight, gamma, beta, residual):
        return ops.conv_affine_act(x, weight, conv.geometry, *ops.running_affine(x, conv), residual, relu)
    out = ops.conv_stats(x, conv)
    if training and running_mean is not None and running_var is not None and len(x):
        size = ops.values_per_channel(out.y)
        ops.update_running_statistics([], [running_mean], [running_var], [out.mean], [out.var], [size], momentum)
    return ops.norm_add_act(out, residual, relu)


def _by_pytorch(
    x: Tensor,
    conv: Conv,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    gamma, beta, *_, training, eps, _ = conv.norm
    out = F.conv2d(x, conv.weight, None, *conv.geometry)
    out = F.batch_norm(out, running_mean, running_var, gamma, beta, training, momentum, eps)
    out = out if residual is None else out + residual
    out = F.relu(out) if relu else out
    return out if ops.is_transformed() else to_nhwc(out)


def _channels_last(name: str, t: Tensor) -> Tensor:
    if t.dim() != 4:
        raise ValueError(f"{name}: expected a tensor of rank 4, [N, C, H, W]; got shape {list(t.shape)}")
    return to_nhwc(t)
