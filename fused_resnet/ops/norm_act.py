"""`norm_act`: the batch norm of an activation that exists, and its ReLU, as a pre-activation block begins.

Its gradients are ordinary ones, so it goes anywhere. Forward: one trip for the statistics, one to apply; backward: one to mask and
to reduce, one to apply. Saved: x and five vectors; the mask is recomputed.
"""

from typing import Any

from torch import Tensor

from ..backends import BACKENDS
from ..values import Norm, Source, accumulate_dtype
from .checks import NORM_VECTORS, check_activation, check_vectors
from .library import call, channels_last, define_with_formula, empty_nhwc


def _check(x: Tensor, norm: Norm) -> None:
    check_activation("x", x)
    check_vectors(NORM_VECTORS, norm[:4], x.shape[1], x)
    if norm.training and x.numel() == x.shape[1]:  # PyTorch's own words
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise ValueError("running_mean, running_var: expected tensors where training is False; got None")


def _norm_act(x: Tensor, *args):
    *fields, backend = args
    norm = Norm(*fields)
    _check(x, norm)
    passes = BACKENDS[backend]
    if norm.training:
        mean, invstd, var, scale, bias = passes.batch_stats(x, norm.gamma, norm.beta, norm.eps)
    else:
        mean, invstd, var, scale, bias = passes.running_stats(norm, x.dtype)
    act, _ = passes.norm_add_act(Source(x, mean, invstd, scale, bias), relu=True, save_mask=False)
    return act, mean, invstd, var, scale, bias


def _fake(x: Tensor, *args):
    _check(x, Norm(*args[:-1]))
    vectors = [x.new_empty((x.shape[1],), dtype=accumulate_dtype(x.dtype)) for _ in range(5)]
    return empty_nhwc(x, x.shape), *vectors


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gamma, beta, _, _, ctx.training, _, ctx.backend = inputs
    act, mean, invstd, var, scale, bias = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, invstd, var, scale, bias)
    ctx.dtypes = [None if p is None else p.dtype for p in (gamma, beta)]
    ctx.save_for_backward(x, mean, invstd, scale, bias, gamma)


def _formula(ctx: Any, dact: Tensor | None, *_: Any) -> tuple:
    if dact is None:
        return (None,) * 8
    results = call("norm_act_backward")(dact, *ctx.saved_tensors, ctx.training, ctx.backend)
    dx, s1, s2 = results
    dgamma, dbeta = (
        g.to(dtype) if needed and dtype is not None else None
        for g, needed, dtype in zip((s2, s1), ctx.needs_input_grad[1:3], ctx.dtypes, strict=True)
    )
    return dx if ctx.needs_input_grad[0] else None, dgamma, dbeta, None, None, None, None, None


def _backward(dact, x, mean, invstd, scale, bias, gamma, training, backend):
    passes = BACKENDS[backend]
    dz, s1, s2, _ = passes.norm_backward_reduce(channels_last(dact), None, Source(x, mean, invstd, scale, bias), None, relu=True)
    if training:
        return passes.norm_backward_apply(dz, x, mean, invstd, gamma, s1, s2), s1, s2
    return (dz * scale[:, None, None]).to(x.dtype), s1, s2  # running statistics are constants


def _backward_fake(dact, x, *_):
    s1, s2 = (x.new_empty((x.shape[1],), dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    return empty_nhwc(x, x.shape), s1, s2


define_with_formula(
    "norm_act_backward(Tensor dact, Tensor x, Tensor mean, Tensor invstd, Tensor scale, Tensor bias, Tensor? gamma, bool training,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
define_with_formula(
    "norm_act(Tensor x, Tensor? gamma, Tensor? beta, Tensor? running_mean, Tensor? running_var, bool training, float eps,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_act,
    _fake,
    _setup,
    _formula,
)
