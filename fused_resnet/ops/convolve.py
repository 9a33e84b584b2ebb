"""The operators that end in convolutions: one family, one implementation.

A member is told apart by three facts: whether its input is pending, whether a residual may come with it (then the activation
is an output), and how many convolutions read the activation. From these follow its schema, its fake, and its autograd formula,
so that a rule such as the gradient convention stands in one place. See docs/operators/.

Work is described by `Call`s and `ConvOutput`s. A schema knows only flat arguments, so what passes the dispatcher is flattened before
and put together behind it; where nobody watches the dispatcher, neither is done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..reference import Conv, ConvGeometry, ConvOutput, Norm, Pending, Source, accumulate_dtype
from .checks import check_conv, check_source
from .library import channels_last, define, empty_nhwc, is_plain, is_watched, nothing, overload, present, wants_gradient

PENDING = ("mean", "invstd", "scale", "bias")
RESIDUAL = ("residual", "residual_mean", "residual_invstd", "residual_scale", "residual_bias")
NO_RESIDUAL = (None,) * len(RESIDUAL)
#: How many arguments stand for a convolution with its norm, and how many results; how many of a backward stand for an output.
CONV_ARITY, PENDING_ARITY, OUTPUT_ARITY = 12, len(Pending._fields), 15


#: What an operator makes: a Pending of each convolution; the activation that they read; its packed mask. What there is none of is None,
#: or an empty tensor where it came through the dispatcher.
Made = tuple[Sequence[Pending], Tensor | None, Tensor | None]


@dataclass(slots=True)
class Call:
    """One call of an operator."""

    source: Source
    convs: Sequence[Conv]
    backend: str
    write_act: bool = False  #: the activation is asked for, though nobody else reads it
    made: Made | None = None  #: what it made, once it ran


@dataclass(frozen=True)
class Operator:
    """A member of the family."""

    name: str
    pending: bool  #: x is a raw convolution output with its norm, not an activation
    residual: bool  #: a residual may be added; the activation (and its mask) are outputs
    convs: int  #: how many convolutions read the activation

    @property
    def source_arity(self) -> int:
        """How many arguments stand for a `Source`."""
        return 1 + self.pending * len(PENDING) + self.residual * len(RESIDUAL)

    @property
    def may_skip_act(self) -> bool:
        """Whether the activation, which nobody else reads, need not be written. The argument `write_act` then asks for it."""
        return self.pending and not self.residual

    @property
    def schema(self) -> str:
        """Arguments: the source, each convolution with its norm, the backend. Results: each Pending; act; mask."""
        args = self._source_schema()
        for i in suffixes(self.convs):
            args += [
                f"Tensor weight{i}", f"Tensor? gamma{i}", f"Tensor? beta{i}", f"Tensor? running_mean{i}",
                f"Tensor? running_var{i}", f"bool training{i}", f"float eps{i}", f"str group{i}", *geometry_schema(i),
            ]  # fmt: skip
        args += ["bool write_act"] if self.may_skip_act else []
        results = ["Tensor"] * (PENDING_ARITY * self.convs + self.pending + self.residual)
        return f"{self.name}({', '.join(args)}, str backend) -> ({', '.join(results)})"

    @property
    def backward_schema(self) -> str:
        """Arguments: the source, act, mask, each output with its gradients, dact. Results: dx, s1, s2, residual_s2; each dw."""
        args = [*self._source_schema(), "Tensor act", "Tensor mask"]
        for i in suffixes(self.convs):
            args += [
                f"Tensor? dz{i}", f"Tensor? s1{i}", f"Tensor? s2{i}", f"Tensor y{i}", f"Tensor y_mean{i}",
                f"Tensor y_invstd{i}", f"Tensor weight{i}", f"Tensor? gamma{i}", f"bool training{i}",
                *geometry_schema(i), f"bool need_dw{i}", f"str group{i}",
            ]  # fmt: skip
        results = ["Tensor"] * (4 + self.convs)
        return f"{self.name}_backward({', '.join(args)}, Tensor? dact, bool need_dx, str backend) -> ({', '.join(results)})"

    def _source_schema(self) -> list[str]:
        args = ["Tensor x"]
        if self.pending:
            args += [f"Tensor {name}" for name in PENDING]
        if self.residual:
            args += [f"Tensor? {name}" for name in RESIDUAL]
        return args

    # ---- forward -----------------------------------------------------------------------------------------------------

    def __call__(self, source: Source, convs: Sequence[Conv], backend: str) -> Made:
        """Run it, as a node of autograd where a gradient is wanted: behind the dispatcher where somebody watches that."""
        call = Call(source, convs, backend)
        if not is_watched(source.x):
            return self._as_node(call, self.run, _apply) if torch.is_grad_enabled() else self.run(call)
        # Whether a backend keeps the activation depends on sizes; a graph for any size has to know it.
        call.write_act = self.may_skip_act and _any_size(source.x)
        return self._put_together(overload(self.name)(*self._flat(call)))

    def run(self, call: Call) -> Made:
        """Check and run."""
        source, convs = call.source, call.convs
        check_source(source)
        for conv in convs:
            check_conv(source.x, conv)
        return BACKENDS[call.backend].convolve(source, convs, self._writes_act(call))

    def fake(self, call: Call) -> Made:
        """The shapes and layouts of `run`, with the same checks."""
        source, x = call.source, call.source.x
        check_source(source)
        pendings, act, mask = [], None, None
        for conv in call.convs:
            shape = check_conv(x, conv)
            vectors = (x.new_empty((shape[1],), dtype=accumulate_dtype(x.dtype)) for _ in range(PENDING_ARITY - 1))
            pendings.append(Pending(empty_nhwc(x, shape), *vectors))
        if self.pending and self._writes_act(call):
            act = empty_nhwc(x, x.shape)
        if source.residual is not None:
            n, c, h, w = x.shape
            mask = x.new_empty((n, h, w, (c + 7) // 8), dtype=torch.uint8)
        return pendings, act, mask

    def _writes_act(self, call: Call) -> bool:
        """Whether the activation is a tensor after `run`: where it is a result, is asked for, or the backend keeps it for backward."""
        return not self.may_skip_act or call.write_act or BACKENDS[call.backend].keeps_act(call.source, call.convs)

    # ---- through the dispatcher --------------------------------------------------------------------------------------

    def define(self) -> None:
        """Register the operator and its backward, with flat arguments and results."""
        define(self.backward_schema, self._flat_gradients, self._fake_gradients)
        define(
            self.schema, self._flattened(self.run), self._flattened(self.fake),
            self._flattened(self._autograd),
        )  # fmt: skip

    def _flattened(self, run: Callable[[Call], Made]) -> Callable[..., tuple[Tensor, ...]]:
        """`run` with the schema's arguments and results, which are tensors, of a fixed number."""

        def flattened(*args):
            call = self._call(args)
            (pendings, act, mask), x = run(call), call.source.x
            results = [t for pending in pendings for t in pending]
            if self.pending:
                results.append(nothing(x, x.dtype) if act is None else act)
            if self.residual:
                results.append(nothing(x, torch.uint8) if mask is None else mask)
            return tuple(results)

        return flattened

    def _below_autograd(self, call: Call) -> Made:
        with torch._C._AutoDispatchBelowAutograd():
            return self._put_together(overload(self.name)(*self._flat(call)))

    def _flat(self, call: Call) -> list:
        """The schema's arguments."""
        args = list(call.source[: self.source_arity])
        for weight, norm, geometry in call.convs:
            args += [weight, *norm, *geometry]
        return [*args, *([call.write_act] if self.may_skip_act else []), call.backend]

    def _call(self, args: Sequence[Any]) -> Call:
        """The inverse of `_flat`."""
        source, rest = Source(*args[: self.source_arity]), args[self.source_arity :]
        convs = []
        for i in range(self.convs):
            weight, *norm_and_geometry = rest[CONV_ARITY * i : CONV_ARITY * (i + 1)]
            convs.append(Conv(weight, Norm(*norm_and_geometry[:7]), ConvGeometry(*norm_and_geometry[7:])))
        return Call(source, convs, args[-1], write_act=bool(self.may_skip_act and args[-2]))

    def _put_together(self, results: Sequence[Tensor]) -> Made:
        """The operator's flat results."""
        pendings = [Pending(*results[PENDING_ARITY * i :][:PENDING_ARITY]) for i in range(self.convs)]
        return pendings, results[PENDING_ARITY * self.convs] if self.pending else None, results[-1] if self.residual else None

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
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """((dx, s1, s2, residual_s2), [dw of each convolution]); None for what is not needed."""
        outputs = [output._replace(dz=channels_last(output.dz)) for output in outputs]
        outputs = [output.shared() if output.group else output for output in outputs]
        return BACKENDS[backend].convolve_backward(source, present(act), present(mask), outputs, channels_last(dact), need_dx)

    def backward(self, source, act, mask, outputs, dact, need_dx, backend):
        """`gradients`, behind the dispatcher where somebody watches that, or may ask for a second derivative, which is an error there."""
        plain = not is_watched(source.x) and all(t is None or is_plain(t) for t in (dact, *(output.dz for output in outputs)))
        if plain and not torch.is_grad_enabled():
            return self.gradients(source, act, mask, outputs, dact, need_dx, backend)
        args = [*source[: self.source_arity], *(nothing(source.x, torch.uint8) if t is None else t for t in (act, mask))]
        for output in outputs:
            *tensors, training, geometry, need_dw, group = output
            args += [*tensors, training, *geometry, need_dw, group]
        results = overload(f"{self.name}_backward")(*args, dact, need_dx, backend)
        needed = self._needed(source, outputs, need_dx)
        results = [t if wanted else None for t, wanted in zip(results, needed, strict=True)]
        return results[:4], results[4:]

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
        x, dtypes = source.x, self._result_dtypes(source, outputs)
        vectors = (x.new_empty((x.shape[1],), dtype=dtype) for dtype in dtypes[1:4])
        results = [empty_nhwc(x, x.shape), *vectors, *(torch.empty_like(output.weight) for output in outputs)]
        needed = self._needed(source, outputs, need_dx)
        return tuple(t if wanted else nothing(x, t.dtype) for t, wanted in zip(results, needed, strict=True))

    def _backward_call(self, args: Sequence[Any]) -> tuple:
        """The arguments of `gradients`, from the schema's."""
        source, (act, mask, *rest) = Source(*args[: self.source_arity]), args[self.source_arity :]
        outputs = []
        for i in range(self.convs):
            *tensors, training, stride, padding, dilation, groups, need_dw, group = rest[OUTPUT_ARITY * i :][:OUTPUT_ARITY]
            outputs.append(ConvOutput(*tensors, training, ConvGeometry(stride, padding, dilation, groups), need_dw, group))
        return source, act, mask, outputs, *args[-3:]

    @staticmethod
    def _result_dtypes(source: Source, outputs: Sequence[ConvOutput]) -> list[torch.dtype]:
        dtype = source.x.dtype
        return [dtype, *[accumulate_dtype(dtype)] * 3, *(output.weight.dtype for output in outputs)]

    # ---- autograd ----------------------------------------------------------------------------------------------------

    def _as_node(self, call: Call, run: Callable[[Call], Made], apply: Callable[..., Any]) -> Made:
        """`run` as a node of autograd."""
        source, parameters = call.source, []
        for weight, norm, _ in call.convs:
            parameters += weight, norm.gamma, norm.beta
        results = apply(self, call, run, *source[:3], *source[5:8], *parameters)
        made, act, mask = call.made
        pendings = []
        for i, (*_, var, scale, bias) in enumerate(made):
            y, mean, invstd = results[3 * i : 3 * i + 3]
            pendings.append(Pending(y, mean, invstd, var, scale, bias))
        return pendings, results[-1] if self.residual else act, mask

    def _autograd(self, call: Call) -> Made:
        """What the dispatcher finds where autograd is due."""
        parameters = [t for weight, norm, _ in call.convs for t in (weight, norm.gamma, norm.beta)]
        if wants_gradient(*call.source, *parameters):
            return self._as_node(call, self._below_autograd, Node.apply)
        return self._below_autograd(call)


class Node(torch.autograd.Function):
    """An operator as a node of autograd.

    Its arguments are the operator, its call, what runs it, and the tensors that a gradient is defined for: x, mean, invstd, the
    residual's three, and of each convolution weight, gamma, beta. Results are those with a gradient: of each convolution y, mean, invstd;
    act where it is a result. All else is read from the call and left there.
    """

    @staticmethod
    def forward(ctx: Any, operator: Operator, call: Call, run: Callable[[Call], Made], *_: Tensor | None) -> tuple[Tensor, ...]:
        """Run and save: for each convolution y with its statistics; the raw input; a raw residual; act; one bit a value of mask."""
        ctx.set_materialize_grads(False)  # an unused act must not cost a tensor of zeros
        source = call.source
        pendings, act, mask = call.made = run(call)
        saved = list(source) if source.residual_mean is not None else [*source[:5], *NO_RESIDUAL]
        saved += act if operator.pending else None, mask
        results, statics = [], []
        for pending, (weight, norm, geometry) in zip(pendings, call.convs, strict=True):
            of_y = pending[:3]
            results += of_y
            saved += of_y
            saved += weight, norm.gamma
            statics.append((norm.training, geometry, norm.group))
        ctx.save_for_backward(*saved)
        ctx.known = operator, call.backend, source.residual is not None, statics
        return (*results, act) if operator.residual else tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments. Autograd casts them to the arguments' dtypes."""
        operator, backend, has_residual, statics = ctx.known
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad  # read once: a checkpoint makes what is saved anew each time
        source, act, mask = Source(*saved[:10]), saved[10], saved[11]
        dact = grads[-1] if operator.residual else None
        outputs = []
        for i, (training, geometry, group) in enumerate(statics):
            dz, s1, s2 = grads[3 * i : 3 * i + 3]
            of_conv = saved[12 + 5 * i : 17 + 5 * i]
            outputs.append(ConvOutput(dz, s1, s2, *of_conv, training, geometry, needs[9 + 3 * i], group))
        if dact is None and all(output.dz is None for output in outputs):
            return (None,) * len(needs)
        (dx, s1, s2, residual_s2), dws = operator.backward(
            source, act if operator.pending else source.x, mask, outputs, dact, any(needs[3:9]), backend
        )
        # A residual shares dz, and where it is raw, s1.
        result = [None, None, None, dx, s1, s2, dx if has_residual else None, None if residual_s2 is None else s1, residual_s2]
        for i, (output, dw) in enumerate(zip(outputs, dws, strict=True)):
            need_dgamma, need_dbeta = needs[10 + 3 * i : 12 + 3 * i]
            result += dw, output.s2 if need_dgamma else None, output.s1 if need_dbeta else None
        return tuple(result)


#: `Node.apply` for plain tensors, where no transform of torch.func is: all that it does in Python is to look for one.
_apply = super(torch.autograd.Function, Node).apply


def _any_size(x: Tensor) -> bool:
    """Whether a compiler is at work that leaves a size of x open."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(size) for size in x.shape)


def suffixes(convs: int) -> list[str]:
    """What the argument names of each convolution end in."""
    return ["", "2"][:convs]


def geometry_schema(i: str) -> list[str]:
    """The schema's words for a `ConvGeometry`."""
    return [f"int[] stride{i}", f"int[] padding{i}", f"int[] dilation{i}", f"int groups{i}"]


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

for _operator in OPERATORS.values():
    _operator.define()
