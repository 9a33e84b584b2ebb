"""Turns a convolution's task into a graph of cuDNN's, and runs it. Tensors as in `reference`: NHWC activations, float32 vectors."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import ConvProblem
from ..reference import allow_tf32, like_weight, ones
from ..tuning import Task
from ..values import ConvGeometry, Source, problem_of
from .graphs import GraphProblem
from .plans import Plan, plans_of


def deterministic() -> bool:
    """Whether the user asked for the same bits from the same input."""
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()


def problem_of_task(task: Task) -> GraphProblem | str:
    """The graph that does a task's work, or a sentence that says why none does."""
    options = {"tf32": allow_tf32(), "deterministic": deterministic()}
    if task.kind == "dgrad":
        dact = task.dact or bool(task.compact)  # a projection's gradient is one of the whole activation here
        return GraphProblem("dgrad", task.conv, task.dtype, task.source, dact, **options)
    if task.source.startswith("norm_add"):
        return "cuDNN's prologue hands out no mask: scale_bias_add_relu and conv_genstats are two graphs"
    if task.kind == "wgrad" and task.source == "act":
        return "wgrad with nothing before it is the framework's convolution"
    name = "scale_bias_relu_wgrad" if task.kind == "wgrad" else fprop_graph(task.source, task.dtype)
    return GraphProblem(name, task.conv, task.dtype, task.source, **options)


def fprop_graph(source: str, dtype: str) -> str:
    """The graph of a convolution of an activation that exists ("act"), or of relu(norm(x)) ("norm")."""
    if source == "norm":
        return "scale_bias_relu_conv_genstats"
    return "conv_genstats" if dtype == "float16" else "conv_sums"


def why_not_task(task: Task, device: torch.device) -> str | None:
    """Why cuDNN does not do a task on a GPU; None where it does. The plan is built for that, once."""
    problem = problem_of_task(task)
    if isinstance(problem, str):
        return problem
    from .probe import why_not_graph  # which runs graphs by this module

    if reason := why_not_graph(problem.graph, problem.source, problem.dtype, device):
        return reason
    found = plans_of(device).get(problem)
    return found if isinstance(found, str) else None


class Coefficients(NamedTuple):
    """scale and bias as a prologue of cuDNN reads them, [C] in the activations' dtype, and the same values in float32."""

    scale: Tensor
    bias: Tensor
    wide_scale: Tensor
    wide_bias: Tensor


def rounded_coefficients(source: Source) -> Coefficients:
    """scale rounded to the dtype of x, and with that scale the bias that keeps z at the mean, rounded likewise.

    z = x·scale + bias is at x = mean what it should be but for bias' own rounding: what scale loses is multiplied with x − mean, not
    with x. That bias' rounding costs no more than x's did (docs/backends.md).
    """
    dtype = source.x.dtype
    scale = source.scale.to(dtype)
    wide = scale.float()
    bias = torch.addcmul(source.bias, source.mean, source.scale - wide).to(dtype)
    return Coefficients(scale, bias, wide, bias.float())


def as_cudnn_reads(source: Source) -> Source:
    """A pending source with the coefficients that cuDNN's prologue uses. Doing it again changes nothing."""
    made = rounded_coefficients(source)
    return source._replace(scale=made.wide_scale, bias=made.wide_bias)


def _plan(graph: str, x: Tensor, conv: ConvProblem, source: str, dact: bool = False) -> Plan:
    problem = GraphProblem(graph, conv, _name(x), source, dact, allow_tf32(), deterministic())
    found = plans_of(x.device).get(problem)
    if isinstance(found, str):
        raise RuntimeError(f"cuDNN refuses {problem}: {found}")
    return found


def _krsc(weight: Tensor) -> Tensor:
    """The filter as cuDNN reads it; a copy only where its strides are not channels_last."""
    return weight.contiguous(memory_format=torch.channels_last)


def _activation(x: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((n, c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _sums(x: Tensor, count: int, channels: int) -> Tensor:
    """Zeros, since a reduction may add into what is there."""
    return torch.zeros((count, channels), dtype=torch.float32, device=x.device)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def fprop(source: Source, weight: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """(y, Σ y, Σ y²) of an activation that exists, or of relu(norm(x)) by `rounded_coefficients`."""
    x, conv = source.x, problem_of(source.x, weight, geometry)
    y, (total, squares) = _activation(x, conv.n, conv.k, conv.p, conv.q), _sums(x, 2, conv.k)
    tensors = {"x": x, "weight": _krsc(weight), "y": y, "sum": total, "square_sum": squares}
    kind = source.kind()
    if source.pending:
        made = rounded_coefficients(source)
        tensors |= {"scale": made.scale, "bias": made.bias}
    _plan(fprop_graph(kind, _name(x)), x, conv, kind).run(tensors)
    return y, total, squares


def dgrad(
    source: Source, mask: Tensor | None, dy: Tensor, weight: Tensor, geometry: ConvGeometry, dact: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dz, s1, s2, residual_s2) as `Reference.convolve_backward` hands them out; of a materialised source (dx, None, None, None)."""
    x, conv = source.x, problem_of(source.x, weight, geometry)
    kind, raw = source.kind(mask), source.residual_mean is not None
    dz = _activation(x, *x.shape)
    tensors = {"dy": dy, "weight": _krsc(weight), "dz": dz} | ({} if dact is None else {"dact": dact})
    sums: list[Tensor | None] = [None, None, None]
    if source.pending:
        s1, s2, residual_s2 = _sums(x, 3, conv.c)
        sums = [s1, s2, residual_s2 if raw else None]
        tensors |= {"x": x, "mean": source.mean, "invstd": source.invstd, "s1": sums[0], "s2": sums[1]}
        tensors |= {"scale": source.scale, "bias": source.bias} if mask is None else {"mask": mask}
    if raw:
        tensors |= {"residual": source.residual, "residual_mean": source.residual_mean, "residual_invstd": source.residual_invstd}
        tensors["residual_s2"] = sums[2]
    _plan("dgrad", x, conv, kind, dact is not None).run(tensors)
    return dz, *sums


def wgrad(source: Source, dy: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """dw of relu(norm(x)) by `rounded_coefficients`, in the strides of the weight."""
    x, conv, made = source.x, problem_of(source.x, weight, geometry), rounded_coefficients(source)
    dw = _activation(x, conv.k, conv.c, conv.r, conv.s)
    tensors = {"x": x, "scale": made.scale, "bias": made.bias, "dy": dy, "dw": dw}
    _plan("scale_bias_relu_wgrad", x, conv, "norm").run(tensors)
    return like_weight(dw, weight)


def norm_add_act(source: Source, tried: bool = False) -> tuple[Tensor, Tensor] | None:
    """As `Reference.norm_add_act` with a ReLU, a residual and a mask; None where cuDNN refuses.

    `tried` says that the graph need not be tried first.
    """
    x, _, _, scale, bias, residual, _, _, residual_scale, residual_bias = source
    plan = _pointwise("scale_bias_add_relu", x, "norm_add" if residual_scale is None else "norm_add_raw", tried)
    if plan is None:
        return None
    n, c, h, w = x.shape
    act, mask = _activation(x, n, c, h, w), torch.empty((n, h, w, c // 8), dtype=torch.uint8, device=x.device)
    tensors = {"x": x, "scale": scale, "bias": bias, "residual": residual, "zero": _sums(x, 1, c), "mask": mask, "act": act}
    if residual_scale is not None:
        tensors |= {"residual_scale": residual_scale, "residual_bias": residual_bias}
    plan.run(tensors)
    return act, mask


def norm_backward_apply(
    dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None, s1: Tensor, s2: Tensor, tried: bool = False
) -> Tensor | None:
    """As `Reference.norm_backward_apply`; None where cuDNN refuses. `tried` as above.

    dy = a·dz + b·y + c with a = gamma·invstd, b = −a·invstd·s2/n, c = −a·s1/n − b·mean.
    """
    plan = _pointwise("dbn_apply", y, "norm", tried)
    if plan is None:
        return None
    count = y.numel() // y.shape[1]
    dz_factor = invstd if gamma is None else invstd * gamma.float()
    y_factor = dz_factor * invstd * s2 / -count
    constant = dz_factor * s1 / -count - y_factor * mean
    dy = _activation(y, *y.shape)
    plan.run({"dz": dz, "y": y, "dz_factor": dz_factor, "y_factor": y_factor, "constant": constant, "dy": dy})
    return dy


def conv_affine_act(
    x: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    scale: Tensor | None,
    bias: Tensor,
    residual: Tensor | None,
    tried: bool = False,
) -> Tensor | None:
    """As `Reference.conv_affine_act` with a ReLU, in one kernel; None where cuDNN refuses. `tried` as above."""  # fmt: skip
    from .probe import why_not_graph

    conv = problem_of(x, weight, geometry)
    kind, tf32 = "norm" if residual is None else "norm_add", allow_tf32()
    problem = GraphProblem("conv_scale_bias_add_relu", conv, _name(x), kind, tf32=tf32, deterministic=deterministic())
    if not tried and why_not_graph(problem.graph, kind, problem.dtype, x.device):
        return None
    plan = plans_of(x.device).get(problem)
    if isinstance(plan, str):
        return None
    act = _activation(x, conv.n, conv.k, conv.p, conv.q)
    scale = ones(conv.k, torch.float32, x.device) if scale is None else scale.float()
    tensors = {"x": x, "weight": _krsc(weight), "scale": scale, "bias": bias.float(), "act": act}
    plan.run(tensors if residual is None else tensors | {"residual": residual})
    return act


#: The graphs without a convolution.
POINTWISE = ("scale_bias_add_relu", "dbn_apply")


def pointwise_problem(graph: str, shape: tuple[int, ...], dtype: str, source: str) -> GraphProblem:
    """A graph of `POINTWISE` for activations of `shape`, [N, C, H, W]."""
    n, c, h, w = shape
    return GraphProblem(graph, ConvProblem(n, c, h, w, c, 1, 1), dtype, source)


def _pointwise(graph: str, x: Tensor, source: str, tried: bool) -> Plan | None:
    from .probe import why_not_graph

    if not tried and why_not_graph(graph, source, _name(x), x.device):
        return None
    plan = plans_of(x.device).get(pointwise_problem(graph, tuple(x.shape), _name(x), source))
    return None if isinstance(plan, str) else plan
