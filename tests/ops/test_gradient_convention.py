"""The gradient convention, proved: pending gradients (dz, s1, s2) against PyTorch's autograd in float64, through a whole ResNet.

One small network (7x7 stem, max pool, four bottlenecks: a projection, an identity, a projection with stride 2, an identity) is
run by three engines: PyTorch; the convention's equations, written out once more below and nowhere fused, so that the proof does
not stand on the code that it is about; and this package's operators. Output and all 46 gradients agree to rounding. Then a fault
is planted in each equation, and the comparison must see it.
"""

import inspect
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet
from fused_resnet import ops
from fused_resnet.reference import Reference

EPS = 1e-5
TOLERANCE = 1e-12
#: (width, input channels, output channels, stride, whether the shortcut is a projection)
BLOCKS = [(4, 4, 8, 1, True), (4, 8, 8, 1, False), (8, 8, 16, 2, True), (8, 16, 16, 1, False)]


class Layer(NamedTuple):
    """A convolution and its norm."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    stride: int
    padding: int


def random_layer(k: int, c: int, size: int, stride: int = 1) -> Layer:
    weight, beta = (torch.randn(s, dtype=torch.float64) * 0.4 for s in ((k, c, size, size), (k,)))
    # Not near zero, or ReLU lets a whole channel through, the next norm takes beta away again, and its gradient is zero.
    gamma = torch.rand(k, dtype=torch.float64) + 0.5
    return Layer(*(t.requires_grad_() for t in (weight, gamma, beta)), stride, size // 2)


def random_network() -> list[list[Layer]]:
    """[stem], then conv1, conv2, conv3 and perhaps the projection of each block."""
    stem = random_layer(4, 3, 7, 2)
    with torch.no_grad():  # for the same reason: of nine pixels in a window of the pool, one is nearly always above zero
        stem.beta.sub_(1)
    layers = [[stem]]
    for width, c, k, stride, projection in BLOCKS:
        block = [random_layer(width, c, 1), random_layer(width, width, 3, stride), random_layer(k, width, 1)]
        layers.append(block + ([random_layer(k, c, 1, stride)] if projection else []))
    return layers


def forward(engine, images: Tensor, layers: list[list[Layer]]) -> Tensor:
    """The network: a source is an activation, or (pending, residual) where the residual is None, an activation, or pending."""
    (stem,), *blocks = layers
    (pending,), _ = engine.convolve(images, stem)
    source = engine.max_pool(pending)
    for conv1, conv2, conv3, *projection in blocks:
        (pending, *projected), act = engine.convolve(source, conv1, *projection)
        residual = projected[0] if projection else act
        (pending,), _ = engine.convolve((pending, None), conv2)
        (pending,), _ = engine.convolve((pending, None), conv3)
        source = pending, residual
    return engine.finish(*source)


class PyTorch:
    """F.conv2d, F.batch_norm, relu. Pending is norm(y)."""

    def convolve(self, source, *layers):
        act = source if isinstance(source, Tensor) else self.finish(*source)
        return [self._norm(F.conv2d(act, m.weight, None, m.stride, m.padding), m) for m in layers], act

    def _norm(self, y, m):
        return F.batch_norm(y, None, None, m.gamma, m.beta, True, eps=EPS)

    def finish(self, z, residual=None):
        return (z if residual is None else z + residual).relu()

    def max_pool(self, z):
        return F.max_pool2d(z.relu(), 3, 2, 1)


# ---- the equations ---------------------------------------------------------------------------------------------------


def channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def standardised(y: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (y - channel(mean)) * channel(invstd)


def channel_sum(t: Tensor) -> Tensor:
    return t.sum((0, 2, 3))


class Equations:
    """What a node does with the gradients of its pending output, and how it makes those of its pending input."""

    def apply(self, dz, xhat, invstd, gamma, s1, s2):
        """dy = gamma·invstd · (dz − s1/n − x̂·s2/n)."""
        n = dz.numel() / dz.shape[1]
        return channel(gamma * invstd) * (dz - channel(s1) / n - xhat * channel(s2) / n)

    def mask(self, d, mask):
        """dz = d · mask."""
        return d * mask

    def sums(self, dz, xhat):
        """s1 = Σ dz, s2 = Σ dz·x̂."""
        return channel_sum(dz), channel_sum(dz * xhat)


class PendingInput(NamedTuple):
    """A pending activation as its consumer gets it: no parameter, only the affine map, through which no gradient flows."""

    y: Tensor
    mean: Tensor
    invstd: Tensor
    scale: Tensor
    bias: Tensor

    def affine(self) -> Tensor:
        return self.y * channel(self.scale) + channel(self.bias)

    def standardised(self) -> Tensor:
        return standardised(self.y, self.mean, self.invstd)


class Node(torch.autograd.Function):
    """act = relu(norm(x) + residual), its convolutions, and their statistics; or act = x for a materialised x.

    apply(equations, geometry, x and residual as five tensors each, (weight, gamma, beta) of each convolution)
    -> (y, mean, invstd, scale, bias) of each convolution, and act.
    """

    @staticmethod
    def forward(ctx, equations, geometry, *tensors):
        x, residual, parameters = PendingInput(*tensors[:5]), PendingInput(*tensors[5:10]), tensors[10:]
        act, mask = x.y.clone(), None
        if x.scale is not None:
            z = x.affine()
            if residual.y is not None:
                z = z + (residual.y if residual.scale is None else residual.affine())
            act, mask = z.relu(), z > 0
        outputs = []
        for (stride, padding), weight, gamma, beta in zip(geometry, parameters[::3], parameters[1::3], parameters[2::3], strict=True):
            y = F.conv2d(act, weight, None, stride, padding)
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            invstd = (var + EPS).rsqrt()
            scale = gamma * invstd
            bias = beta - mean * scale
            ctx.mark_non_differentiable(scale, bias)
            outputs += [y, mean, invstd, scale, bias]
        ctx.equations, ctx.geometry = equations, geometry
        ctx.save_for_backward(*x[:3], *residual[:3], mask, act, *parameters, *outputs)
        return *outputs, act

    @staticmethod
    def backward(ctx, *grads):
        x, mean, invstd, residual, residual_mean, residual_invstd, mask, act, *rest = ctx.saved_tensors
        count = len(ctx.geometry)
        parameters, outputs = rest[: 3 * count], rest[3 * count :]
        d, parameter_grads = grads[-1], []
        for i, (stride, padding) in enumerate(ctx.geometry):
            weight, gamma = parameters[3 * i : 3 * i + 2]
            y, y_mean, y_invstd = outputs[5 * i : 5 * i + 3]
            dz, s1, s2 = grads[5 * i : 5 * i + 3]
            # The producer's part: its norm's backward, dgrad, wgrad, and dgamma and dbeta for nothing.
            dy = ctx.equations.apply(dz, standardised(y, y_mean, y_invstd), y_invstd, gamma, s1, s2)
            d = d + torch.nn.grad.conv2d_input(act.shape, weight, dy, stride, padding)
            parameter_grads += [torch.nn.grad.conv2d_weight(act, weight.shape, dy, stride, padding), s2, s1]
        if mask is None:
            return None, None, d, *(None,) * 9, *parameter_grads
        # The consumer's part: dz and its sums, of x and of a raw residual, which shares dz and s1.
        dz = ctx.equations.mask(d, mask)
        of_x = dz, *ctx.equations.sums(dz, standardised(x, mean, invstd)), None, None
        of_residual = (None if residual is None else dz, *(None,) * 4)
        if residual_mean is not None:
            xhat = standardised(residual, residual_mean, residual_invstd)
            of_residual = dz, *ctx.equations.sums(dz, xhat), None, None
        return None, None, *of_x, *of_residual, *parameter_grads


@dataclass
class Proof:
    """The network made of `Node`s."""

    equations: Equations

    def _run(self, source, *layers):
        x, residual = (source, None) if isinstance(source, Tensor) else source
        arguments = []
        for t in (x, residual):
            arguments += list(t) if isinstance(t, PendingInput) else [t, None, None, None, None]
        for m in layers:
            arguments += [m.weight, m.gamma, m.beta]
        *outputs, act = Node.apply(self.equations, [(m.stride, m.padding) for m in layers], *arguments)
        return [PendingInput(*outputs[5 * i : 5 * i + 5]) for i in range(len(layers))], act

    convolve = _run

    def finish(self, pending, residual=None):
        return self._run((pending, residual))[1]

    def max_pool(self, pending):
        return F.max_pool2d(self.finish(pending), 3, 2, 1)


class Operators:
    """The network made of this package's operators."""

    def _conv(self, m):
        geometry = ops.ConvGeometry([m.stride] * 2, [m.padding] * 2, [1, 1], 1)
        return ops.Conv(m.weight, ops.Norm(m.gamma, m.beta, None, None, True, EPS), geometry)

    def convolve(self, source, *layers):
        convs = [self._conv(m) for m in layers]
        if isinstance(source, Tensor):
            if len(convs) == 2:
                return ops.conv_stats_pair(source, *convs), source
            return [ops.conv_stats(source, *convs)], source
        pending, residual = source
        if len(convs) == 2:
            *outputs, act = ops.norm_add_act_conv_pair(pending, residual, *convs)
        elif residual is not None:
            *outputs, act = ops.norm_add_act_conv(pending, residual, *convs)
        else:
            outputs, act = [ops.norm_act_conv(pending, *convs)], None
        return outputs, act

    def finish(self, pending, residual=None):
        return ops.norm_add_act(pending, residual)

    def max_pool(self, pending):
        return ops.norm_act_max_pool(pending)


def worst_errors(engine) -> tuple[float, list[float]]:
    """(of the output, of each gradient): the largest difference to PyTorch, over the largest value of the tensor."""
    layers = random_network()
    images = torch.randn(3, 3, 21, 23, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [images, *(t for block in layers for m in block for t in (m.weight, m.gamma, m.beta))]
    expected = forward(PyTorch(), images, layers)
    weight = torch.randn_like(expected) + 0.5  # a mean that is not zero, or the s1/n term would hide
    with fused_resnet.backend("eager"):
        result = forward(engine, images, layers)
        grads = torch.autograd.grad((result * weight).sum(), leaves)
    truth = torch.autograd.grad((expected * weight).sum(), leaves)
    relative = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip((result, *grads), (expected, *truth), strict=True)]
    return relative[0], relative[1:]


@pytest.mark.parametrize("engine", [Proof(Equations()), Operators()], ids=["equations", "operators"])
def test_all_46_gradients_agree_with_autograd(engine):
    output, gradients = worst_errors(engine)
    assert len(gradients) == 46
    assert output < TOLERANCE
    assert max(gradients) < TOLERANCE


# ---- planted faults --------------------------------------------------------------------------------------------------


class WithoutS1(Equations):
    def apply(self, dz, xhat, invstd, gamma, s1, s2):
        return super().apply(dz, xhat, invstd, gamma, 0 * s1, s2)


class WithoutS2(Equations):
    def apply(self, dz, xhat, invstd, gamma, s1, s2):
        return super().apply(dz, xhat, invstd, gamma, s1, 0 * s2)


class Unmasked(Equations):
    def mask(self, d, mask):
        return d


class SwappedSums(Equations):
    def sums(self, dz, xhat):
        return super().sums(dz, xhat)[::-1]


@pytest.mark.parametrize("fault", [WithoutS1, WithoutS2, Unmasked, SwappedSums], ids=lambda f: f.__name__)
def test_a_fault_in_an_equation_is_seen(fault):
    assert max(worst_errors(Proof(fault()))[1]) > 1e6 * TOLERANCE


def argument_changed(pass_name: str, **changes):
    """A pass of the reference that changes some of its arguments, by name, before it does its work."""
    right = getattr(Reference, pass_name)
    signature = inspect.signature(right)

    def wrong(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        for name, change in changes.items():
            bound.arguments[name] = change(bound.arguments[name])
        return right(*bound.args, **bound.kwargs)

    return pass_name, wrong


def result_changed(pass_name: str, change):
    """A pass of the reference that changes what it gives."""
    right = getattr(Reference, pass_name)
    return pass_name, lambda *args, **kwargs: change(*right(*args, **kwargs))


OPERATOR_FAULTS = {
    "without s1": argument_changed("norm_backward_apply", s1=lambda s: 0 * s),
    "without s2": argument_changed("norm_backward_apply", s2=lambda s: 0 * s),
    "without gamma": argument_changed("norm_backward_apply", gamma=lambda _: None),
    "unmasked": argument_changed("norm_backward_reduce", relu=lambda _: False),
    "swapped sums": result_changed("norm_backward_reduce", lambda dz, s1, s2, s2r: (dz, s2, s1, s2r)),
    "the residual's sum is x's": result_changed("norm_backward_reduce", lambda dz, s1, s2, s2r: (dz, s1, s2, None if s2r is None else s2)),
    "dact is lost": argument_changed("norm_backward_reduce", dact=lambda _: None),
    "the pool's sums are swapped": result_changed("norm_act_max_pool_backward", lambda dz, s1, s2: (dz, s2, s1)),
}


@pytest.mark.parametrize("fault", OPERATOR_FAULTS)
def test_a_fault_in_a_pass_is_seen(fault, monkeypatch):
    monkeypatch.setattr(Reference, *OPERATOR_FAULTS[fault])
    assert max(worst_errors(Operators())[1]) > 1e6 * TOLERANCE
