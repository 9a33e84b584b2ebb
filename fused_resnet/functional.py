"""One layer at a time, with ordinary tensors and ordinary gradients."""

from torch import Tensor

from . import ops
from .nn.activation import blend, moments
from .nn.block import to_nhwc
from .nn.modules import autocast_dtype
from .ops import Conv, ConvGeometry, Norm
from .ops.checks import check_vectors


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    training: bool = True,
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
    gamma, beta and residual; differentiating twice raises RuntimeError.

    Raises ValueError or TypeError, naming the argument, where shapes, dtypes or devices do not fit.
    """
    if dtype := autocast_dtype(x):
        x, weight = x.to(dtype), weight.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    x = _channels_last("x", x)
    residual = None if residual is None else _channels_last("residual", residual)
    running = (None, None) if training else (running_mean, running_var)
    conv = Conv(
        weight,
        Norm(gamma, beta, *running, training, eps),
        ConvGeometry(_pair(stride), _pair(padding), _pair(dilation), groups),
    )
    check_vectors(("running_mean", "running_var"), (running_mean, running_var), weight.shape[0], x)
    if not training and ops.inferring(x, weight, gamma, beta, residual):
        return ops.conv_affine_act(x, weight, conv.geometry, *ops.running_affine(x, conv), residual, relu)
    out = ops.conv_stats(x, conv)
    if training and running_mean is not None and running_var is not None:
        blend([(running_mean, running_var)], [moments(out)], momentum)
    return ops.norm_add_act(out, residual, relu)


def _channels_last(name: str, t: Tensor) -> Tensor:
    if t.dim() != 4:
        raise ValueError(f"{name}: expected a tensor of rank 4, [N, C, H, W]; got shape {list(t.shape)}")
    return to_nhwc(t)


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
