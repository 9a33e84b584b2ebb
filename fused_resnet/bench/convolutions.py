"""The operators that end in convolutions, forward and backward, on the shapes that ResNets give them: cases of the suite `kernels`.

    conv_stats              of an activation that exists: the stem, of images, and a first block without a projection
    conv_stats_pair         the first block with one: its first convolution and the projection
    norm_act_conv           inside a block
    norm_add_act_conv       from a block into the next; `_raw` where the block before has a projection, whose output is still raw
    norm_add_act_conv_pair  into a block with a projection

A case is an operator as a backend does it: forward from the operands to the raw outputs with their statistics (and the activation, where
it is a result), backward from (dz, s1, s2) of the outputs to those of the input and the gradients of the weights. The peers are the ATen
operators that PyTorch's autograd runs for exactly this, in NHWC and the same dtype, weights included, with the same mask; Inductor
compiles those.
The floor is that of the design with everything fused (`roofline.DESIGNS["+fold"]`): forward a kernel a convolution, backward two.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cudnn.work import as_cudnn_reads
from ..problem import ConvProblem, Kernel, NormProblem
from ..reference import Reference, affine, channel_sums, passes_gradient, standardise, unpack_mask
from ..roofline import Network, total_bytes
from ..values import Conv, ConvGeometry, ConvOutput, Norm, Source, accumulate_dtype, nhwc
from . import accuracy, passes
from .accuracy import Terms
from .passes import ATEN, EPS, Case, Inputs, Results, statistics

FORWARD = ("conv_stats", "conv_stats_pair", "norm_act_conv", "norm_add_act_conv", "norm_add_act_conv_raw", "norm_add_act_conv_pair")
SUFFIX = "_backward"
NAMES = (*FORWARD, *(name + SUFFIX for name in FORWARD))


@dataclass(frozen=True)
class Place:
    """A place of an operator in a network."""

    operator: str  #: of `FORWARD`
    convs: tuple[ConvProblem, ...]  #: that read the activation
    images: bool = False  #: it reads images, which need no gradient

    @property
    def read(self) -> NormProblem:
        """What the operator reads."""
        conv = self.convs[0]
        return NormProblem(conv.n, conv.c, conv.h, conv.w)

    @property
    def pending(self) -> bool:
        """Whether the operator reads a raw output, with its norm."""
        return self.operator.startswith("norm")

    @property
    def adds(self) -> bool:
        """Whether a residual is added. The activation is then a result."""
        return self.operator.startswith("norm_add")

    @property
    def raw(self) -> bool:
        """Whether the residual is raw."""
        return self.operator.endswith("_raw")

    @property
    def shared(self) -> bool:
        """Whether the activation has another reader, whose gradient is added: the shortcut of a block without a projection."""
        return self.adds and len(self.convs) == 1

    def __str__(self) -> str:
        """What the input's shape does not tell: window, stride and output channels of each convolution."""
        return " + ".join(f"{c.r}x{c.s}{f'/{c.stride[0]}' if c.stride[0] > 1 else ''} {c.k}" for c in self.convs)

    # ---- the floor: as in `roofline`, each kernel moves what it touches once -----------------------------------------

    def forward_kernels(self, itemsize: int) -> tuple[Kernel, ...]:
        """The first makes the activation, and writes it with its mask where it is a result; the projection's reads it."""
        return tuple(Kernel(self.operator, "fprop", c.flops, self._forward_bytes(c, i, itemsize)) for i, c in enumerate(self.convs))

    def _forward_bytes(self, conv: ConvProblem, number: int, itemsize: int) -> int:
        made = 3 * self.read.tensor_bytes(itemsize) + self.read.mask_bytes if self.adds and not number else 0
        return (made or conv.touched_input_bytes(itemsize)) + conv.weight_bytes(itemsize) + conv.output_bytes(itemsize)

    def backward_kernels(self, itemsize: int) -> tuple[Kernel, ...]:
        """dgrad and wgrad read dz and y. A projection's dgrad writes what its windows cover, which the other's adds."""
        x, found = self.read.tensor_bytes(itemsize), []
        for number, conv in reversed(list(enumerate(self.convs))):
            dy, weight, touched = 2 * conv.output_bytes(itemsize), conv.weight_bytes(itemsize), conv.touched_input_bytes(itemsize)
            moved = touched
            if not number:
                moved = x + self.pending * x + self.adds * self.read.mask_bytes + self.raw * x + self.shared * x
                moved += sum(other.touched_input_bytes(itemsize) for other in self.convs[1:])
            if not self.images:
                found.append(Kernel(self.operator, "dgrad", conv.flops, dy + weight + moved))
            found.append(Kernel(self.operator, "wgrad", conv.flops, dy + weight + touched))
        return tuple(found)


def places(network: Network) -> Iterator[Place]:
    """The operators of a network, in order. The same place may occur more than once."""
    yield Place("conv_stats", (network.stem.conv,), images=True)
    before = None
    for block in network.blocks:
        convs = tuple(layer.conv for layer in (block.branch[0], block.projection) if layer)
        kind = "conv_stats" if before is None else "norm_add_act_conv"
        # No residual is raw before a projection: each stage has more than one block.
        yield Place(kind + ("_pair" if len(convs) == 2 else "_raw" if before and before.projection else ""), convs)
        for layer in block.branch[1:]:
            yield Place("norm_act_conv", (layer.conv,))
        before = block


class ConvInputs(Inputs):
    """Random operands of an operator."""

    def __init__(self, place: Place, dtype: torch.dtype, device: torch.device):
        super().__init__(place.read, dtype, device)
        self.place = place
        self.precision = accuracy.convolved_precision(dtype, device)
        self.geometries = [ConvGeometry(list(c.stride), list(c.padding), list(c.dilation), c.groups) for c in place.convs]
        self.weights = [self._weight(c) for c in place.convs]
        vectors = [(torch.rand(c.k, device=device) + 0.5, torch.randn(c.k, device=device) * 0.3) for c in place.convs]
        self.norms = [Norm(*pair, None, None, True, EPS) for pair in vectors]
        if not place.pending:
            self.source = Source(self.x if place.images else self.x.relu_())
            return
        self.source = Source(self.x, self.mean, self.invstd, self.scale, self.bias)
        if dtype.itemsize == 2:  # coefficients that the dtype holds, or cuDNN, which rounds them, would see another mask
            self.source = as_cudnn_reads(self.source)
            self.scale, self.bias = self.source.scale, self.source.bias
            self.gamma, self.beta = self.scale / self.invstd, self.bias + self.mean * self.scale
        if place.adds:
            self.source = self.source._replace(residual=self.tensor())
        if place.raw:
            mean, invstd, self.residual_var, scale, bias = self.coefficients(self.source.residual)
            self.source = self.source._replace(residual_mean=mean, residual_invstd=invstd, residual_scale=scale, residual_bias=bias)

    def _weight(self, conv: ConvProblem) -> Tensor:
        weight = torch.randn(conv.k, conv.c // conv.groups, conv.r, conv.s, device=self.device)
        return nhwc((weight * (2 / (conv.c * conv.r * conv.s)) ** 0.5).to(self.dtype))

    @property
    def convs(self) -> list[Conv]:
        """The convolutions with the norms of their outputs."""
        return [Conv(*parts) for parts in zip(self.weights, self.norms, self.geometries, strict=True)]

    def keeps_act(self, backend: Reference) -> bool:
        """Whether a backend's forward writes the activation, if it did not exist."""
        return not self.place.pending or self.place.adds or backend.keeps_act(self.source, self.convs)

    def forward(self, backend: Reference) -> tuple[Results, Tensor | None]:
        """((y, mean, invstd) of each convolution and the activation where it is a result, the mask)."""
        pendings, act, mask = backend.convolve(self.source, self.convs, self.place.pending and self.keeps_act(backend))
        raw = [t for pending in pendings for t in (pending.y, pending.mean, pending.invstd)]
        return (*raw, act) if self.place.adds else tuple(raw), mask

    def eager_act(self) -> Tensor:
        """The activation, by ATen."""
        if not self.place.pending:
            return self.x
        act = self.eager_norm(self.x, self.mean, self.var)
        if self.place.raw:
            s = self.source
            act = act.add_(self.eager_norm(s.residual, s.residual_mean, self.residual_var))
        elif self.place.adds:
            act = act.add_(self.source.residual)
        return act.relu_()


def forward(i: ConvInputs) -> Case:
    """The operator's forward."""

    def eager():
        act, results = i.eager_act(), []
        for weight, geometry in zip(i.weights, i.geometries, strict=True):
            y = nhwc(torch.conv2d(act, weight, None, *geometry))
            results += [y, *statistics(y)]
        return (*results, act) if i.place.adds else tuple(results)

    def terms(expected):
        found: list[Terms | None] = []
        for at in range(0, 3 * len(i.weights), 3):
            found += [None, *accuracy.of_statistics(*expected[at : at + 3], i.precision)]
        return [*found, *[None] * i.place.adds]

    kernels = i.place.forward_kernels(i.dtype.itemsize)
    return Case(
        f"{i.place.operator} {i.place}", i.norm, total_bytes(kernels), lambda backend: i.forward(backend)[0], eager,
        terms=terms, precision=i.precision, kernels=kernels,
    )  # fmt: skip


class Output:
    """An output of a convolution with random gradients, and batch norm's backward of it by ATen."""

    def __init__(self, conv: Conv, y: Tensor, mean: Tensor, invstd: Tensor):
        # Neither of its sums is small, or a backward that forgets one of batch norm's corrections would pass.
        xhat = standardise(y, mean, invstd)
        dz = nhwc((torch.randn(y.shape, device=y.device) + 0.5 + xhat / 2).to(y.dtype))
        s1, s2 = channel_sums(dz, xhat)
        gamma = conv.norm.gamma
        self.given = ConvOutput(dz, s1, s2, y, mean, invstd, conv.weight, gamma, True, conv.geometry, True)
        self.count = y.numel() // y.shape[1]
        # As ATen's reduction hands them to its other half: Σ dz·(y − mean), and the number of values of each process.
        self.centred, self.counts = s2 / invstd, torch.tensor([self.count], dtype=torch.int32, device=y.device)

    def eager_dy(self) -> Tensor:
        """The gradient of y: the second half of batch norm's backward. The first is what gave (s1, s2)."""
        dz, s1, s2, y, mean, invstd, _, gamma = self.given[:8]
        if passes.has_halves(y):
            return torch.batch_norm_backward_elemt(dz, y, mean, invstd, gamma, s1, self.centred, self.counts)
        wide = accumulate_dtype(y.dtype)
        mean, invstd, gamma, s1, s2 = (t[:, None, None] for t in (mean, invstd, gamma, s1 / self.count, s2 / self.count))
        return (gamma * invstd * (dz.to(wide) - s1 - (y.to(wide) - mean) * invstd * s2)).to(y.dtype)

    def eager(self, act: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor]:
        """(the gradient of the activation, of the weight), by ATen."""
        stride, padding, dilation, groups = self.given.geometry
        dx, dw, _ = ATEN.convolution_backward(
            self.eager_dy(), act, self.given.weight, None, stride, padding, dilation, False, [0, 0], groups, [need_dx, True, False]
        )
        return nhwc(dx) if need_dx else None, dw


def backward(i: ConvInputs) -> Case:
    """The operator's backward."""
    place, need_dx = i.place, not i.place.images
    results, mask = i.forward(Reference())
    outputs = [Output(conv, *results[3 * n : 3 * n + 3]) for n, conv in enumerate(i.convs)]
    act = results[-1] if place.adds else i.x
    if place.pending and not place.adds:
        act = Reference().norm_add_act(Source(i.x, i.mean, i.invstd, i.scale, i.bias), True, False)[0]
    if place.pending:  # eager's mask is told by the activation: what rounding took to zero still passes its gradient
        passing = unpack_mask(mask, i.norm.c) if place.adds else passes_gradient(affine(i.x, i.scale, i.bias))
        act.masked_fill_(passing & (act == 0), torch.finfo(i.dtype).smallest_normal)
    dact = i.tensor(offset=0.5) if place.shared else None
    source = i.source if place.raw else i.source._replace(residual=None)

    def ours(backend):
        kept = act if i.keeps_act(backend) else None
        sums, dws = backend.convolve_backward(source, kept, mask, [output.given for output in outputs], dact, need_dx)
        return tuple(t for t in (*sums, *dws) if t is not None)

    def eager():
        pairs = [output.eager(act, need_dx) for output in outputs]
        dws = [dw for _, dw in pairs]
        if not need_dx:
            return tuple(dws)
        d = pairs[0][0]
        for other in (*(dx for dx, _ in pairs[1:]), dact):
            d = d if other is None else d + other
        if not place.pending:
            return d, *dws
        dz, s1, s2 = i.eager_sums(ATEN.threshold_backward(d, act, 0))
        sums = [dz, s1, s2]
        if place.raw:
            s = source
            sums.append(ATEN.native_batch_norm_backward(
                dz, s.residual, i.gamma, None, None, s.residual_mean, s.residual_invstd, True, EPS, [False, True, True]
            )[1])  # fmt: skip
        return *sums, *dws

    def terms(expected):
        if not place.pending:
            return ()
        return [None, *accuracy.of_sums(expected[0], i.precision, source), *[None] * len(outputs)]

    kernels = place.backward_kernels(i.dtype.itemsize)
    return Case(
        f"{place.operator}{SUFFIX} {place}", i.norm, total_bytes(kernels), ours, eager, terms=terms, precision=i.precision, kernels=kernels
    )


def plan(networks: Iterable[Network], names: Sequence[str] = NAMES) -> Iterator[tuple[str, Place]]:
    """The cases called `names` of `networks`, each once."""
    found = dict.fromkeys(place for network in networks for place in places(network))
    for name in NAMES:
        if name in names:
            yield from ((name, place) for place in found if place.operator == name.removesuffix(SUFFIX))


def make(name: str, place: Place, dtype: torch.dtype, device: torch.device) -> Case:
    """The case `name`, of `NAMES`."""
    build: Callable[[ConvInputs], Case] = backward if name.endswith(SUFFIX) else forward
    return build(ConvInputs(place, dtype, device))
