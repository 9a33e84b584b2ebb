"""Convolutions one behind the other, as one node of autograd.

A run is layers of convolutions. Those of the first layer read a source. Those of every other read relu(norm(y)) of the first output of the
layer before it, which nobody else sees. One node for a run costs the host less than one for each layer. Behind the dispatcher, where
somebody looks for operators, each layer is an operator, and a node, of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..values import Conv, ConvOutput, Pending, Source
from .checks import check_layouts, check_source
from .convolutions import INNER, OPERATORS, Convolved, Operator, operator_for
from .library import is_watched, is_wrapped, wants_gradient

#: The convolutions that read one activation.
Layer = Sequence[Conv]
#: What runs a layer: (operator, source, convolutions) -> what the operator makes, a `Convolved` or its fields.
Execute = Callable[[Operator, Source, Layer], tuple]
#: The fields of a source that a gradient is defined for.
DIFFERENTIABLE = ("x", "mean", "invstd", "residual", "residual_mean", "residual_invstd")
#: What a node saves of each output, and of each convolution.
KEPT, KEPT_PARAMETERS = ("y", "mean", "invstd", "scale", "bias"), ("weight", "gamma")
_facts = attrgetter("shape", "dtype", "device")


class Layers(tuple[Layer, ...]):
    """The layers of a run, and what follows from them whatever they read. One that is kept knows what it was checked with."""

    def __new__(cls, layers: Iterable[Layer]) -> "Layers":
        """Of convolutions that stay as they are."""
        self = super().__new__(cls, layers)
        self.parameters, self.kept, self.settings, self._tensors, self._right = [], [], [], [], set()
        for layer in self:
            of_layer = []
            for weight, norm, geometry in layer:
                self.parameters += weight, norm.gamma, norm.beta
                self.kept += weight, norm.gamma
                self._tensors += [t for t in (weight, *norm) if isinstance(t, Tensor)]
                # The next layer reads the first output, and nobody else does.
                of_layer.append((not of_layer and layer is not self[-1], (norm.training, geometry, norm.group)))
            self.settings.append(of_layer)
        return self

    def facts(self, source: Source) -> tuple:
        """All that checks look at, of these convolutions on a source, but for layouts."""
        return tuple(map(_facts, [*[t for t in source if t is not None], *self._tensors])), source.kind()

    def known(self, facts: tuple) -> bool:
        """Whether they were right before."""
        return facts in self._right

    def learn(self, facts: tuple) -> None:
        """They are right."""
        self._right.add(facts)


class Run:
    """What becomes a node of autograd."""

    __slots__ = ("backend", "execute", "first", "layers", "made", "source")

    def __init__(self, first: Operator, source: Source, layers: Layers, backend: str, execute: Execute):
        self.first, self.source, self.layers, self.backend, self.execute = first, source, layers, backend, execute
        self.made: Sequence[tuple] = ()  #: by each layer, once it ran

    def as_node(self, apply: Callable[..., Any]) -> list[Convolved]:
        """Run, as a node. Its results, which have a graph, stand in the place of what the layers made."""
        x, mean, invstd, _, _, residual, residual_mean, residual_invstd, _, _ = self.source
        results = apply(self, x, mean, invstd, residual, residual_mean, residual_invstd, *self.layers.parameters)
        made, rest, is_first = [], iter(results), True
        for (pendings, act, mask), of_layer in zip(self.made, self.layers.settings, strict=True):
            seen = []
            for pending, (read_next, _) in zip(pendings, of_layer, strict=True):
                if not read_next:
                    *_, var, scale, bias = pending
                    pending = Pending(next(rest), next(rest), next(rest), var, scale, bias)
                seen.append(pending)
            made.append(Convolved(seen, act if is_first and not self.first.pending else None, mask))
            is_first = False
        if self.first.residual:
            pendings, _, mask = made[0]
            made[0] = Convolved(pendings, results[-1], mask)
        return made


def in_steps(first: Operator, source: Source, layers: Sequence[Layer], execute: Execute) -> list[tuple]:
    """The layers of a run, one after the other."""
    operator, made = first, []
    for convs in layers:
        if made:
            ((y, mean, invstd, _, scale, bias), *_), _, _ = made[-1]
            source = Source(y, mean, invstd, scale, bias)
            operator = INNER if len(convs) == 1 else operator_for(source, convs, False)
        made.append(execute(operator, source, convs))
    return made


def convolve(source: Source, layers: Iterable[Layer], backend: str, act_is_read: bool) -> list[Convolved]:
    """What each layer of a run makes; `act_is_read` tells whether others read the activation of a pending source, too.

    Only then it is handed out: what a backend keeps for itself is nobody else's.
    """
    first = operator_for(source, layers[0], act_is_read)
    if is_watched(source.x):
        # Whether a backend keeps the activation depends on sizes; a graph for any size has to know it.
        any_size = _any_size(source.x)
        made = in_steps(first, source, layers, lambda o, s, convs: o.dispatched(s, convs, backend, o.may_skip_act and any_size))
        return _handed_out(first, made)
    layers = layers if type(layers) is Layers else Layers(layers)
    passes, facts = BACKENDS[backend], layers.facts(source)
    if known := layers.known(facts):
        check_layouts(source)
    else:
        check_source(source)  # every other is made by an operator

    def execute(operator: Operator, source: Source, convs: Layer) -> tuple:
        return (operator.run if known else operator.check_and_run)(source, convs, passes)

    if torch.is_grad_enabled():
        made = Run(first, source, layers, backend, execute).as_node(_apply)
    else:
        made = _handed_out(first, in_steps(first, source, layers, execute))
    if not known:
        layers.learn(facts)
    return made


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
        run = Run(operator, source, Layers([convs]), backend, below)
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
        x, mean, invstd, scale, bias, *residual = source
        saved = [x, mean, invstd, scale, bias, *(residual if source.residual_mean is not None else [None] * len(residual))]
        kept, results = [], []
        for (pendings, act, mask), of_layer in zip(made, layers.settings, strict=True):
            saved += None if act is x else act, mask
            for (y, mean, invstd, _, scale, bias), (read_next, _) in zip(pendings, of_layer, strict=True):
                kept += y, mean, invstd, scale, bias
                if not read_next:
                    results += y, mean, invstd
        ctx.save_for_backward(*saved, *kept, *layers.kept)
        ctx.known = first, layers.settings, run.backend, source.residual is not None
        if first.residual:
            (_, act, _), *_ = made
            results.append(act)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments. Autograd casts them to the arguments' dtypes."""
        first, settings, backend, has_residual = ctx.known
        saved, needs, given = iter(ctx.saved_tensors), iter(ctx.needs_input_grad), iter(grads)
        next(needs)  # of the run itself
        source, need_dx = Source(*islice(saved, len(Source._fields))), True in tuple(islice(needs, len(DIFFERENTIABLE)))
        acts = [(next(saved), next(saved)) for _ in settings]
        convs = sum(map(len, settings))
        kept = iter([tuple(islice(saved, len(KEPT))) for _ in range(convs)])
        operator, layers = first, []
        for (act, mask), of_layer in zip(acts, settings, strict=True):
            parts, wanted = [], need_dx
            for read_next, setting in of_layer:
                of_output = None if read_next else (next(given), next(given), next(given))
                needed = next(needs), next(needs), next(needs)
                parts.append((of_output, next(kept), (next(saved), next(saved)), setting, needed))
                wanted = wanted or True in needed
            layers.append((operator, source, act if operator.pending else source.x, mask, parts, need_dx))
            (_, (y, mean, invstd, scale, bias), *_), *_ = parts
            operator, source, need_dx = INNER, Source(y, mean, invstd, scale, bias), wanted
        dact = next(given, None)
        backward = Operator.gradients if _is_plain_backward(source.x, grads) else Operator.dispatched_gradients
        gradients, of_read = [], None
        while layers:
            operator, source, act, mask, parts, need_dx = layers.pop()
            outputs, of_act, is_used = [], None if layers else dact, False
            for of_output, (y, mean, invstd, _, _), (weight, gamma), (training, geometry, group), (need_dw, _, _) in parts:
                dz, s1, s2 = of_read if of_output is None else of_output
                is_used = is_used or dz is not None
                outputs.append(ConvOutput(dz, s1, s2, y, mean, invstd, weight, gamma, training, geometry, need_dw, group))
            if is_used or of_act is not None:
                (dx, s1, s2, residual_s2), dws = backward(operator, source, act, mask, outputs, of_act, need_dx, backend)
            else:
                dx, s1, s2, residual_s2, dws = None, None, None, None, [None] * len(outputs)
            of_read, of_layer = (dx, s1, s2), []
            for output, dw, (*_, (_, need_dgamma, need_dbeta)) in zip(outputs, dws, parts, strict=True):
                of_layer += dw, output.s2 if need_dgamma else None, output.s1 if need_dbeta else None
            gradients = of_layer + gradients
        # A residual shares dz, and where it is raw, s1.
        of_residual = dx if has_residual else None, None if residual_s2 is None else s1, residual_s2
        return None, dx, s1, s2, *of_residual, *gradients


def _is_plain_backward(x: Tensor, grads: Sequence[Tensor | None]) -> bool:
    """Whether nobody watches the dispatcher, or may ask for a second derivative, which is an error there."""
    return not (torch.is_grad_enabled() or is_watched(x)) and not any([g is not None and is_wrapped(g) for g in grads])  # noqa: C419


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
