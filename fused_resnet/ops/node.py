"""Convolutions one behind the other, as one node of autograd.

A run is layers of convolutions. Those of the first layer read a source. Those of every other read relu(norm(y)) of the first output of the
layer before it, which nobody else sees. One node for a run costs the host less than one for each layer. Behind the dispatcher, where
somebody looks for operators, each layer is an operator, and a node, of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import Conv, ConvGeometry, ConvOutput, Pending, Source
from .convolve import OPERATORS, Convolved, Operator, operator_for
from .library import is_watched, wants_gradient

#: The convolutions that read one activation.
Layer = Sequence[Conv]


@dataclass(slots=True)
class Run:
    """A call of `convolve`."""

    source: Source
    layers: Sequence[Layer]
    act_is_read: bool  #: whether others read the activation of a pending source, too
    execute: Callable[[Operator, Source, Layer], Convolved]
    backend: str
    made: list[tuple[Operator, Convolved]] = field(default_factory=list)  #: by each layer, once it ran

    def in_steps(self) -> list[Convolved]:
        """The layers, one after the other."""
        source, act_is_read = self.source, self.act_is_read
        for convs in self.layers:
            operator = operator_for(source, convs, act_is_read)
            made = self.execute(operator, source, convs)
            self.made.append((operator, made))
            source, act_is_read = source_of(made.pendings[0]), False
        return [made for _, made in self.made]

    def as_node(self, apply: Callable[..., Any]) -> list[Convolved]:
        """The same, as a node of autograd. Its results have a graph, in the place of what the layers made."""
        parameters = [t for convs in self.layers for weight, norm, _ in convs for t in (weight, norm.gamma, norm.beta)]
        results = iter(apply(self, *differentiable(self.source), *parameters))
        seen = []
        for exposed, (_, made) in zip(self.exposed(), self.made, strict=True):
            pendings = [_with_graph(p, *islice(results, 3)) if e else p for e, p in zip(exposed, made.pendings, strict=True)]
            seen.append(made._replace(pendings=pendings))
        seen[0] = seen[0]._replace(act=next(results, seen[0].act))
        return seen

    def exposed(self) -> list[list[bool]]:
        """Which output of each layer others may read: not the first, but for the last layer's."""
        *inner, last = self.layers
        return [*([i > 0 for i, _ in enumerate(convs)] for convs in inner), [True] * len(last)]


def convolve(source: Source, layers: Sequence[Layer], backend: str, act_is_read: bool) -> list[Convolved]:
    """What each layer of a run makes; `act_is_read` tells whether others read the activation of a pending source, too."""
    if is_watched(source.x):
        # Whether a backend keeps the activation depends on sizes; a graph for any size has to know it.
        any_size = _any_size(source.x)

        def dispatched(operator: Operator, source: Source, convs: Layer) -> Convolved:
            return operator.dispatched(source, convs, backend, operator.may_skip_act and any_size)

        run = Run(source, layers, act_is_read, dispatched, backend)
        made = run.in_steps()
    else:

        def direct(operator: Operator, source: Source, convs: Layer) -> Convolved:
            return operator.run(source, convs, backend)

        run = Run(source, layers, act_is_read, direct, backend)
        made = run.as_node(_apply) if torch.is_grad_enabled() else run.in_steps()
    # An activation that a backend keeps for itself is nobody else's.
    return [m._replace(act=None) if operator.may_skip_act else m for (operator, _), m in zip(run.made, made, strict=True)]


def _as_dispatched(operator: Operator) -> Callable[..., Convolved]:
    """What the dispatcher finds where autograd is due: the operator below it, as a node where something wants a gradient."""

    def differentiable_operator(source: Source, convs: Layer, backend: str, write_act: bool) -> Convolved:
        def below(operator: Operator, source: Source, convs: Layer) -> Convolved:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.dispatched(source, convs, backend, write_act)

        run = Run(source, [convs], operator.residual, below, backend)
        parameters = (t for weight, norm, _ in convs for t in (weight, norm.gamma, norm.beta))
        (made,) = run.as_node(Node.apply) if wants_gradient(*source, *parameters) else run.in_steps()
        return made

    return differentiable_operator


def _with_graph(pending: Pending, y: Tensor, mean: Tensor, invstd: Tensor) -> Pending:
    *_, var, scale, bias = pending
    return Pending(y, mean, invstd, var, scale, bias)


def source_of(x: Pending, residual: Pending | Tensor | None = None) -> Source:
    """The activation relu(norm(x) + residual), still to be made. `residual` is an activation, or pending itself."""
    y, mean, invstd, _, scale, bias = x
    if isinstance(residual, Pending):
        return Source(
            y, mean, invstd, scale, bias, residual.y, residual.mean, residual.invstd, residual.scale, residual.bias
        )
    return Source(y, mean, invstd, scale, bias, residual)


def differentiable(source: Source) -> tuple[Tensor | None, ...]:
    """The tensors of a source that have gradients, in the order of `Operator.backward`'s: those of x, then those of its residual."""
    return source.x, source.mean, source.invstd, source.residual, source.residual_mean, source.residual_invstd


class Kept(NamedTuple):
    """What a node remembers of a layer beside tensors."""

    operator: Operator
    exposed: list[bool]
    norms: list[tuple[bool, ConvGeometry, str]]  #: of each convolution whether its batch normalises, its geometry, its group


class Node(torch.autograd.Function):
    """A run as a node of autograd.

    Its arguments are the run and the tensors that a gradient is defined for: those of the source, and of each convolution weight, gamma,
    beta. Results are those with a gradient: of each exposed output y, mean, invstd; act where others read it.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, *_: Tensor | None) -> tuple[Tensor, ...]:
        """Run and save: the raw input, a raw residual; of each layer act and mask; of each output y, its norm, weight and gamma."""
        ctx.set_materialize_grads(False)  # an unused act must not cost a tensor of zeros
        run.in_steps()
        source = run.source
        saved = list(source if source.residual_mean is not None else source._replace(residual=None))
        results, layers = [], []
        for convs, exposed, (operator, made) in zip(run.layers, run.exposed(), run.made, strict=True):
            saved += made.act if operator.pending else None, made.mask
            norms = []
            for (weight, norm, geometry), pending, seen in zip(convs, made.pendings, exposed, strict=True):
                y, mean, invstd, _, scale, bias = pending
                saved += y, mean, invstd, weight, norm.gamma
                if seen:
                    results += y, mean, invstd
                else:
                    saved += scale, bias
                norms.append((norm.training, geometry, norm.group))
            layers.append(Kept(operator, exposed, norms))
        ctx.save_for_backward(*saved)
        ctx.known = layers, run.backend, source.residual is not None
        operator, made = run.made[0]
        return (*results, made.act) if operator.residual else tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments. Autograd casts them to the arguments' dtypes."""
        layers, backend, has_residual = ctx.known
        saved, needs, given = iter(ctx.saved_tensors), iter(ctx.needs_input_grad), iter(grads)
        next(needs)  # of the run itself
        source = Source(*islice(saved, len(Source._fields)))
        need_dx = any(list(islice(needs, len(differentiable(source)))))
        calls = []
        for operator, exposed, norms in layers:
            act, mask, outputs, wanted, following = next(saved), next(saved), [], [], None
            for seen, (training, geometry, group) in zip(exposed, norms, strict=True):
                y, mean, invstd, weight, gamma = islice(saved, 5)
                dz, s1, s2 = islice(given, 3) if seen else (None, None, None)
                need_dw, need_dgamma, need_dbeta = islice(needs, 3)
                if not seen:
                    following = Source(y, mean, invstd, next(saved), next(saved))
                outputs.append(ConvOutput(dz, s1, s2, y, mean, invstd, weight, gamma, training, geometry, need_dw, group))
                wanted.append((need_dw, need_dgamma, need_dbeta))
            calls.append((operator, source, act if operator.pending else source.x, mask, outputs, need_dx, wanted))
            source, need_dx = following, need_dx or any(any(w) for w in wanted)
        dact, gradients, of_x = next(given, None), [], None
        while calls:
            operator, source, act, mask, outputs, need_dx, wanted = calls.pop()
            if of_x is not None:
                dz, s1, s2, _ = of_x
                outputs[0] = outputs[0]._replace(dz=dz, s1=s1, s2=s2)
            of_act = None if calls else dact
            if of_act is None and all(output.dz is None for output in outputs):
                of_x, dws = (None,) * 4, [None] * len(outputs)
            else:
                of_x, dws = operator.backward(source, act, mask, outputs, of_act, need_dx, backend)
            of_layer = []
            for output, dw, (_, need_dgamma, need_dbeta) in zip(outputs, dws, wanted, strict=True):
                of_layer += dw, output.s2 if need_dgamma else None, output.s1 if need_dbeta else None
            gradients = of_layer + gradients
        dx, s1, s2, residual_s2 = of_x
        # A residual shares dz, and where it is raw, s1.
        of_residual = dx if has_residual else None, None if residual_s2 is None else s1, residual_s2
        return None, dx, s1, s2, *of_residual, *gradients


#: `Node.apply` for plain tensors, where no transform of torch.func is: all that it does in Python is to look for one.
_apply = super(torch.autograd.Function, Node).apply


def _any_size(x: Tensor) -> bool:
    """Whether a compiler is at work that leaves a size of x open."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(size) for size in x.shape)


for _operator in OPERATORS.values():
    _operator.define(_as_dispatched(_operator))
