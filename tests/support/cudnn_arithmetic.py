"""The arithmetic of cuDNN's graphs on the CPU, float32 between the nodes, and a backend that runs its tasks by it. For tests alone.

It stands in for the GPU, not for the package: what is tested with it is how the backend puts tasks together, and what rounded
coefficients and sums of squares cost.
"""

import torch
from torch import Tensor

from fused_resnet.backends import cudnn as backend_cudnn
from fused_resnet.backends.convolutions import FusedConvolutions
from fused_resnet.backends.passes_triton import PassesTriton
from fused_resnet.cudnn.work import problem_of_task, rounded_coefficients
from fused_resnet.reference import Reference, like_weight, unpack_mask
from fused_resnet.tuning import CUDNN, heuristics
from fused_resnet.values import ConvGeometry, Source, nhwc


def _channels(vector: Tensor) -> Tensor:
    return vector.float()[:, None, None]


def _affine(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x·scale, rounded to float32, + bias, rounded again: two nodes."""
    return x.float() * _channels(scale) + _channels(bias)


def _prologue(source: Source) -> Tensor:
    if not source.pending:
        return source.x
    made = rounded_coefficients(source)
    return _affine(source.x, made.scale, made.bias).relu().to(source.x.dtype)


def fprop(source: Source, weight: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused_resnet.cudnn.fprop`."""
    y = nhwc(torch.conv2d(_prologue(source).float(), weight.float(), None, *geometry).to(source.x.dtype))
    return y, y.float().sum((0, 2, 3)), (y.float() ** 2).sum((0, 2, 3))


def dgrad(source, mask, dy, weight, geometry, dact):
    """As `fused_resnet.cudnn.dgrad`."""
    x = source.x
    d = torch.nn.grad.conv2d_input(x.shape, weight.float(), dy.float(), *geometry[:3])
    d = d if dact is None else d + dact
    if not source.pending:
        return nhwc(d.to(x.dtype)), None, None, None
    keep = _affine(x, source.scale, source.bias) > 0 if mask is None else unpack_mask(mask, x.shape[1])
    dz = nhwc((d * keep).to(x.dtype))

    def product(t: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
        return (dz.float() * ((t.float() - _channels(mean)) * _channels(invstd))).sum((0, 2, 3))

    raw = source.residual_mean is not None
    residual_s2 = product(source.residual, source.residual_mean, source.residual_invstd) if raw else None
    return dz, dz.float().sum((0, 2, 3)), product(x, source.mean, source.invstd), residual_s2


def wgrad(source: Source, dy: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """As `fused_resnet.cudnn.wgrad`."""
    dw = torch.nn.grad.conv2d_weight(_prologue(source).float(), weight.shape, dy.float(), *geometry[:3])
    return like_weight(dw.to(weight.dtype), weight)


def why_not_task(task) -> str | None:
    """What rules a task out before cuDNN is asked."""
    problem = problem_of_task(task)
    return problem if isinstance(problem, str) else problem.why_not()


class Arithmetic(FusedConvolutions, PassesTriton):
    """Every task that there is a graph for, by the functions above, which a test puts in the place of `fused_resnet.cudnn`'s."""

    name = "cudnn_arithmetic"

    def choose(self, task, device):
        return CUDNN if why_not_task(task) is None else None


class Mixed(Arithmetic):
    """A third of the tasks each by cuDNN's arithmetic, by Triton kernels and by passes, as the tuner may mix them."""

    name = "cudnn_mixed"

    def choose(self, task, device):
        turn = (task.conv.c + task.conv.k + task.conv.r + len(task.kind + task.source)) % 3
        if turn == 0:
            return None
        return heuristics.configuration(task, (9, 0)) if turn == 1 else super().choose(task, device)


class OnlyForward(Arithmetic):
    """fprop by cuDNN's arithmetic, backward by Triton kernels: they must take the mask and the activation of cuDNN's forward."""

    name = "cudnn_forward"

    def choose(self, task, device):
        return super().choose(task, device) if task.kind == "fprop" else heuristics.configuration(task, (9, 0))


def put_in_place(monkeypatch) -> list[str]:
    """Let `FusedConvolutions` call these functions -> what they are called for, filled as they are: "fprop norm"."""
    called: list[str] = []

    def counted(function):
        def call(source, *rest):
            residual = "norm_add_raw" if source.residual_mean is not None else "norm_add" if torch.is_tensor(rest[0]) else "norm"
            kind = "act" if not source.pending else residual if function is dgrad else "norm"
            called.append(f"{function.__name__} {kind}")
            return function(source, *rest)

        return call

    for function in (fprop, dgrad, wgrad):
        monkeypatch.setattr(backend_cudnn.cudnn, function.__name__, counted(function))
    return called


def raw(shape, ratio: float, dtype=torch.float16) -> torch.Tensor:
    """A raw output whose mean is `ratio` deviations away from zero, of either sign by channel."""
    sign = torch.where(torch.arange(shape[1]) % 2 == 0, 1.0, -1.0)[None, :, None, None]
    return nhwc((torch.randn(shape) + ratio * sign).to(dtype))


def pending(ratio: float, channels: int = 64) -> tuple[Source, torch.Tensor]:
    """(a source with float32 coefficients, the float64 raw output that its x was rounded from)."""
    exact = raw((8, channels, 9, 9), ratio, torch.float64)
    x = exact.half()
    gamma, beta = torch.rand(channels) + 0.5, torch.randn(channels) * 0.3
    mean, invstd, _, scale, bias = Reference().batch_stats(x, gamma, beta, 1e-5)
    return Source(x, mean, invstd, scale, bias), exact
