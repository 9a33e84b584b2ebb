"""Small networks written once and run by several engines: our operators, PyTorch in any dtype, and PyTorch on given masks.

A single operator's pending gradients are not its derivative, so operators are compared in closed chains: from an input to a
scalar. The float64 gradient is recomputed on the very ReLU masks (and pool taps) that an engine used, since a pre-activation
that rounds to the other side of zero changes a gradient by all of it, and hides errors of the arithmetic.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import ops
from fused_resnet.backends import BACKENDS, TUNED
from fused_resnet.ops import Conv, ConvGeometry, Norm, Pending

EPS = 1e-5
#: Where the operators are tested: the GPU where there is one.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: The backends that run the passes here: on a CPU those for CPUs, and the CUDA kernels by the SIMT shim; Triton's in its interpreter, or
#: compiled (tests/support/executed.py).
LANGUAGES = [
    name
    for name in ("passes_cuda", "passes_cpu", "emulated", "passes_triton", "executed")
    if name in BACKENDS and not BACKENDS[name].why_not(DEVICE, torch.float32)
]
#: What is tested as a backend. `tuned` is made of others: tests/bench/test_tune.py holds which of them it takes.
TESTED = [name for name in BACKENDS if name not in TUNED]
#: Those that run here.
RUNNABLE = [name for name in TESTED if not BACKENDS[name].why_not(DEVICE, torch.float32)]


@dataclass
class Layer:
    """A convolution, its norm, and the norm's running statistics."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @classmethod
    def random(cls, k: int, c: int, size: int, device: torch.device, **geometry: int) -> "Layer":
        """Random parameters, in float64, exact in float16 and bfloat16 where a weight is."""
        groups = geometry.get("groups", 1)
        weight = torch.randn(k, c // groups, size, size, dtype=torch.float64) * (2.0 / (c // groups * size * size)) ** 0.5
        vectors = torch.rand(k) + 0.5, torch.randn(k) * 0.3, torch.randn(k) * 0.1, torch.rand(k) + 0.5
        return cls(weight.bfloat16().half().to(device), *(v.to(device) for v in vectors), **geometry)

    def leaves(self, dtype: torch.dtype) -> "Layer":
        """A copy with gradients: the weight in `dtype`, the norm's vectors in float32 (float64 for float64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return Layer(
            self.weight.to(dtype, copy=True).requires_grad_(),
            *(v.to(wide, copy=True).requires_grad_() for v in (self.gamma, self.beta)),
            *(v.to(wide, copy=True) for v in (self.running_mean, self.running_var)),
            *geometry,
        )


@dataclass
class PyTorch:
    """F.conv2d, F.batch_norm, relu, autograd. With `masks` and `taps`, ReLU and max pool let through what those say."""

    layers: list[Layer]
    training: bool = True
    masks: list[Tensor] | None = None
    taps: list[Tensor] | None = None
    used_masks: list[Tensor] = field(default_factory=list)
    used_taps: list[Tensor] = field(default_factory=list)
    preactivations: list[Tensor] = field(default_factory=list)

    def conv(self, a: Tensor, i: int) -> Tensor:
        """norm(conv(a))."""
        layer = self.layers[i]
        y = F.conv2d(a, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        running = layer.running_mean, layer.running_var
        return F.batch_norm(y, *running, layer.gamma, layer.beta, self.training, 0.1, EPS)

    def conv_pair(self, a: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
        return self.conv(a, i), self.conv(a, j)

    def act(self, z: Tensor, residual: Tensor | None = None, read_again: bool = False) -> Tensor:
        """relu(z + residual)."""
        t = z if residual is None else z + residual
        self.preactivations.append(t.detach())
        mask = self.masks.pop(0) if self.masks else t.detach() > 0
        self.used_masks.append(mask)
        return torch.where(mask, t, 0.0)

    def tensor(self, a: Tensor) -> Tensor:
        return a

    def affine(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        """z + residual, no relu."""
        return z if residual is None else z + residual

    def max_pool(self, z: Tensor) -> Tensor:
        a = self.act(z)
        (n, c, h, w), (p, q) = a.shape, [(size - 1) // 2 + 1 for size in a.shape[2:]]
        columns = F.unfold(F.pad(a, (1, 1, 1, 1), value=-1.0), 3, stride=2).view(n, c, 9, p, q)
        taps = self.taps.pop(0) if self.taps else columns.detach().argmax(2)
        self.used_taps.append(taps)
        return columns.gather(2, taps.long().unsqueeze(2)).squeeze(2)

    def avg_pool(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.act(z, residual).mean((2, 3), keepdim=True)


@dataclass
class Ours:
    """The operators of this package, by the backend in force. Records the masks and taps that its backward uses."""

    layers: list[Layer]
    training: bool = True
    used_masks: list[Tensor] = field(default_factory=list)
    used_taps: list[Tensor] = field(default_factory=list)

    def _conv(self, i: int) -> Conv:
        layer = self.layers[i]
        running = (None, None) if self.training else (layer.running_mean, layer.running_var)
        geometry = ConvGeometry(*([v, v] for v in (layer.stride, layer.padding, layer.dilation)), layer.groups)
        return Conv(layer.weight, Norm(layer.gamma, layer.beta, *running, self.training, EPS), geometry)

    def _tell(self, i: int, out: Pending) -> Pending:
        if self.training:
            layer, n = self.layers[i], out.y.numel() // out.y.shape[1]
            layer.running_mean.lerp_(out.mean.detach(), 0.1)
            layer.running_var.lerp_(out.var.detach() * (n / (n - 1)), 0.1)
        return out

    def conv(self, a: Any, i: int) -> Pending:
        if isinstance(a, Tensor):
            return self._tell(i, ops.conv_stats(a, self._conv(i)))
        if a["read_again"] or a["residual"] is not None:
            out, a["made"] = ops.norm_add_act_conv(a["x"], a["residual"], self._conv(i))
            return self._tell(i, out)
        conv = self._conv(i)
        self.used_masks[a["mask"]] = ops.relu_mask(a["x"], conv=conv)  # the convolution may round the coefficients
        return self._tell(i, ops.norm_act_conv(a["x"], conv))

    def conv_pair(self, a: Any, i: int, j: int) -> tuple[Pending, Pending]:
        convs = self._conv(i), self._conv(j)
        if isinstance(a, Tensor):
            out, out2 = ops.conv_stats_pair(a, *convs)
        else:
            out, out2, a["made"] = ops.norm_add_act_conv_pair(a["x"], a["residual"], *convs)
        return self._tell(i, out), self._tell(j, out2)

    def _see(self, x: Pending, residual: Any) -> Any:
        residual = residual["made"] if isinstance(residual, dict) else residual
        self.used_masks.append(ops.relu_mask(x, residual))
        return residual

    def act(self, x: Pending, residual: Any = None, read_again: bool = False) -> dict:
        """A promise of relu(norm(x) + residual); whoever reads it makes it."""
        residual = self._see(x, residual)
        return {"x": x, "residual": residual, "read_again": read_again, "mask": len(self.used_masks) - 1}

    def tensor(self, a: dict) -> Tensor:
        return a["made"] if "made" in a else ops.norm_add_act(a["x"], a["residual"])

    def affine(self, x: Pending, residual: Any = None) -> Tensor:
        return ops.norm_add_act(x, residual, relu=False)

    def max_pool(self, x: Pending) -> Tensor:
        self._see(x, None)
        out = ops.norm_act_max_pool(x)
        backend = ops._backend(x.y)
        with torch.no_grad():
            self.used_taps.append(torch.ops.fused_resnet.norm_act_max_pool(*ops.source(x)[:5], 3, 2, 1, backend)[1])
        return out

    def avg_pool(self, x: Pending, residual: Any = None) -> Tensor:
        return ops.norm_add_act_avg_pool(x, self._see(x, residual))


# ---- the chains: (engine, input, extra input) -> output. Layers are given by `layers_for`. --------------------------


def conv_stats(e, x, r):
    return e.tensor(e.act(e.conv(x, 0)))


def conv_stats_residual(e, x, r):
    return e.tensor(e.act(e.conv(x, 0), r))


def conv_stats_no_relu(e, x, r):
    return e.affine(e.conv(x, 0), r)


def conv_stats_pair(e, x, r):
    return e.tensor(e.act(*e.conv_pair(x, 0, 1)))


def norm_act_conv(e, x, r):
    return e.tensor(e.act(e.conv(e.act(e.conv(x, 0)), 2)))


def norm_add_act_conv(e, x, r):
    a = e.act(e.conv(x, 0), r, read_again=True)
    return e.tensor(e.act(e.conv(a, 2), a))


def norm_add_act_conv_without_residual(e, x, r):
    a = e.act(e.conv(x, 0), read_again=True)
    return e.tensor(e.act(e.conv(a, 2), a))


def norm_add_act_conv_raw(e, x, r):
    a = e.act(*e.conv_pair(x, 0, 1), read_again=True)
    return e.tensor(e.act(e.conv(a, 2), a))


def norm_add_act_conv_pair(e, x, r):
    a = e.act(e.conv(x, 0), r)
    return e.tensor(e.act(*e.conv_pair(a, 2, 3)))


def norm_add_act_conv_pair_raw(e, x, r):
    a = e.act(*e.conv_pair(x, 0, 1))
    out = e.tensor(e.act(*e.conv_pair(a, 2, 3)))
    return torch.cat([out.flatten(1), e.tensor(a).flatten(1)], 1)  # somebody else reads the activation too


def norm_act_max_pool(e, x, r):
    return e.max_pool(e.conv(x, 0))


def norm_add_act_avg_pool(e, x, r):
    return e.avg_pool(e.conv(x, 0))


def norm_add_act_avg_pool_residual(e, x, r):
    return e.avg_pool(e.conv(x, 0), r)


def norm_add_act_avg_pool_raw(e, x, r):
    return e.avg_pool(*e.conv_pair(x, 0, 1))


CHAINS = [
    conv_stats, conv_stats_residual, conv_stats_no_relu, conv_stats_pair, norm_act_conv, norm_add_act_conv,
    norm_add_act_conv_without_residual, norm_add_act_conv_raw, norm_add_act_conv_pair, norm_add_act_conv_pair_raw,
    norm_act_max_pool, norm_add_act_avg_pool, norm_add_act_avg_pool_residual, norm_add_act_avg_pool_raw,
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """n images of c channels, h x w; k channels inside; `size`, stride and so on of the first convolutions."""

    n: int
    c: int
    h: int
    w: int
    k: int
    size: int = 1
    stride: int = 1
    groups: int = 1
    dilation: int = 1

    @property
    def padding(self) -> int:
        return self.dilation * (self.size // 2)

    def layers(self, device: torch.device) -> list[Layer]:
        """0 and 1 read the input; 2 and 3 read the activation behind 0, and keep its shape."""
        first = dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
        inner = dict(padding=1)
        return [
            Layer.random(self.k, self.c, self.size, device, **first),
            Layer.random(self.k, self.c, self.size, device, **first),
            Layer.random(self.k, self.k, 3, device, **inner),
            Layer.random(self.k, self.k, 1, device),
        ]

    def inner_size(self) -> tuple[int, int]:
        span = self.dilation * (self.size - 1) + 1
        return tuple((s + 2 * self.padding - span) // self.stride + 1 for s in (self.h, self.w))


@dataclass
class Run:
    """What an engine made of a chain."""

    output: Tensor
    grads: dict[str, Tensor | None]
    running: dict[str, Tensor]
    masks: list[Tensor]
    taps: list[Tensor]
    preactivations: list[Tensor]  #: of PyTorch's engine alone, one for each mask


def run(chain, engine_class, layers: list[Layer], x: Tensor, r: Tensor, weight: Tensor, dtype: torch.dtype, **options) -> Run:
    """Forward and backward of sum(weight · chain(x, r)), everything in `dtype`."""
    leaves = [layer.leaves(dtype) for layer in layers]
    x, r = (t.to(dtype, copy=True).requires_grad_() for t in (x, r))
    nhwc = [t.contiguous(memory_format=torch.channels_last) for t in (x, r)]
    engine = engine_class(leaves, **options)
    output = chain(engine, *nhwc)
    output.backward(weight.to(dtype).reshape(output.shape))
    grads = {"x": x.grad, "r": r.grad}
    running = {}
    for i, layer in enumerate(leaves):
        for name in ("weight", "gamma", "beta"):
            grads[f"{name}[{i}]"] = getattr(layer, name).grad
        for name in ("running_mean", "running_var"):
            running[f"{name}[{i}]"] = getattr(layer, name)
    return Run(output.detach(), grads, running, engine.used_masks, engine.used_taps, getattr(engine, "preactivations", []))


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in float64; NaN counts as infinite."""
    error = (value.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)
    return float("inf") if error.isnan() else error.item()


def calm(model: torch.nn.Module) -> None:
    """Shift the norms of a network: even channels well above zero, odd ones well below.

    As it is initialised, a pre-activation now and then ends on the other side of zero by a last bit, and drowns all errors of the
    arithmetic; in training, last bits grow to 1e-1 of the loss within twenty steps. At four deviations there is one in 10^4 networks
    of these sizes, and still some values that ReLU cuts. Those masks are the business of test_operators.py.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.bias[0::2], module.bias[1::2] = 4.0, -4.0
