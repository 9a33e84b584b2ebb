"""The cases of the suite `kernels`: each pass of a backend on the shapes that ResNets give it, with its peers.

A case makes its inputs, knows the bytes that it must move, runs the pass by any backend, and, where ATen has operators for the
same work, as PyTorch's eager mode runs them and as cuDNN does: NHWC, in the same dtype. Results are compared with the reference's
before anything is timed. The ReLU masks of all peers are the same, so that no error is due to a sign that rounding turned.

Single passes compare with what eager runs for the same piece of work. Batch norm as a whole, where cuDNN has one too, is
`norm_act_forward`, `norm_add_forward`, `norm_backward` and `norm_add_backward`: several passes of ours in a row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..problem import Kernel, NormProblem
from ..reference import Reference, pack_mask
from ..roofline import Network
from ..values import Source, accumulate_dtype, nhwc
from . import accuracy
from .accuracy import Terms

EPS = 1e-5
ATEN = torch.ops.aten
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A piece of work on one shape: a pass, or a convolution with what is fused to it."""

    name: str
    norm: NormProblem  #: of what is read
    bytes: int  #: read and written, each tensor once, by each kernel where there are several
    ours: Callable[[Reference], Results]
    eager: Callable[[], Results] | None  #: the leading results of `ours`, by ATen
    cudnn: Callable[[], Results] | None = None  #: the same by cuDNN's batch norm and ATen's ReLU and addition
    terms: Callable[[Results], Sequence[Terms | None]] = lambda expected: ()  #: of what is expected, as `accuracy.error` takes them
    precision: torch.dtype | None = None  #: likewise
    kernels: tuple[Kernel, ...] = ()  #: of a convolution: those that there are where everything is fused


class Inputs:
    """Random tensors of one shape; statistics are those of x. The gradients' mean is not zero."""

    def __init__(self, norm: NormProblem, dtype: torch.dtype, device: torch.device):
        self.norm, self.dtype, self.device = norm, dtype, device
        self.gamma = torch.rand(norm.c, device=device) + 0.5
        self.beta = torch.randn(norm.c, device=device) * 0.3
        self.x = self.tensor()
        self.mean, self.invstd, self.var, self.scale, self.bias = self.coefficients(self.x)

    @property
    def bytes(self) -> int:
        """One trip over a tensor of the shape."""
        return self.norm.tensor_bytes(self.dtype.itemsize)

    def sum_terms(self, expected: Results) -> list[Terms | None]:
        """The terms of (dz, Σ dz, Σ dz·x̂)."""
        return [None, *accuracy.of_sums(expected[0], self.dtype, Source(self.x, self.mean, self.invstd))]

    def tensor(self, height: int | None = None, offset: float = 0.0) -> Tensor:
        """[n, c, h, w], or [n, c, height, height]."""
        h, w = (self.norm.h, self.norm.w) if height is None else (height, height)
        shape = self.norm.n, self.norm.c, h, w
        return nhwc((torch.randn(shape, device=self.device) + offset).to(self.dtype))

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """(mean, invstd, var, scale, bias) of x."""
        return Reference().batch_stats(x, self.gamma, self.beta, EPS)

    def read(self, residual: Tensor | None = None, scale: Tensor | None = None, bias: Tensor | None = None) -> Source:
        """relu(norm(x) + residual); of a raw residual, scale and bias."""
        return Source(self.x, self.mean, self.invstd, self.scale, self.bias, residual, residual_scale=scale, residual_bias=bias)

    def mask(self) -> Tensor:
        """Bool [n, c, h, w], half of it true."""
        return nhwc(torch.rand(self.x.shape, device=self.device) < 0.5)

    def eager_norm(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """norm(x), in x's dtype."""
        return torch.nn.functional.batch_norm(x, mean, var, self.gamma, self.beta, False, 0.0, EPS)

    def eager_backward(self, dz: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
        """(dy, dgamma, dbeta) by batch norm's backward, those of them that are `wanted`."""
        return ATEN.native_batch_norm_backward(dz, self.x, self.gamma, None, None, self.mean, self.invstd, True, EPS, wanted)

    def eager_training_norm(self) -> Tensor:
        """norm(x) with the statistics of x, which are computed."""
        return torch.nn.functional.batch_norm(self.x, None, None, self.gamma, self.beta, True, 0.0, EPS)

    def cudnn_norm(self) -> tuple[Tensor, ...]:
        """(norm(x), mean, invstd, what cuDNN keeps for backward), with the statistics of x, which are computed."""
        running = torch.zeros_like(self.gamma), torch.ones_like(self.gamma)
        return ATEN.cudnn_batch_norm(self.x, self.gamma, self.beta, *running, True, 0.0, EPS)

    @cached_property
    def cudnn_saved(self) -> tuple[Tensor, ...]:
        """(mean, invstd, what cuDNN keeps for backward) of x."""
        return self.cudnn_norm()[1:]

    def cudnn_backward(self, dz: Tensor) -> Tensor:
        """dy, by cuDNN."""
        mean, invstd, kept = self.cudnn_saved
        return ATEN.cudnn_batch_norm_backward(self.x, dz, self.gamma, None, None, mean, invstd, EPS, kept)[0]

    def eager_sums(self, dz: Tensor) -> tuple[Tensor, ...]:
        """(dz, Σ dz, Σ dz·x̂): dbeta and dgamma are these sums."""
        _, s2, s1 = self.eager_backward(dz, [False, True, True])
        return dz, s1, s2


def has_halves(t: Tensor) -> bool:
    """Whether eager runs ATen's kernels for the halves of a batch norm. Only CUDA has them, and Inductor does not look inside."""
    return t.is_cuda and not torch.compiler.is_compiling()


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of y, by ATen."""
    if has_halves(y):
        return torch.batch_norm_stats(y, EPS)  # what eager's batch norm calls for NHWC
    var, mean = torch.var_mean(y.to(accumulate_dtype(y.dtype)), (0, 2, 3), correction=0)
    return mean, (var + EPS).rsqrt()


def batch_stats(i: Inputs) -> Case:
    """Reads y."""
    return Case(
        "batch_stats", i.norm, i.bytes, lambda backend: backend.batch_stats(i.x, i.gamma, i.beta, EPS)[:2],
        lambda: statistics(i.x), terms=lambda expected: accuracy.of_statistics(i.x, *expected, torch.float32),
    )  # fmt: skip


def norm_act(i: Inputs) -> Case:
    """Reads x, writes act."""
    return Case(
        "norm_act", i.norm, 2 * i.bytes,
        lambda backend: backend.norm_add_act(i.read(), True, False)[:1],
        lambda: (i.eager_norm(i.x, i.mean, i.var).relu_(),),
    )  # fmt: skip


def norm_add_act(i: Inputs) -> Case:
    """Reads x and a residual, writes act and mask."""
    residual = i.tensor()
    return Case(
        "norm_add_act", i.norm, 3 * i.bytes + i.norm.mask_bytes,
        lambda backend: backend.norm_add_act(i.read(residual), True, True)[:1],
        lambda: (i.eager_norm(i.x, i.mean, i.var).add_(residual).relu_(),),
    )  # fmt: skip


def norm_add_act_raw(i: Inputs) -> Case:
    """The same with a raw residual."""
    residual = i.tensor()
    mean, _, var, scale, bias = i.coefficients(residual)
    return Case(
        "norm_add_act_raw", i.norm, 3 * i.bytes + i.norm.mask_bytes,
        lambda backend: backend.norm_add_act(i.read(residual, scale, bias), True, True)[:1],
        lambda: (i.eager_norm(i.x, i.mean, i.var).add_(i.eager_norm(residual, mean, var)).relu_(),),
    )  # fmt: skip


def norm_act_forward(i: Inputs) -> Case:
    """Statistics and apply: the whole of relu(norm(x)). Reads x twice, writes act."""

    def ours(backend):
        scale, bias = backend.batch_stats(i.x, i.gamma, i.beta, EPS)[3:]
        return backend.norm_add_act(Source(i.x, scale=scale, bias=bias), True, False)[:1]

    return Case(
        "norm_act_forward", i.norm, 3 * i.bytes, ours, lambda: (i.eager_training_norm().relu_(),), lambda: (i.cudnn_norm()[0].relu_(),)
    )


def norm_add_forward(i: Inputs) -> Case:
    """Statistics and apply: the whole of relu(norm(x) + residual). Reads x twice and the residual, writes act and mask."""
    residual = i.tensor()

    def ours(backend):
        scale, bias = backend.batch_stats(i.x, i.gamma, i.beta, EPS)[3:]
        return backend.norm_add_act(Source(i.x, scale=scale, bias=bias, residual=residual), True, True)[:1]

    return Case(
        "norm_add_forward", i.norm, 4 * i.bytes + i.norm.mask_bytes, ours,
        lambda: (i.eager_training_norm().add_(residual).relu_(),),
        lambda: (i.cudnn_norm()[0].add_(residual).relu_(),),
    )  # fmt: skip


def norm_backward_reduce(i: Inputs) -> Case:
    """Reads d and x, writes dz; the mask is recomputed."""
    d = i.tensor(offset=0.5)
    act = Reference().norm_add_act(i.read(), True, False)[0]
    return Case(
        "norm_backward_reduce", i.norm, 3 * i.bytes,
        lambda backend: backend.norm_backward_reduce(d, None, i.read(), None, True)[:3],
        lambda: i.eager_sums(ATEN.threshold_backward(d, act, 0)),
        terms=i.sum_terms,
    )  # fmt: skip


def norm_add_backward_reduce(i: Inputs) -> Case:
    """Reads d, dact, mask and x, writes dz."""
    d, dact, mask = i.tensor(offset=0.5), i.tensor(), i.mask()
    packed, act = pack_mask(mask), mask.to(i.dtype)
    return Case(
        "norm_add_backward_reduce", i.norm, 4 * i.bytes + i.norm.mask_bytes,
        lambda backend: backend.norm_backward_reduce(d, dact, i.read(), packed, True)[:3],
        lambda: i.eager_sums(ATEN.threshold_backward(d + dact, act, 0)),
        terms=i.sum_terms,
    )  # fmt: skip


def norm_backward_apply(i: Inputs) -> Case:
    """Reads dz and y, writes dy. ATen has it with the reduction only: see `norm_add_backward`."""
    dz = i.tensor(offset=0.5)
    sums = Reference().norm_backward_reduce(dz, None, i.read(), None, relu=False)[1:3]
    return Case(
        "norm_backward_apply", i.norm, 3 * i.bytes,
        lambda backend: (backend.norm_backward_apply(dz, i.x, i.mean, i.invstd, i.gamma, *sums),),
        None,
    )  # fmt: skip


def norm_backward(i: Inputs) -> Case:
    """Reduce and apply: the whole backward of relu(norm(x)); the mask is recomputed. Reads d and x, writes dz; reads both, writes dy."""
    d = i.tensor(offset=0.5)
    act = Reference().norm_add_act(i.read(), True, False)[0]

    def ours(backend):
        dz, s1, s2, _ = backend.norm_backward_reduce(d, None, i.read(), None, True)
        return (backend.norm_backward_apply(dz, i.x, i.mean, i.invstd, i.gamma, s1, s2),)

    return Case(
        "norm_backward", i.norm, 6 * i.bytes, ours,
        lambda: i.eager_backward(ATEN.threshold_backward(d, act, 0), [True, True, True])[:1],
        lambda: (i.cudnn_backward(ATEN.threshold_backward(d, act, 0)),),
    )  # fmt: skip


def norm_add_backward(i: Inputs) -> Case:
    """Reduce and apply: the whole backward of relu(norm(x) + residual), the two gradients of its result added."""
    d, dact, mask = i.tensor(offset=0.5), i.tensor(), i.mask()
    packed, act = pack_mask(mask), mask.to(i.dtype)

    def ours(backend):
        dz, s1, s2, _ = backend.norm_backward_reduce(d, dact, i.read(), packed, True)
        return (backend.norm_backward_apply(dz, i.x, i.mean, i.invstd, i.gamma, s1, s2),)

    return Case(
        "norm_add_backward", i.norm, 7 * i.bytes + i.norm.mask_bytes, ours,
        lambda: i.eager_backward(ATEN.threshold_backward(d + dact, act, 0), [True, True, True])[:1],
        lambda: (i.cudnn_backward(ATEN.threshold_backward(d + dact, act, 0)),),
    )  # fmt: skip


def norm_act_max_pool(i: Inputs) -> Case:
    """Reads x, writes the pool's output and index. 3x3, stride 2."""
    pooled = i.norm.n * i.norm.c * ((i.norm.h + 1) // 2) * ((i.norm.w + 1) // 2)
    return Case(
        "norm_act_max_pool", i.norm, i.bytes + pooled * (i.dtype.itemsize + 1),
        lambda backend: backend.norm_act_max_pool(i.read(), 3, 2, 1)[:1],
        lambda: (torch.nn.functional.max_pool2d(i.eager_norm(i.x, i.mean, i.var).relu_(), 3, 2, 1),),
    )  # fmt: skip


def norm_act_max_pool_backward(i: Inputs) -> Case:
    """Reads the output's gradient, the index and x; writes dz."""
    index = Reference().norm_act_max_pool(i.read(), 3, 2, 1)[1]
    dout = nhwc((torch.randn(index.shape, device=i.device) + 0.5).to(i.dtype))
    act = Reference().norm_add_act(i.read(), True, False)[0]
    winners = torch.nn.functional.max_pool2d(act, 3, 2, 1, return_indices=True)[1]

    def eager():
        d = ATEN.max_pool2d_with_indices_backward(dout, act, [3, 3], [2, 2], [1, 1], [1, 1], False, winners)
        return i.eager_sums(ATEN.threshold_backward(d, act, 0))

    return Case(
        "norm_act_max_pool_backward", i.norm, 2 * i.bytes + dout.nbytes + index.nbytes,
        lambda backend: backend.norm_act_max_pool_backward(dout, index, i.read(), 3, 2, 1),
        eager,
        terms=i.sum_terms,
    )  # fmt: skip


def norm_add_act_avg_pool(i: Inputs) -> Case:
    """Reads x and a residual, writes a value a channel and the mask."""
    residual = i.tensor()
    return Case(
        "norm_add_act_avg_pool", i.norm, 2 * i.bytes + i.norm.mask_bytes,
        lambda backend: backend.norm_add_act_avg_pool(i.read(residual))[:1],
        lambda: (i.eager_norm(i.x, i.mean, i.var).add_(residual).relu_().mean((2, 3), keepdim=True),),
    )  # fmt: skip


def norm_add_act_avg_pool_backward(i: Inputs) -> Case:
    """Reads x and the mask, writes dz."""
    dout, mask = i.tensor(height=1, offset=0.5), i.mask()
    packed, act = pack_mask(mask), mask.to(i.dtype)
    area = i.norm.h * i.norm.w
    return Case(
        "norm_add_act_avg_pool_backward", i.norm, 2 * i.bytes + i.norm.mask_bytes,
        lambda backend: backend.norm_add_act_avg_pool_backward(dout, i.read(), packed)[:3],
        lambda: i.eager_sums(ATEN.threshold_backward((dout / area).expand_as(act), act, 0)),
        terms=i.sum_terms,
    )  # fmt: skip


INNER = (batch_stats, norm_act, norm_act_forward, norm_backward_reduce, norm_backward_apply, norm_backward)
ENDS = (
    batch_stats, norm_add_act, norm_add_act_raw, norm_add_forward, norm_add_backward_reduce, norm_backward_apply, norm_add_backward,
)  # fmt: skip
STEM = (batch_stats, norm_act_max_pool, norm_act_max_pool_backward, norm_backward_apply)
TAIL = (norm_add_act_avg_pool, norm_add_act_avg_pool_backward)
Maker = Callable[[Inputs], Case]
NAMES = tuple(dict.fromkeys(make.__name__ for make in (*STEM, *INNER, *ENDS, *TAIL)))


def plan(networks: Iterable[Network], names: Sequence[str] = NAMES) -> Iterator[tuple[Maker, NormProblem]]:
    """The passes called `names` on the shapes of `networks`, each pass on each shape once."""
    planned = {}  # in this order, without repetition
    for network in networks:
        ends = [block.branch[-1].conv.output_norm for block in network.blocks]
        inner = [layer.conv.output_norm for block in network.blocks for layer in block.branch[:-1]]
        for makers, norms in ((STEM, [network.stem.conv.output_norm]), (INNER, inner), (ENDS, ends), (TAIL, ends[-1:])):
            planned |= {(make, norm): None for norm in dict.fromkeys(norms) for make in makers if make.__name__ in names}
    yield from planned
