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
from ..reference import Reference
from ..values import Conv, ConvOutput, Pending, Source
from .checks import check_conv, check_source
from .convolutions import INNER, OPERATORS, Convolved, Operator, operator_for
from .library import is_watched, is_wrapped, wants_gradient

#: The convolutions that read one activation.
Layer = Sequence[Conv]
#: The fields of a source that a gradient is defined for.
DIFFERENTIABLE = ("x", "mean", "invstd", "residual", "residual_mean", "residual_invstd")
#: What a node saves of each output: the fields of the source that it becomes.
KEPT = ("y", "mean", "invstd", "scale", "bias")
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

    def run(self, first: Operator, source: Source, passes: Reference) -> list[tuple]:
        """What each layer makes by a backend, one after the other; `first` is the operator of the first.

        Arguments that were right before are not looked at again.
        """
        facts = self.facts(source)
        known, operator, made = facts in self._right, first, []
        for convs in self:
            if made:
                ((y, mean, invstd, _, scale, bias), *_), _, _ = made[-1]
                source = Source(y, mean, invstd, scale, bias)
                operator = INNER if len(convs) == 1 else operator_for(source, convs, False)
            if not known:
                for conv in convs:
                    check_conv(source.x, conv)
            made.append(operator.run(source, convs, passes))
        self._right.add(facts)
        return made


class Run:
    """What becomes a node of autograd: blocks, each of which reads what the one before it hands on."""

    __slots__ = ("act_is_read", "backend", "blocks", "firsts", "made", "make", "source")

    def __init__(self, source: Source, blocks: Sequence[Layers], backend: str, act_is_read: bool, make: Callable[..., list[tuple]]):
        self.source, self.blocks, self.backend, self.act_is_read = source, blocks, backend, act_is_read
        self.make = make  #: (layers, the operator of the first, source) -> what each layer makes
        self.made: list[list[tuple]] = []  #: by each block, once it ran
        self.firsts: list[Operator] = []  #: of the first layers

    def run(self) -> list[list[tuple]]:
        """What the blocks make, one after the other."""
        source = self.source
        for layers in self.blocks:
            if self.made:
                source = behind(self.made[-1], self.act_is_read)
            first = operator_for(source, layers[0], self.act_is_read)
            self.firsts.append(first)
            self.made.append(self.make(layers, first, source))
        return self.made

    def as_node(self, apply: Callable[..., Any]) -> list[list[Convolved]]:
        """Run, as a node. Its results, which have a graph, stand in the place of what the last block made."""
        x, mean, invstd, _, _, residual, residual_mean, residual_invstd, _, _ = self.source
        parameters = [t for layers in self.blocks for t in layers.parameters]
        results = apply(self, x, mean, invstd, residual, residual_mean, residual_invstd, *parameters)
        made = [[Convolved(pendings, None, mask) for pendings, _, mask in block] for block in self.made]
        rest, last = iter(results), made[-1]
        for (pendings, _, _), of_layer in zip(last, self.blocks[-1].settings, strict=True):
            for i, (read_next, _) in enumerate(of_layer):
                if not read_next:
                    *_, var, scale, bias = pendings[i]
                    pendings[i] = Pending(next(rest), next(rest), next(rest), var, scale, bias)
        first, (pendings, _, mask) = self.firsts[-1], last[0]
        if first.residual or not first.pending:
            last[0] = Convolved(pendings, results[-1] if first.residual else x, mask)
        return made


def behind(made: Sequence[tuple], act_is_read: bool) -> Source:
    """What the next block reads of what the layers of a block made: the output, and beside it the projection, or the activation."""
    (pendings, act, _), ((out, *_), _, _) = made[0], made[-1]
    _, *beside = pendings
    return source_of(out, beside[0] if beside else act if act_is_read else None)


def convolve(source: Source, blocks: Sequence[Sequence[Layer]], backend: str, act_is_read: bool) -> list[list[Convolved]]:
    """What each layer of each block makes; `act_is_read` tells whether others read the activation of a pending source, too.

    Only then it is handed out: what a backend keeps for itself is nobody else's.
    """
    if is_watched(source.x):
        return _dispatched(source, blocks, backend, act_is_read)
    check_source(source)  # every other is made by an operator
    passes = BACKENDS[backend]
    blocks = [layers if type(layers) is Layers else Layers(layers) for layers in blocks]
    run = Run(source, blocks, backend, act_is_read, lambda layers, first, source: layers.run(first, source, passes))
    if torch.is_grad_enabled():
        return run.as_node(_apply)
    return [_handed_out(first, made) for made, first in zip(run.run(), run.firsts, strict=True)]


def _dispatched(source: Source, blocks: Sequence[Sequence[Layer]], backend: str, act_is_read: bool) -> list[list[Convolved]]:
    """`convolve` where somebody looks on: each layer an operator."""
    # Whether a backend keeps the activation depends on sizes; a graph for any size has to know it.
    any_size, made = _any_size(source.x), []
    for layers in blocks:
        if made:
            source = behind(made[-1], act_is_read)
        block, read = [], source
        for convs in layers:
            if block:
                read = source_of(block[-1].pendings[0])
            operator = operator_for(read, convs, act_is_read and not block)
            block.append(operator.dispatched(read, convs, backend, operator.may_skip_act and any_size))
        made.append(_handed_out(operator_for(source, layers[0], act_is_read), block))
    return made


def _handed_out(first: Operator, made: list[tuple]) -> list[Convolved]:
    return [Convolved(p, None if i or first.may_skip_act else act, mask) for i, (p, act, mask) in enumerate(made)]


def _as_dispatched(operator: Operator) -> Callable[..., Convolved]:
    """What the dispatcher finds where autograd is due: the operator below it, as a node where something wants a gradient."""

    def differentiable(source: Source, convs: Layer, backend: str, write_act: bool) -> Convolved:
        def below() -> Convolved:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.dispatched(source, convs, backend, write_act)

        if not wants_gradient(*source, *(t for weight, norm, _ in convs for t in (weight, norm.gamma, norm.beta))):
            return below()
        run = Run(source, [Layers([convs])], backend, operator.residual, lambda *_: [below()])
        (((pendings, act, mask),),) = run.as_node(Node.apply)
        (((_, kept, _),),) = run.made
        return Convolved(pendings, kept if operator.may_skip_act else act, mask)

    return differentiable


def source_of(x: Pending, residual: Pending | Tensor | None = None) -> Source:
    """The activation relu(norm(x) + residual), still to be made. `residual` is an activation, or pending itself."""
    y, mean, invstd, _, scale, bias = x
    if isinstance(residual, Pending):
        return Source(y, mean, invstd, scale, bias, residual.y, residual.mean, residual.invstd, residual.scale, residual.bias)
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
        made, source, blocks = run.run(), run.source, run.blocks
        x, mean, invstd, scale, bias, *residual = source
        saved = [x, mean, invstd, scale, bias, *(residual if source.residual_mean is not None else [None] * len(residual))]
        kept, results, last = [], [], made[-1]
        for block, layers in zip(made, blocks, strict=True):
            for (pendings, act, mask), of_layer in zip(block, layers.settings, strict=True):
                saved += None if act is x else act, mask
                for (y, mean, invstd, _, scale, bias), (read_next, _) in zip(pendings, of_layer, strict=True):
                    kept += y, mean, invstd, scale, bias
                    if block is last and not read_next:
                        results += y, mean, invstd
            kept += layers.kept
        ctx.save_for_backward(*saved, *kept)
        ctx.known = run.firsts, [layers.settings for layers in blocks], run.backend, run.act_is_read, source.residual is not None
        if run.firsts[-1].residual:
            (_, act, _), *_ = last
            results.append(act)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments. Autograd casts them to the arguments' dtypes."""
        firsts, settings, backend, act_is_read, has_residual = ctx.known
        saved, needs, given = iter(ctx.saved_tensors), iter(ctx.needs_input_grad), iter(grads)
        next(needs)  # of the run itself
        source, need_dx = Source(*islice(saved, len(Source._fields))), True in tuple(islice(needs, len(DIFFERENTIABLE)))
        acts = iter([(next(saved), next(saved)) for of_block in settings for _ in of_block])
        blocks = []
        for operator, of_block in zip(firsts, settings, strict=True):
            outputs = iter([tuple(islice(saved, len(KEPT))) for of_layer in of_block for _ in of_layer])
            is_last, layers = len(blocks) + 1 == len(firsts), []
            for of_layer in of_block:
                (act, mask), parts, wanted = next(acts), [], need_dx
                for read_next, setting in of_layer:
                    of_output = (next(given), next(given), next(given)) if is_last and not read_next else None  # made on the way
                    needed = next(needs), next(needs), next(needs)
                    parts.append((of_output, next(outputs), (next(saved), next(saved)), setting, needed))
                    wanted = wanted or True in needed
                layers.append((operator, source, act if operator.pending else source.x, mask, parts, need_dx))
                (_, out, *_), *_ = parts
                operator, source, need_dx = INNER, Source(*out), wanted
            (*_, (_, *beside), _), *_ = layers
            for _, raw, *_ in beside:
                source = Source(*out, *raw)
            blocks.append(layers)
        backward = Operator.gradients if _is_plain_backward(source.x, grads) else Operator.dispatched_gradients
        gradients, of_act, of_next, of_beside = [], next(given, None), None, None
        for layers in reversed(blocks):
            while layers:
                operator, source, act, mask, parts, need_dx = layers.pop()
                outputs, dact = [], of_act if operator.pending and not layers else None
                for of_output, (y, mean, invstd, _, _), (weight, gamma), (training, geometry, group), (need_dw, _, _) in parts:
                    dz, s1, s2 = of_output or (of_beside if outputs else of_next)
                    outputs.append(ConvOutput(dz, s1, s2, y, mean, invstd, weight, gamma, training, geometry, need_dw, group))
                if dact is not None or any([output.dz is not None for output in outputs]):  # noqa: C419
                    (dx, s1, s2, residual_s2), dws = backward(operator, source, act, mask, outputs, dact, need_dx, backend)
                else:
                    dx, s1, s2, residual_s2, dws = None, None, None, None, [None] * len(outputs)
                of_next, of_layer = (dx, s1, s2), []
                for output, dw, (*_, (_, need_dgamma, need_dbeta)) in zip(outputs, dws, parts, strict=True):
                    of_layer += dw, output.s2 if need_dgamma else None, output.s1 if need_dbeta else None
                gradients = of_layer + gradients
            if not operator.pending and of_act is not None and need_dx:  # as autograd adds where a run is a block: the bits are the same
                dx = of_act if dx is None else dx + of_act
            # A residual shares dz, and where it is raw, s1.
            of_act, of_beside = dx if act_is_read and source.residual_mean is None else None, (dx, s1, residual_s2)
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
