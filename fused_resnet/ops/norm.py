"""The operators that finish a pending activation without a convolution: `norm_add_act` and the two fused pools."""

from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..values import Source, accumulate_dtype
from .checks import check_pool, check_source
from .library import call, channels_last, define_with_formula, empty_nhwc, nothing, present

SOURCE = "Tensor x, Tensor mean, Tensor invstd, Tensor scale, Tensor bias"
RESIDUAL = "Tensor? residual, Tensor? residual_mean, Tensor? residual_invstd, Tensor? residual_scale, Tensor? residual_bias"


def _mask_like(x: Tensor, wanted: bool) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, h, w, (c + 7) // 8), dtype=torch.uint8) if wanted else nothing(x, torch.uint8)


def _sums_like(x: Tensor, raw_residual: bool) -> tuple[Tensor, ...]:
    """Fakes of (dz, s1, s2, residual_s2)."""
    dtype = accumulate_dtype(x.dtype)
    s1, s2 = (x.new_empty((x.shape[1],), dtype=dtype) for _ in range(2))
    return empty_nhwc(x, x.shape), s1, s2, x.new_empty((x.shape[1] if raw_residual else 0,), dtype=dtype)


def _sums(results: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    dz, s1, s2, residual_s2 = results
    return dz, s1, s2, nothing(s1, s1.dtype) if residual_s2 is None else residual_s2


def _kept(source: Source) -> Source:
    """What backward needs of a source: of the residual only a raw one, for its second sum."""
    return source if source.residual_mean is not None else source._replace(residual=None)


def _source_gradients(source: Source, has_residual: bool, results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of a source's ten tensors. A residual shares dz, and where it is raw, s1."""
    dz, s1, s2, residual_s2 = results
    raw = source.residual_mean is not None
    residual = (dz if has_residual else None, s1 if raw else None, residual_s2 if raw else None)
    return dz, s1, s2, None, None, *residual, None, None


# ---- norm_add_act ----------------------------------------------------------------------------------------------------


def _norm_add_act(*args):
    *tensors, relu, backend = args
    source = Source(*tensors)
    check_source(source)
    act, mask = BACKENDS[backend].norm_add_act(source, relu, save_mask=relu and source.residual is not None)
    return act, nothing(act, torch.uint8) if mask is None else mask


def _norm_add_act_fake(*args):
    *tensors, relu, _ = args
    source = Source(*tensors)
    check_source(source)
    return empty_nhwc(source.x, source.x.shape), _mask_like(source.x, relu and source.residual is not None)


def _norm_add_act_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.relu, ctx.backend = inputs
    source = Source(*tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.has_residual = source.residual is not None
    ctx.save_for_backward(*_kept(source), output[1])


def _norm_add_act_formula(ctx: Any, dact: Tensor | None, _: Any) -> tuple:
    *tensors, mask = ctx.saved_tensors
    if dact is None:
        return (None,) * 12
    source = Source(*tensors)
    results = call("norm_add_act_backward")(dact, *source, mask, ctx.relu, ctx.backend)
    return *_source_gradients(source, ctx.has_residual, results), None, None


def _norm_add_act_backward(dact, *args):
    *tensors, mask, relu, backend = args
    source = Source(*tensors)
    return _sums(BACKENDS[backend].norm_backward_reduce(channels_last(dact), None, source, present(mask), relu))


def _norm_add_act_backward_fake(dact, *args):
    source = Source(*args[:10])
    return _sums_like(source.x, source.residual_mean is not None)


# ---- norm_act_max_pool -----------------------------------------------------------------------------------------------


def _norm_act_max_pool(*args):
    *tensors, kernel_size, stride, padding, backend = args
    source = Source(*tensors)
    check_source(source)
    check_pool(source.x, kernel_size, stride, padding)
    return BACKENDS[backend].norm_act_max_pool(source, kernel_size, stride, padding)


def _norm_act_max_pool_fake(*args):
    *tensors, kernel_size, stride, padding, _ = args
    source = Source(*tensors)
    check_source(source)
    shape = check_pool(source.x, kernel_size, stride, padding)
    return empty_nhwc(source.x, shape), empty_nhwc(source.x, shape, torch.uint8)


def _norm_act_max_pool_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, kernel_size, stride, padding, ctx.backend = inputs
    ctx.window = (kernel_size, stride, padding)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _norm_act_max_pool_formula(ctx: Any, dout: Tensor | None, _: Any) -> tuple:
    *tensors, index = ctx.saved_tensors
    if dout is None:
        return (None,) * 9
    dz, s1, s2 = call("norm_act_max_pool_backward")(dout, index, *tensors, *ctx.window, ctx.backend)
    return dz, s1, s2, None, None, None, None, None, None


def _norm_act_max_pool_backward(dout, *args):
    index, *tensors, kernel_size, stride, padding, backend = args
    return BACKENDS[backend].norm_act_max_pool_backward(channels_last(dout), index, Source(*tensors), kernel_size, stride, padding)


def _norm_act_max_pool_backward_fake(dout, index, x, *args):
    return _sums_like(x, False)[:3]


# ---- norm_add_act_avg_pool -------------------------------------------------------------------------------------------


def _norm_add_act_avg_pool(*args):
    *tensors, backend = args
    source = Source(*tensors)
    check_source(source)
    out, mask = BACKENDS[backend].norm_add_act_avg_pool(source)
    return out, nothing(out, torch.uint8) if mask is None else mask


def _norm_add_act_avg_pool_fake(*args):
    source = Source(*args[:-1])
    check_source(source)
    x = source.x
    return empty_nhwc(x, (*x.shape[:2], 1, 1)), _mask_like(x, source.residual is not None)


def _norm_add_act_avg_pool_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.backend = inputs
    source = Source(*tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.has_residual = source.residual is not None
    ctx.save_for_backward(*_kept(source), output[1])


def _norm_add_act_avg_pool_formula(ctx: Any, dout: Tensor | None, _: Any) -> tuple:
    *tensors, mask = ctx.saved_tensors
    if dout is None:
        return (None,) * 11
    source = Source(*tensors)
    results = call("norm_add_act_avg_pool_backward")(dout, *source, mask, ctx.backend)
    return *_source_gradients(source, ctx.has_residual, results), None


def _norm_add_act_avg_pool_backward(dout, *args):
    *tensors, mask, backend = args
    source = Source(*tensors)
    return _sums(BACKENDS[backend].norm_add_act_avg_pool_backward(channels_last(dout), source, present(mask)))


def _norm_add_act_avg_pool_backward_fake(dout, *args):
    source = Source(*args[:10])
    return _sums_like(source.x, source.residual_mean is not None)


define_with_formula(
    f"norm_add_act_backward(Tensor dact, {SOURCE}, {RESIDUAL}, Tensor mask, bool relu, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_add_act_backward,
    _norm_add_act_backward_fake,
)
define_with_formula(
    f"norm_add_act({SOURCE}, {RESIDUAL}, bool relu, str backend) -> (Tensor, Tensor)",
    _norm_add_act,
    _norm_add_act_fake,
    _norm_add_act_setup,
    _norm_add_act_formula,
)
define_with_formula(
    f"norm_act_max_pool_backward(Tensor dout, Tensor index, {SOURCE}, int kernel_size, int stride, int padding, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _norm_act_max_pool_backward,
    _norm_act_max_pool_backward_fake,
)
define_with_formula(
    f"norm_act_max_pool({SOURCE}, int kernel_size, int stride, int padding, str backend) -> (Tensor, Tensor)",
    _norm_act_max_pool,
    _norm_act_max_pool_fake,
    _norm_act_max_pool_setup,
    _norm_act_max_pool_formula,
)
define_with_formula(
    f"norm_add_act_avg_pool_backward(Tensor dout, {SOURCE}, {RESIDUAL}, Tensor mask, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_add_act_avg_pool_backward,
    _norm_add_act_avg_pool_backward_fake,
)
define_with_formula(
    f"norm_add_act_avg_pool({SOURCE}, {RESIDUAL}, str backend) -> (Tensor, Tensor)",
    _norm_add_act_avg_pool,
    _norm_add_act_avg_pool_fake,
    _norm_add_act_avg_pool_setup,
    _norm_add_act_avg_pool_formula,
)
