"""Convolutions one behind the other, as one node of autograd.

A run is layers of convolutions. Those of the first layer read a source. Those of every other read relu(norm(y)) of the first output of the
layer before it, which nobody else sees. One node for a run costs the host less than one for each layer. Behind the dispatcher, where
somebody looks for operators, each layer is an operator, and a node, of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..reference import Reference
from ..values import Conv, ConvGeometry, ConvOutput, Pending, Source
from .checks import check_conv, check_source
from .convolutions import OPERATORS, Convolved, Operator, inner_operator, operator_for
from .library import is_watched, is_wrapped, wants_gradient

#: The convolutions that read one activation.
Layer = Sequence[Conv]
#: The fields of a source that a gradient is defined for.
DIFFERENTIABLE = ("x", "mean", "invstd", "residual", "residual_mean", "residual_invstd")
#: What a node saves of each output, the fields of the source that it becomes: what its norm's backward reads, and the rest.
READ, APPLIED = ("y", "mean", "invstd"), ("scale", "bias")
#: For how many inputs layers remember that their arguments are right: few shapes take turns, in training and between epochs.
MOST_FACTS = 4
#: The gradients of an output that nobody has used.
_NONE = None, None, None
_facts = attrgetter("shape", "dtype", "device")


class Shape(NamedTuple):
    """What backward needs to know of layers, but for tensors."""

    sizes: Sequence[int]  #: how many convolutions each layer has
    settings: Sequence[tuple[bool, ConvGeometry]]  #: of each convolution: whether its norm trains, and how it moves
    groups: Sequence[str]  #: of each convolution's norm
    inner: Sequence[Operator]  #: of each layer but the first, whose operator depends on what it reads


class Layers(tuple[Layer, ...]):
    """The layers of a run, and what follows from them whatever they read. One that is kept knows what it was checked with."""

    def __new__(cls, layers: Iterable[Layer]) -> "Layers":
        """Of convolutions that stay as they are."""
        self = super().__new__(cls, layers)
        convs = [conv for layer in self for conv in layer]
        settings = [(norm.training, geometry) for _, norm, geometry in convs]
        inner = [inner_operator(layer) for layer in self[1:]]
        self.shape = Shape([len(layer) for layer in self], settings, [norm.group for _, norm, _ in convs], inner)
        self.parameters = [t for weight, norm, _ in convs for t in (weight, norm.gamma, norm.beta)]
        self.kept = [t for weight, norm, _ in convs for t in (weight, norm.gamma)]
        self._tensors = [t for weight, norm, _ in convs for t in (weight, *norm) if isinstance(t, Tensor)]
        self._right: list[list[tuple]] = []
        return self

    def run(self, first: Operator, source: Source, passes: Reference) -> list[tuple]:
        """What each layer makes by a backend, one after the other; `first` is the operator of the first.

        Arguments that were right before are not looked at again: `check_conv` asks of x and of the convolutions' tensors for these facts.
        """
        facts, made = list(map(_facts, (source.x, *self._tensors))), []
        known = facts in self._right  # a list: to compare is cheaper than to make a hash of all
        for operator, convs in zip((first, *self.shape.inner), self, strict=True):
            if made:
                ((y, mean, invstd, _, scale, bias), *_), _, _ = made[-1]
                source = Source(y, mean, invstd, scale, bias)
            if not known:
                for conv in convs:
                    check_conv(source.x, conv)
            made.append(operator.run(source, convs, passes))
        if not known:
            self._right = [facts, *self._right[: MOST_FACTS - 1]]
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

    def as_node(self, apply: Callable[..., Any]) -> list[list[tuple]]:
        """Run, as a node. Its results, which have a graph, stand in the place of what the last block made."""
        x, mean, invstd, _, _, residual, residual_mean, residual_invstd, _, _ = self.source
        parameters: list[Tensor | None] = []
        for layers in self.blocks:
            parameters += layers.parameters
        results = apply(self, x, mean, invstd, residual, residual_mean, residual_invstd, *parameters)
        *inner, block = self.made
        rest, last = iter(results), [Convolved(pendings, None, mask) for pendings, _, mask in block]
        for layer in last:
            pendings = layer.pendings
            for i in range(layer is not last[-1], len(pendings)):
                *_, var, scale, bias = pendings[i]
                pendings[i] = Pending(next(rest), next(rest), next(rest), var, scale, bias)
        first, (pendings, _, mask) = self.firsts[-1], last[0]
        if first.residual or not first.pending:
            last[0] = Convolved(pendings, results[-1] if first.residual else x, mask)
        return [*inner, last]


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
    weight, gamma, beta. Results are those with a gradient: y, mean, invstd of each output of the last block that its next layer does not
    read; act where others read it.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, *_: Tensor | None) -> tuple[Tensor, ...]:
        """Run and save: the raw input, a raw residual; of each layer act and mask; of each output y, its norm, weight and gamma."""
        ctx.set_materialize_grads(False)  # an unused act must not cost a tensor of zeros
        made, source, blocks = run.run(), run.source, run.blocks
        x, mean, invstd, scale, bias, *residual = source
        saved = [x, mean, invstd, scale, bias, *(residual if source.residual_mean is not None else [None] * len(residual))]
        reads, applied, parameters, results, last = [], [], [], [], made[-1]
        for block, layers in zip(made, blocks, strict=True):
            for pendings, act, mask in block:
                saved += None if act is x else act, mask
                for y, mean, invstd, _, scale, bias in pendings:
                    reads += y, mean, invstd
                    applied += scale, bias
            parameters += layers.kept
        for layer in last:
            for y, mean, invstd, *_ in islice(layer[0], layer is not last[-1], None):
                results += y, mean, invstd
        ctx.save_for_backward(*saved, *reads, *applied, *parameters)
        ctx.known = run.firsts, [layers.shape for layers in blocks], run.backend, run.act_is_read, source.residual is not None
        if run.firsts[-1].residual:
            (_, act, _), *_ = last
            results.append(act)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments. Autograd casts them to the arguments' dtypes."""
        firsts, shapes, backend, act_is_read, has_residual = ctx.known
        blocks, given, gradients = _saved_blocks(ctx, firsts, shapes), iter(grads), []
        *inner, last = shapes[-1].sizes  # of a layer that another follows, the first output is not a result
        triples = zip(given, given, given)  # noqa: B905
        of_results = [*([None, *islice(triples, size - 1)] for size in inner), list(islice(triples, last))]
        of_act, of_next, of_beside = next(given, None), _NONE, _NONE
        plain = _is_plain_backward(blocks[0][0][1].x, grads)
        backward = within = Operator.gradients if plain else Operator.dispatched_gradients
        if plain and not any(chain.from_iterable([shape.groups for shape in shapes])):
            within = Operator.own_gradients
        for block in reversed(blocks):
            while block:
                operator, source, act, mask, parts, need_dx = block.pop()
                outputs, of_outputs = [], of_results.pop() if of_results else (None, _NONE if block else of_beside)
                for of_output, (read, _, weights, setting, group, (need_dw, _, _)) in zip(of_outputs, parts):  # noqa: B905
                    outputs.append(ConvOutput(*(of_output or of_next), *read, *weights, *setting, need_dw, group))
                dact = of_act if operator.pending and not block else None
                if outputs[0].dz is not None or dact is not None or outputs[-1].dz is not None:
                    (dx, s1, s2, residual_s2), dws = backward(operator, source, act, mask, outputs, dact, need_dx, backend)
                else:
                    dx, s1, s2, residual_s2, dws = None, None, None, None, [None] * len(outputs)
                of_next, of_layer = (dx, s1, s2), []
                for output, dw, (_, _, _, _, _, (_, need_dgamma, need_dbeta)) in zip(outputs, dws, parts, strict=True):
                    of_layer += dw, output.s2 if need_dgamma else None, output.s1 if need_dbeta else None
                gradients.append(of_layer)
            if not operator.pending and of_act is not None and need_dx:  # as autograd adds where a run is a block: the bits are the same
                dx = of_act if dx is None else dx + of_act
            # A residual shares dz, and where it is raw, s1.
            of_act, of_beside = dx if act_is_read and source.residual_mean is None else None, (dx, s1, residual_s2)
            backward = within  # what the last block handed out has gradients of any strides
        of_residual = dx if has_residual else None, None if residual_s2 is None else s1, residual_s2
        return None, dx, s1, s2, *of_residual, *chain.from_iterable(reversed(gradients))


def _saved_blocks(ctx: Any, firsts: Sequence[Operator], shapes: Sequence["Shape"]) -> list[list[tuple]]:
    """Of each block the layers: (operator, source, act, mask, what is known of each convolution, whether the source wants a gradient).

    Known of a convolution: `READ` and `APPLIED` of its output, (weight, gamma), its setting, its group, which parameters want a gradient.
    """
    saved, needs = iter(ctx.saved_tensors), iter(ctx.needs_input_grad)
    next(needs)  # of the run itself
    source, need_dx = Source(*islice(saved, len(Source._fields))), True in tuple(islice(needs, len(DIFFERENTIABLE)))
    sizes, settings, groups, _ = ([*chain.from_iterable(field)] for field in zip(*shapes, strict=True))
    acts, count = iter(_groups(saved, 2, len(sizes))), len(settings)
    reads, applied, weights = _groups(saved, len(READ), count), _groups(saved, len(APPLIED), count), zip(saved, saved)  # noqa: B905
    convs = zip(reads, applied, weights, settings, groups, zip(needs, needs, needs))  # noqa: B905
    blocks: list[list[tuple]] = []
    parts, beside = [], []
    for first, shape in zip(firsts, shapes, strict=True):
        if blocks:  # as `behind`
            (read, applied, *_), *_ = parts
            source = Source(*read, *applied, *[t for read, applied, *_ in beside for t in (*read, *applied)])
        layers = []
        for operator, size in zip((first, *shape.inner), shape.sizes, strict=True):
            if layers:
                (read, applied, *_), *_ = parts
                source = Source(*read, *applied)
            (act, mask), parts = next(acts), list(islice(convs, size))
            if not layers:
                _, *beside = parts
            layers.append((operator, source, act if operator.pending else source.x, mask, parts, need_dx))
            need_dx = need_dx or any([True in needed for *_, needed in parts])  # noqa: C419
        blocks.append(layers)
    return blocks


def _groups(values: Iterator[Any], size: int, count: int) -> list[tuple]:
    """The next `count` groups of `size` values."""
    return list(islice(zip(*[values] * size), count))  # noqa: B905


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
