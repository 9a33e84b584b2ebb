"""Convolutions one behind the other, as one node of autograd.

A run is layers of convolutions. Those of the first layer read a source. Those of every other read relu(norm(y)) of the first output of the
layer before it, which nobody else sees. One node for a run costs the host less than one for each layer. Behind the dispatcher, where
somebody looks for operators, each layer is an operator, and a node, of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..reference import Conv, ConvOutput, Pending, Source
from .checks import check_source
from .convolutions import INNER, OPERATORS, Convolved, Operator, operator_for
from .library import is_watched, is_wrapped, wants_gradient

#: The convolutions that read one activation.
Layer = Sequence[Conv]
#: What runs a layer: (operator, source, convolutions) -> what the operator makes, a `Convolved` or its fields.
Execute = Callable[[Operator, Source, Layer], tuple]


@dataclass(slots=True)
class Run:
    """What becomes a node of autograd."""

    first: Operator  #: of the first layer
    source: Source
    layers: Sequence[Layer]
    backend: str
    execute: Execute
    made: Sequence[tuple] = ()  #: by each layer, once it ran

    def as_node(self, apply: Callable[..., Any]) -> list[Convolved]:
        """Run, as a node. Its results, which have a graph, stand in the place of what the layers made."""
        source, parameters = self.source, []
        for convs in self.layers:
            for weight, norm, _ in convs:
                parameters += weight, norm.gamma, norm.beta
        results = iter(
            apply(self, source.x, source.mean, source.invstd, source.residual, source.residual_mean, source.residual_invstd, *parameters)
        )
        made, inner = [], len(self.layers) - 1
        for pendings, act, mask in self.made:
            seen = pendings[:1] if inner else []  # what the next layer reads is nobody else's
            for *_, var, scale, bias in pendings[len(seen) :]:
                seen.append(Pending(next(results), next(results), next(results), var, scale, bias))
            made.append(Convolved(seen, None if made or self.first.pending else act, mask))
            inner -= inner > 0
        if self.first.residual:
            pendings, _, mask = made[0]
            made[0] = Convolved(pendings, next(results), mask)
        return made


def in_steps(first: Operator, source: Source, layers: Sequence[Layer], execute: Execute) -> list[tuple]:
    """The layers of a run, one after the other."""
    made, operator, read_next = [], first, None
    for convs in layers:
        if read_next is not None:
            source = source_of(read_next)
            operator = INNER if len(convs) == 1 else operator_for(source, convs, False)
        pendings, act, mask = execute(operator, source, convs)
        made.append((pendings, act, mask))
        read_next = pendings[0]
    return made


def convolve(source: Source, layers: Sequence[Layer], backend: str, act_is_read: bool) -> list[Convolved]:
    """What each layer of a run makes; `act_is_read` tells whether others read the activation of a pending source, too.

    Only then it is handed out: what a backend keeps for itself is nobody else's.
    """
    first = operator_for(source, layers[0], act_is_read)
    if is_watched(source.x):
        # Whether a backend keeps the activation depends on sizes; a graph for any size has to know it.
        any_size = _any_size(source.x)
        made = in_steps(first, source, layers, lambda o, s, convs: o.dispatched(s, convs, backend, o.may_skip_act and any_size))
        return _handed_out(first, made)
    check_source(source)  # every other is made by an operator

    def execute(operator: Operator, source: Source, convs: Layer) -> tuple:
        return operator.run(source, convs, backend)

    if torch.is_grad_enabled():
        return Run(first, source, layers, backend, execute).as_node(_apply)
    return _handed_out(first, in_steps(first, source, layers, execute))


def _handed_out(first: Operator, made: list[tuple]) -> list[Convolved]:
    return [Convolved(p, None if i or first.may_skip_act else act, mask) for i, (p, act, mask) in enumerate(made)]


def _as_dispatched(operator: Operator) -> Callable[..., Convolved]:
    """What the dispatcher finds where autograd is due: the operator below it, as a node where something wants a gradient."""

    def differentiable(source: Source, convs: Layer, backend: str, write_act: bool) -> Convolved:
        def below(operator: Operator, source: Source, convs: Layer) -> Convolved:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.dispatched(source, convs, backend, write_act)

        if not wants_gradient(*source, *(t for weight, norm, _ in convs for t in (weight, norm.gamma, norm.beta))):
            return below(operator, source, convs)
        run = Run(operator, source, [convs], backend, below)
        ((pendings, act, mask),) = run.as_node(Node.apply)
        ((_, kept, _),) = run.made
        return Convolved(pendings, kept if operator.may_skip_act else act, mask)

    return differentiable


def source_of(x: Pending, residual: Pending | Tensor | None = None) -> Source:
    """The activation relu(norm(x) + residual), still to be made. `residual` is an activation, or pending itself."""
    y, mean, invstd, _, scale, bias = x
    if isinstance(residual, Pending):
        return Source(
            y, mean, invstd, scale, bias, residual.y, residual.mean, residual.invstd, residual.scale, residual.bias
        )
    return Source(y, mean, invstd, scale, bias, residual)


class Node(torch.autograd.Function):
    """A run as a node of autograd.

    Its arguments are the run and the tensors that a gradient is defined for: x, mean, invstd, the residual's three, and of each convolution
    weight, gamma, beta. Results are those with a gradient: y, mean, invstd of each output that the next layer does not read; act where
    others read it.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, *_: Tensor | None) -> tuple[Tensor, ...]:
        """Run and save: the raw input, a raw residual; of each layer act and mask; of each output y, its norm, weight and gamma."""
        ctx.set_materialize_grads(False)  # an unused act must not cost a tensor of zeros
        first, source, layers = run.first, run.source, run.layers
        made = run.made = in_steps(first, source, layers, run.execute)
        saved = list(source if source.residual_mean is not None else source._replace(residual=None))
        results, known, inner = [], [], len(layers) - 1
        for convs, (pendings, act, mask) in zip(layers, made, strict=True):
            saved += act if known or first.pending else None, mask
            statics, read_next = [], inner > 0
            for (weight, norm, geometry), (y, mean, invstd, _, scale, bias) in zip(convs, pendings, strict=True):
                saved += y, mean, invstd, weight, norm.gamma
                if read_next:
                    saved += scale, bias
                else:
                    results += y, mean, invstd
                statics.append((read_next, norm.training, geometry, norm.group))
                read_next = False
            known.append(statics)
            inner -= 1
        ctx.save_for_backward(*saved)
        ctx.known = first, known, run.backend, source.residual is not None
        if first.residual:
            (_, act, _), *_ = made
            results.append(act)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments. Autograd casts them to the arguments' dtypes."""
        first, known, backend, has_residual = ctx.known
        saved, needs, given = iter(ctx.saved_tensors), iter(ctx.needs_input_grad), iter(grads)
        next(needs)  # of the run itself
        source = Source(*islice(saved, len(Source._fields)))
        need_dx = any([next(needs) for _ in ("x", "mean", "invstd", "residual", "residual_mean", "residual_invstd")])  # noqa: C419
        operator, layers = first, []
        for statics in known:
            act, mask, outputs, following, wanted = next(saved), next(saved), [], None, need_dx
            for read_next, *static in statics:
                kept = list(islice(saved, 5))
                if read_next:
                    y, mean, invstd, *_ = kept
                    following = Source(y, mean, invstd, next(saved), next(saved))
                of_parameters = next(needs), next(needs), next(needs)
                wanted = wanted or any(of_parameters)
                of_output = () if read_next else (next(given), next(given), next(given))
                outputs.append((of_output, kept, static, of_parameters))
            layers.append((operator, source, act if operator.pending else source.x, mask, outputs, need_dx))
            source, need_dx, operator = following, wanted, INNER
        dact = next(given, None)
        backward = Operator.gradients if _is_plain_backward(layers, grads) else Operator.dispatched_gradients
        gradients, of_x = [], None
        while layers:
            operator, source, act, mask, parts, need_dx = layers.pop()
            outputs = []
            for of_output, kept, (training, geometry, group), (need_dw, *_) in parts:
                if of_x is not None and not outputs:
                    of_output = of_x
                outputs.append(ConvOutput(*of_output, *kept, training, geometry, need_dw, group))
            of_act = None if layers else dact
            if of_act is None and all([output.dz is None for output in outputs]):  # noqa: C419
                dx, s1, s2, residual_s2, dws = None, None, None, None, [None] * len(outputs)
            else:
                (dx, s1, s2, residual_s2), dws = backward(operator, source, act, mask, outputs, of_act, need_dx, backend)
            of_x, of_layer = (dx, s1, s2), []
            for output, dw, (*_, (_, need_dgamma, need_dbeta)) in zip(outputs, dws, parts, strict=True):
                of_layer += dw, output.s2 if need_dgamma else None, output.s1 if need_dbeta else None
            gradients = of_layer + gradients
        # A residual shares dz, and where it is raw, s1.
        of_residual = dx if has_residual else None, None if residual_s2 is None else s1, residual_s2
        return None, dx, s1, s2, *of_residual, *gradients


def _is_plain_backward(layers: list, grads: Sequence[Tensor | None]) -> bool:
    """Whether nobody watches the dispatcher, or may ask for a second derivative, which is an error there."""
    (_, source, *_), *_ = layers
    return not (torch.is_grad_enabled() or is_watched(source.x)) and not any([g is not None and is_wrapped(g) for g in grads])  # noqa: C419


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
