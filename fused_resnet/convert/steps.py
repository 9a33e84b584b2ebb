"""Runs the steps of a plan: values that are not yet made, and one function for each kind of step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import Activation
from ..nn.activation import BatchStatistics
from ..nn.block import to_nhwc
from ..nn.chain import advance
from ..nn.folded import conv_act, inferring
from ..nn.modules import (
    autocast_dtype,
    batch_statistics,
    geometry,
)
from ..ops import Conv, Norm, Pending
from ..problem import output_size
from .kinds import norm_forward, taken


class Lazy(NamedTuple):
    """relu(norm(x) + residual), or without relu, not yet made."""

    x: Pending
    residual: Tensor | Pending | None = None
    relu: bool = False


class LazyConv(NamedTuple):
    """relu(conv(x) + residual), or without relu, not yet made: where only numbers are wanted, of a convolution with a bias."""

    x: Tensor
    conv: nn.Conv2d
    residual: Tensor | None = None
    relu: bool = False

    def make(self) -> Tensor:
        """The convolution, in one call of the backend."""
        return conv_act(self.x, self.conv, self.residual, self.relu)


def is_lazy(value: Any) -> bool:
    """Whether a value is not yet made."""
    return type(value) is Lazy or type(value) is LazyConv


class Ref(NamedTuple):
    """In the arguments of a step, the value of another."""

    index: int


class Pair(NamedTuple):
    """A convolution and the norm that alone reads its output; None where no norm does."""

    conv: nn.Conv2d
    norm: nn.Module | None


class Run:
    """One forward: the values that are still to be read, and what norms are to be told."""

    def __init__(self, size: int):
        self.values: list[Any] = [None] * size
        self.statistics: tuple[BatchStatistics, ...] = ()

    def tensor(self, index: int) -> Any:
        """A value as a tensor: made now, if it was pending."""
        value = self.values[index]
        if type(value) is Lazy:
            value = self.values[index] = ops.norm_add_act(*value)
        elif type(value) is LazyConv:
            value = self.values[index] = value.make()
        return value

    def make_all(self) -> None:
        """Make every pending value, before a step may write to what it reads."""
        for index in range(len(self.values)):
            self.tensor(index)


class Step(NamedTuple):
    """How a value is made: `run(step, run)`."""

    run: Callable[["Step", Run], Any]
    index: int
    args: Any = ()
    kwargs: Any = None
    call: Any = None  #: the module, function or name of a method
    alone: Any = False  #: whether nobody else reads what it reads; of a sum, of each of the two
    pair: Pair | None = None
    partner: tuple[int, Pair] | None = None  #: another convolution of the same value, that is run along
    writes: bool = False  #: whether it may write to what it reads, and others have read or will read
    over: tuple[int, ...] = ()  #: values that nobody reads after this step


def filled(template: Any, run: Run) -> Any:
    """A template with values in place of references."""
    kind = type(template)
    if kind is Ref:
        return run.tensor(template.index)
    if kind is tuple or kind is list:
        return kind([filled(item, run) for item in template])
    if kind is dict:
        return {key: filled(value, run) for key, value in template.items()}
    if kind is slice:
        return slice(filled(template.start, run), filled(template.stop, run), filled(template.step, run))
    return template


def run_call(step: Step, run: Run) -> Any:
    """Calls the function, method or module itself, on tensors."""
    if step.writes:
        run.make_all()
    args, kwargs = filled(step.args, run), filled(step.kwargs, run)
    if type(step.call) is str:
        return getattr(args[0], step.call)(*args[1:], **kwargs)
    return step.call(*args, **kwargs)


def run_view(step: Step, run: Run) -> Any:
    """A view of what the operators give in channels_last, where PyTorch's modules would give it in the order that a view wants."""
    x, *sizes = filled(step.args, run)
    if isinstance(x, Tensor) and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    return x.view(*sizes, **filled(step.kwargs, run))


def run_read(step: Step, run: Run) -> Any:
    """Reads a parameter or buffer."""
    return getattr(*step.call)


def run_relu(step: Step, run: Run) -> Any:
    """Leaves a ReLU to its reader, if nothing else reads the ReLU's input."""
    value = run.values[step.args[0].index]
    if step.alone and is_lazy(value) and not value.relu:
        return value._replace(relu=True)
    return run_call(step, run)


def run_add(step: Step, run: Run) -> Any:
    """Left to whoever reads it, where one of the two is norm(x) that nobody else reads; the first, if it is added to in place."""
    values = [run.values[ref.index] for ref in step.args]
    in_place = step.call == "add_" or getattr(step.call, "__name__", "") in ("iadd", "add_")
    free = [alone and is_lazy(v) and v.residual is None and not v.relu for alone, v in zip(step.alone, values, strict=True)]
    main = 0 if free[0] else 1
    if free[main] and not (in_place and main):
        value, other = values[main], values[1 - main]
        raw = type(value) is Lazy and type(other) is Lazy and free[1 - main]
        other = other.x if raw else run.tensor(step.args[1 - main].index)
        added = other.y if raw else other
        if isinstance(added, Tensor) and (added.shape, added.dtype, added.device) == like(value):
            return value._replace(residual=other if raw else to_nhwc(other))
    return run_call(step, run)


def like(value: Lazy | LazyConv) -> tuple[torch.Size, torch.dtype, torch.device]:
    """Shape, dtype and device of what it will be."""
    if type(value) is Lazy:
        return value.x.y.shape, value.x.y.dtype, value.x.y.device
    x, conv = value.x, value.conv
    sizes = zip(x.shape[2:], conv.kernel_size, *geometry(conv)[:3], strict=True)
    return torch.Size((x.shape[0], conv.out_channels, *(output_size(*size) for size in sizes))), x.dtype, x.device


def run_norm_act(step: Step, run: Run) -> Any:
    """Runs a norm of a tensor, and its ReLU."""
    norm, x = step.call, run.tensor(step.args[0].index)
    if not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0:
        return torch.relu(norm_forward(norm, x))  # which raises PyTorch's own errors
    act, out = ops.norm_act(to_nhwc(x), taken(norm))
    run.statistics += batch_statistics(norm, out)
    return act


def run_pool(step: Step, run: Run) -> Any:
    """Runs a pool, and makes its activation on the way."""
    value = run.values[step.args[0].index]
    if type(value) is Lazy and value.relu:
        return advance(step.call, Activation(value.x, value.residual)).finish()
    return run_call(step, run)


def run_advance(step: Step, run: Run) -> Any:
    """Runs a block, which leaves its output pending."""
    index = step.args[0].index
    value = run.values[index]
    pending = step.alone and type(value) is Lazy and value.relu
    out = advance(step.call, Activation(value.x, value.residual) if pending else Activation(run.tensor(index)))
    run.statistics += out.statistics
    return Lazy(out.x, out.residual, True) if isinstance(out.x, Pending) else out.x


def run_conv(step: Step, run: Run) -> Any:
    """Runs a convolution without a norm. It makes its activation on the way, which nothing else reads."""
    value, conv = run.values[step.args[0].index], step.call
    if not (type(value) is Lazy and value.relu and value.residual is None and takes(value, conv)):
        return run_call(step, run)
    return raw(conv, ops.norm_act_conv(value.x, layer(Pair(conv, None), value.x.y.dtype)))


def raw(conv: nn.Conv2d, out: Pending) -> Tensor:
    """conv(x) of a convolution without a norm. It had no bias when the plan was made, and may have been given one since."""
    return out.y if conv.bias is None else out.y + conv.bias.to(out.y.dtype)[:, None, None]


def run_affine(step: Step, run: Run) -> Any:
    """A convolution with a bias, which takes along what follows it where only numbers are wanted."""
    x, conv = run.tensor(step.args[0].index), step.call
    if conv.training or not takes(x, conv) or not inferring(x, (conv,)):
        return run_call(step, run)
    return LazyConv(to_nhwc(x.to(autocast_dtype(x) or x.dtype)), conv)


def run_pair(step: Step, run: Run) -> Any:
    """A convolution and its norm, of a tensor or of an activation that is made on the way; and a second convolution of the same."""
    if run.values[step.index] is not None:  # run along with an earlier one
        return run.values[step.index]
    index = step.args[0].index
    value = run.values[index]
    if type(value) is Lazy and not value.relu:
        value = run.tensor(index)
    if not takes(value, step.pair.conv):
        out = step.pair.conv(run.tensor(index))
        return out if step.pair.norm is None else norm_forward(step.pair.norm, out)
    both = step.partner is not None and takes(value, step.partner[1].conv)
    pairs = [step.pair, step.partner[1]] if both else [step.pair]
    if type(value) is Lazy:
        layers = [layer(pair, value.x.y.dtype) for pair in pairs]
        if both:
            *made, act = ops.norm_add_act_conv_pair(value.x, value.residual, *layers)
        elif step.alone and step.partner is None and value.residual is None:
            made, act = [ops.norm_act_conv(value.x, layers[0])], None
        else:
            *made, act = ops.norm_add_act_conv(value.x, value.residual, layers[0])
        run.values[index] = act
    else:
        x = to_nhwc(value.to(autocast_dtype(value) or value.dtype))
        layers = [layer(pair, x.dtype) for pair in pairs]
        made = ops.conv_stats_pair(x, *layers) if both else [ops.conv_stats(x, layers[0])]
    for pair, out in zip(pairs, made, strict=True):
        run.statistics += told(pair, out)
    first, *second = (raw(pair.conv, out) if pair.norm is None else Lazy(out) for pair, out in zip(pairs, made, strict=True))
    if both:
        run.values[step.partner[0]] = second[0]
    return first


def takes(value: Any, conv: nn.Conv2d) -> bool:
    """Whether the operators convolve this value, where PyTorch's module would."""
    x, weight = value.x.y if type(value) is Lazy else value, conv.weight
    if not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0 or x.shape[1] != conv.in_channels or x.device != weight.device:
        return False
    return x.dtype == weight.dtype or autocast_dtype(x) is not None


def layer(pair: Pair, dtype: torch.dtype) -> Conv:
    """A convolution and its norm as an operator takes them. A bias of the convolution goes into the norm's."""
    conv, norm = pair
    weight, bias = conv.weight, conv.bias
    if norm is None:  # one that changes nothing, exactly
        norm = Norm(None, None, weight.new_zeros(conv.out_channels), weight.new_ones(conv.out_channels), False, 0.0)
    else:
        norm = taken(norm)
    return Conv(
        weight if weight.dtype == dtype else weight.to(dtype),
        norm if bias is None or pair.norm is None else with_bias(norm, bias),
        geometry(conv),
    )


def with_bias(norm: Norm, bias: Tensor) -> Norm:
    """The norm of y that gives the norm of y + bias: the batch's mean takes the bias away again, so that its gradient is zero."""
    if norm.training:
        shift = bias * 0
    else:
        shift = bias * (norm.running_var + norm.eps).rsqrt()
        shift = shift if norm.gamma is None else shift * norm.gamma
    return norm._replace(beta=shift if norm.beta is None else norm.beta + shift)


def told(pair: Pair, out: Pending) -> tuple[BatchStatistics, ...]:
    """The statistics of a convolution's output, for its norm's running ones."""
    statistics = () if pair.norm is None else batch_statistics(pair.norm, out)
    bias = pair.conv.bias
    return statistics if bias is None else tuple(s._replace(mean=s.mean + bias.detach()) for s in statistics)
