"""The operators that end in convolutions: one family, one implementation.

A member is told apart by three facts: whether its input is pending, whether the activation that is made of it is read by others, too (a
residual may then come with it, and the activation is an output), and how many convolutions read the activation. From these follow
its schema, its fake, and its backward, so that a rule such as the gradient convention stands in one place. See docs/operators/.

A call is a `Source` and `Conv`s, its results are `Convolved`, and its backward reads `ConvOutput`s. A schema knows only flat arguments,
so what passes the dispatcher is flattened before and put together behind it; where nobody watches the dispatcher, neither is done.
The autograd node of both ways is in `node`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..reference import Reference
from ..values import Conv, ConvOutput, Pending, Source, accumulate_dtype
from .checks import check_conv, check_source
from .flat import flatten, schema, unflatten
from .library import channels_last, define, empty_nhwc, nothing, overload, present


class Convolved(NamedTuple):
    """What an operator makes."""

    pendings: Sequence[Pending]  #: one of each convolution
    act: Tensor | None  #: the activation that they read, where it was written; x itself where that is one
    mask: Tensor | None  #: of the ReLU, packed, where there is a residual


#: Gradients of what an operator reads, dx, s1, s2 and residual_s2, and dw of each convolution; None for what is not needed.
Gradients = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Operator:
    """A member of the family."""

    name: str
    pending: bool  #: x is a raw convolution output with its norm, not an activation
    residual: bool  #: others read the activation, too: it (and its mask) are outputs, and a residual may be added
    convs: int  #: how many convolutions read the activation
    may_skip_act: bool = field(init=False)  #: nobody else reads the activation, so that it need not be written unless `write_act` asks

    def __post_init__(self):
        object.__setattr__(self, "may_skip_act", self.pending and not self.residual)

    @property
    def suffixes(self) -> range:
        """What the names of each convolution's arguments end in."""
        return range(1, self.convs + 1)

    @property
    def source_fields(self) -> list[str]:
        """The fields of a `Source` that it reads."""
        return [name for name in Source._fields if name == "x" or (self.residual if name.startswith("residual") else self.pending)]

    @property
    def schema(self) -> str:
        """Arguments: the source, each convolution with its norm, the backend. Results: each Pending; act; mask."""
        args = self._source_schema()
        for i in self.suffixes:
            args += schema(Conv, f"{i}")
        args += ["bool write_act"] if self.may_skip_act else []
        results = ["Tensor"] * (len(Pending._fields) * self.convs + self.pending + self.residual)
        return f"{self.name}({', '.join(args)}, str backend) -> ({', '.join(results)})"

    @property
    def backward_schema(self) -> str:
        """Arguments: the source, act, mask, each output with its gradients, dact. Results: dx, s1, s2, residual_s2; each dw."""
        args = [*self._source_schema(), "Tensor act", "Tensor mask"]
        for i in self.suffixes:
            args += schema(ConvOutput, f"{i}")
        results = ["Tensor"] * (len(("dx", "s1", "s2", "residual_s2")) + self.convs)
        return f"{self.name}_backward({', '.join(args)}, Tensor? dact, bool need_dx, str backend) -> ({', '.join(results)})"

    def _source_schema(self) -> list[str]:
        optional = {name for name in self.source_fields if name.startswith("residual")}
        return [f"Tensor{'?' if name in optional else ''} {name}" for name in self.source_fields]

    def _source(self, args: Iterator[Any]) -> Source:
        return Source(**{name: next(args) for name in self.source_fields})

    def _flat_source(self, source: Source) -> list[Tensor | None]:
        return [getattr(source, name) for name in self.source_fields]

    # ---- forward -----------------------------------------------------------------------------------------------------

    def run(self, source: Source, convs: Sequence[Conv], passes: Reference, write_act: bool = False) -> tuple:
        """Run, on what has been checked -> the fields of `Convolved`. `write_act` asks for an activation that nobody else reads."""
        return passes.convolve(source, convs, not self.may_skip_act or write_act or passes.keeps_act(source, convs))

    def _implementation(self, source: Source, convs: Sequence[Conv], backend: str, write_act: bool) -> tuple:
        """What stands behind the dispatcher."""
        check_source(source)
        for conv in convs:
            check_conv(source.x, conv)
        return self.run(source, convs, BACKENDS[backend], write_act)

    def fake(self, source: Source, convs: Sequence[Conv], backend: str, write_act: bool = False) -> Convolved:
        """The shapes and layouts of `run`, with the same checks."""
        x, pendings, act, mask = source.x, [], source.x, None
        check_source(source)
        for conv in convs:
            n, k, p, q = check_conv(x, conv)
            y = empty_nhwc(x, (n, k, p, q))
            vectors = {name: x.new_empty((k,), dtype=accumulate_dtype(x.dtype)) for name in Pending._fields if name != "y"}
            pendings.append(Pending(y=y, **vectors))
        if self.pending:
            written = not self.may_skip_act or write_act or BACKENDS[backend].keeps_act(source, convs)
            act = empty_nhwc(x, x.shape) if written else None
        if source.residual is not None:
            n, c, h, w = x.shape
            mask = x.new_empty((n, h, w, (c + 7) // 8), dtype=torch.uint8)
        return Convolved(pendings, act, mask)

    # ---- through the dispatcher --------------------------------------------------------------------------------------

    def define(self, differentiable: Callable[..., Convolved]) -> None:
        """Register the operator, what makes it a node of autograd, and its backward, with flat arguments and results."""
        define(self.backward_schema, self._flat_gradients, self._fake_gradients)
        define(self.schema, *(self._flattened(f) for f in (self._implementation, self.fake, differentiable)))

    def dispatched(self, source: Source, convs: Sequence[Conv], backend: str, write_act: bool = False) -> Convolved:
        """`run`, behind the dispatcher."""
        args = self._flat_source(source)
        for conv in convs:
            args += flatten(conv)
        results = iter(overload(self.name)(*args, *([write_act] if self.may_skip_act else []), backend))
        pendings = [Pending(*[next(results) for _ in Pending._fields]) for _ in convs]
        return Convolved(pendings, next(results) if self.pending else source.x, next(results) if self.residual else None)

    def _flattened(self, run: Callable[..., Convolved]) -> Callable[..., tuple[Tensor, ...]]:
        """`run` with the schema's arguments and results, which are tensors, of a fixed number."""

        def flattened(*args):
            rest = iter(args)
            source = self._source(rest)
            convs = [unflatten(Conv, rest) for _ in self.suffixes]
            write_act, backend = self.may_skip_act and next(rest), next(rest)
            pendings, act, mask = run(source, convs, backend, write_act)
            results = [t for pending in pendings for t in pending]
            if self.pending:
                results.append(nothing(source.x, source.x.dtype) if act is None else act)
            if self.residual:
                results.append(nothing(source.x, torch.uint8) if mask is None else mask)
            return tuple(results)

        return flattened

    # ---- backward ----------------------------------------------------------------------------------------------------

    def gradients(
        self,
        source: Source,
        act: Tensor | None,
        mask: Tensor | None,
        outputs: Sequence[ConvOutput],
        dact: Tensor | None,
        need_dx: bool,
        backend: str,
    ) -> Gradients:
        """What a node's backward computes. Gradients may have any strides; an act or a mask that there is none of may be an empty tensor,
        since the forward may have passed the dispatcher where the backward does not.
        """
        outputs = [output.ready() for output in outputs]
        return BACKENDS[backend].convolve_backward(source, present(act), present(mask), outputs, channels_last(dact), need_dx)

    def own_gradients(self, source, act, mask, outputs, dact, need_dx, backend) -> Gradients:
        """`gradients`, of what a backend itself made and kept: it is as the backend takes it. No norm is shared."""
        return BACKENDS[backend].convolve_backward(source, act, mask, outputs, dact, need_dx)

    def dispatched_gradients(self, source, act, mask, outputs, dact, need_dx, backend) -> Gradients:
        """`gradients`, behind the dispatcher."""
        args = [*self._flat_source(source), *(nothing(source.x, torch.uint8) if t is None else t for t in (act, mask))]
        for output in outputs:
            args += flatten(output)
        results = overload(f"{self.name}_backward")(*args, dact, need_dx, backend)
        needed = self._needed(source, outputs, need_dx)
        dx, s1, s2, residual_s2, *dws = (t if wanted else None for t, wanted in zip(results, needed, strict=True))
        return (dx, s1, s2, residual_s2), dws

    def _needed(self, source: Source, outputs: Sequence[ConvOutput], need_dx: bool) -> list[bool]:
        """Which of dx, s1, s2, residual_s2, and of the convolutions' dws, there is."""
        sums = need_dx and self.pending
        dws = [output.need_dw and output.dz is not None for output in outputs]
        return [need_dx, sums, sums, need_dx and source.residual_mean is not None, *dws]

    def _flat_gradients(self, *args) -> tuple[Tensor, ...]:
        """`gradients` with the schema's arguments and results; what is not needed is an empty tensor."""
        source, act, mask, outputs, *rest = self._backward_call(args)
        sums, dws = self.gradients(source, act, mask, outputs, *rest)
        given = zip((*sums, *dws), self._result_dtypes(source, outputs), strict=True)
        return tuple(nothing(source.x, dtype) if t is None else t for t, dtype in given)

    def _fake_gradients(self, *args) -> tuple[Tensor, ...]:
        """The shapes and layouts of `_flat_gradients`."""
        source, _, _, outputs, _, need_dx, _ = self._backward_call(args)
        x = source.x
        sums = [x.new_empty((x.shape[1],), dtype=accumulate_dtype(x.dtype)) for _ in ("s1", "s2", "residual_s2")]
        results = [empty_nhwc(x, x.shape), *sums, *(torch.empty_like(output.weight) for output in outputs)]
        needed = self._needed(source, outputs, need_dx)
        return tuple(t if wanted else nothing(x, t.dtype) for t, wanted in zip(results, needed, strict=True))

    def _backward_call(self, args: Sequence[Any]) -> tuple:
        """The arguments of `gradients`, from the schema's."""
        rest = iter(args)
        source, act, mask = self._source(rest), next(rest), next(rest)
        return source, act, mask, [unflatten(ConvOutput, rest) for _ in self.suffixes], *rest

    @staticmethod
    def _result_dtypes(source: Source, outputs: Sequence[ConvOutput]) -> list[torch.dtype]:
        dtype = source.x.dtype
        return [dtype, *[accumulate_dtype(dtype)] * 3, *(output.weight.dtype for output in outputs)]


OPERATORS = {
    o.name: o
    for o in (
        Operator("conv_stats", pending=False, residual=False, convs=1),
        Operator("conv_stats_pair", pending=False, residual=False, convs=2),
        Operator("norm_act_conv", pending=True, residual=False, convs=1),
        Operator("norm_add_act_conv", pending=True, residual=True, convs=1),
        Operator("norm_add_act_conv_pair", pending=True, residual=True, convs=2),
    )
}
_MEMBERS = {(o.pending, o.residual, o.convs): o for o in OPERATORS.values()}


def operator_for(source: Source, convs: Sequence[Conv], act_is_read: bool) -> Operator:
    """The operator for these convolutions; `act_is_read` tells whether others read a pending source's activation, too."""
    others = act_is_read or source.residual is not None or len(convs) > 1
    return _MEMBERS[source.pending, source.pending and others, len(convs)]


def inner_operator(convs: Sequence[Conv]) -> Operator:
    """The operator for convolutions of a pending activation that nobody else reads."""
    return _MEMBERS[True, len(convs) > 1, len(convs)]
