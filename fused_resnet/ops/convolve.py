"""The operators that end in convolutions, and `norm_add_act`, which ends in none: one family, one implementation.

A member is told apart by three facts: whether its input is pending, whether a residual may come with it (then the activation
is an output), and how many convolutions read the activation. From these follow its schema, its fake, and its autograd formula,
so that a rule such as the gradient convention stands in one place. See docs/operators/.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..reference import Conv, ConvGeometry, ConvOutput, Norm, Pending, Source, accumulate_dtype
from .checks import check_conv, check_source
from .library import call, channels_last, define, empty_nhwc, nothing

PENDING = ("mean", "invstd", "scale", "bias")
RESIDUAL = ("residual", "residual_mean", "residual_invstd", "residual_scale", "residual_bias")
#: How many arguments stand for a convolution with its norm: of an operator, and of its backward.
CONV_ARITY, OUTPUT_ARITY = 12, 15


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
        results = ["Tensor"] * (len(Pending._fields) * self.convs + self.pending + self.residual)
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

    def unpack(self, args: tuple) -> tuple[Source, list[Conv]]:
        """The operator's flat arguments, backend excluded, as its source and its convolutions."""
        source, rest = Source(*args[: self.source_arity]), args[self.source_arity :]
        convs = []
        for i in range(self.convs):
            weight, *norm_and_geometry = rest[CONV_ARITY * i : CONV_ARITY * (i + 1)]
            convs.append(Conv(weight, Norm(*norm_and_geometry[:7]), ConvGeometry(*norm_and_geometry[7:])))
        return source, convs

    def forward(self, *args) -> tuple[Tensor, ...]:
        """Check and run."""
        *args, backend = args
        source, convs = self.unpack(tuple(args))
        check_source(source)
        for conv in convs:
            check_conv(source.x, conv)
        pendings, act, mask = BACKENDS[backend].convolve(source, convs, self._writes_act(source, convs, *args[-1:], backend))
        results = [t for pending in pendings for t in pending]
        if self.pending:
            results.append(nothing(source.x, source.x.dtype) if act is None else act)
        if self.residual:
            results.append(nothing(source.x, torch.uint8) if mask is None else mask)
        return tuple(results)

    def fake(self, *args) -> tuple[Tensor, ...]:
        """The shapes and layouts of `forward`, with the same checks."""
        *args, backend = args
        source, convs = self.unpack(tuple(args))
        check_source(source)
        x, results = source.x, []
        for conv in convs:
            shape = check_conv(x, conv)
            results.append(empty_nhwc(x, shape))
            results += [x.new_empty(shape[1], dtype=accumulate_dtype(x.dtype)) for _ in range(5)]
        if self.pending:
            written = self._writes_act(source, convs, *args[-1:], backend)
            results.append(empty_nhwc(x, x.shape) if written else nothing(x, x.dtype))
        if self.residual:
            n, c, h, w = x.shape
            absent = source.residual is None
            results.append(nothing(x, torch.uint8) if absent else x.new_empty((n, h, w, (c + 7) // 8), dtype=torch.uint8))
        return tuple(results)

    def _writes_act(self, source: Source, convs: list[Conv], asked: Any, backend: str) -> bool:
        """Whether the activation is a tensor after `forward`: where it is a result, is asked for, or the backend keeps it for backward.

        `asked` is the last argument before the backend: `write_act`, where the operator has it.
        """
        return not self.may_skip_act or asked or BACKENDS[backend].keeps_act(source, convs)

    # ---- backward ----------------------------------------------------------------------------------------------------

    def backward_op(self, *args) -> tuple[Tensor, ...]:
        """Unpack and run; what is not needed is an empty tensor, since an operator's results are tensors."""
        *args, dact, need_dx, backend = args
        source, (act, mask), rest = Source(*args[: self.source_arity]), *self._split(args)
        outputs = []
        for i in range(self.convs):
            given = rest[OUTPUT_ARITY * i : OUTPUT_ARITY * (i + 1)]
            *tensors, training, stride, padding, dilation, groups, need_dw, group = given
            output = ConvOutput(*tensors, training, ConvGeometry(stride, padding, dilation, groups), need_dw, group)
            outputs.append(output.shared() if group else output)
        sums, dws = BACKENDS[backend].convolve_backward(
            source, act if act.numel() else None, mask if mask.numel() else None, outputs, dact, need_dx
        )
        results = [nothing(source.x, t) if r is None else r for r, t in zip(sums, self._sum_dtypes(source), strict=True)]
        results += [nothing(o.weight, o.weight.dtype) if dw is None else dw for dw, o in zip(dws, outputs, strict=True)]
        return tuple(results)

    def backward_fake(self, *args) -> tuple[Tensor, ...]:
        """The shapes and layouts of `backward_op`."""
        *args, dact, need_dx, backend = args
        source, _, rest = Source(*args[: self.source_arity]), *self._split(args)
        x = source.x
        given = (need_dx, need_dx and self.pending, need_dx and self.pending, need_dx and source.residual_mean is not None)
        results = []
        for i, (wanted, dtype) in enumerate(zip(given, self._sum_dtypes(source), strict=True)):
            shape = x.shape if i == 0 else x.shape[1:2]
            results.append((empty_nhwc(x, shape) if i == 0 else x.new_empty(shape, dtype=dtype)) if wanted else nothing(x, dtype))
        for i in range(self.convs):
            at = OUTPUT_ARITY * i
            dz, weight, need_dw = rest[at], rest[at + 6], rest[at + 13]
            wanted = need_dw and dz is not None
            results.append(torch.empty_like(weight) if wanted else nothing(weight, weight.dtype))
        return tuple(results)

    def _split(self, args: list) -> tuple[list, list]:
        """(act and mask, the rest) of the backward's arguments behind the source."""
        return args[self.source_arity : self.source_arity + 2], args[self.source_arity + 2 :]

    @staticmethod
    def _sum_dtypes(source: Source) -> tuple[torch.dtype, ...]:
        return source.x.dtype, *(accumulate_dtype(source.x.dtype),) * 3

    # ---- autograd ----------------------------------------------------------------------------------------------------

    def setup_context(self, ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        """Save, for each convolution, y with its statistics; the raw input; a raw residual; act; one bit a value of mask."""
        ctx.set_materialize_grads(False)  # an unused act must not cost a tensor of zeros
        *args, ctx.backend = inputs
        source, convs = self.unpack(tuple(args))
        outputs = [Pending(*output[6 * i : 6 * i + 6]) for i in range(self.convs)]
        act = output[6 * self.convs] if self.pending else source.x
        mask = output[-1] if self.residual else None
        ctx.mark_non_differentiable(
            *(t for o in outputs for t in (o.var, o.scale, o.bias)),
            *([act] if self.pending and not self.residual else []),
            *([mask] if self.residual else []),
        )
        raw = source.residual_mean is not None
        kept = source if raw else source._replace(residual=None)
        saved = [*kept, act, mask]
        ctx.statics = []
        for o, conv in zip(outputs, convs, strict=True):
            saved += [o.y, o.mean, o.invstd, conv.weight, conv.norm.gamma]
            ctx.statics.append((conv.norm.training, *conv.geometry, conv.norm.group))
        ctx.has_residual = source.residual is not None
        ctx.parameter_dtypes = [
            tuple(None if p is None else p.dtype for p in (conv.norm.gamma, conv.norm.beta)) for conv in convs
        ]
        ctx.save_for_backward(*saved)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple:
        """The gradients of the flat arguments, from those of the flat results."""
        tensors = ctx.saved_tensors  # read once: a checkpoint makes them anew each time
        source, (act, mask, *saved) = Source(*tensors[:10]), tensors[10:]
        needs = ctx.needs_input_grad
        dact = channels_last(grads[6 * self.convs]) if self.residual else None
        outputs, parameter_grads = [], []
        for i in range(self.convs):
            dz, s1, s2 = grads[6 * i : 6 * i + 3]
            at = self.source_arity + CONV_ARITY * i
            *statics, group = ctx.statics[i]
            outputs += [channels_last(dz), s1, s2, *saved[5 * i : 5 * i + 5], *statics, needs[at], group]
            parameter_grads.append(
                [None if g is None or not needed else g.to(dtype)
                 for g, needed, dtype in zip((s2, s1), needs[at + 1 : at + 3], ctx.parameter_dtypes[i], strict=True)]
            )  # fmt: skip
        need_dx = any(needs[: self.source_arity])
        if dact is None and all(output is None for output in outputs[::OUTPUT_ARITY]):
            return (None,) * len(needs)
        mask = nothing(act, torch.uint8) if mask is None else mask
        results = call(f"{self.name}_backward")(*source[: self.source_arity], act, mask, *outputs, dact, need_dx, ctx.backend)
        (dx, s1, s2, residual_s2), dws = results[:4], results[4:]
        dx, s1, s2 = (dx, s1, s2) if need_dx else (None, None, None)
        result = [dx]
        if self.pending:
            result += [s1, s2, None, None]
        if self.residual:  # a residual shares dz, and where it is raw, s1
            raw = source.residual_mean is not None
            result += [dx if ctx.has_residual else None, s1 if raw else None, residual_s2 if raw else None, None, None]
        for i in range(self.convs):
            used, wanted = outputs[OUTPUT_ARITY * i] is not None, needs[self.source_arity + CONV_ARITY * i]
            result += [dws[i] if used and wanted else None, *parameter_grads[i], *(None,) * (CONV_ARITY - 3)]
        return (*result, *(None,) * (len(needs) - len(result)))


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
    define(_operator.backward_schema, _operator.backward_op, _operator.backward_fake)
    define(_operator.schema, _operator.forward, _operator.fake, _operator.setup_context, _operator.backward)
