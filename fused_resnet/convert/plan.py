"""A traced forward as steps on the operators: convolutions with the norms behind them; norms and sums stay pending until they are read.

A step computes one value of the forward, in the forward's order. It is told beforehand who else reads what it reads. All else is decided
when it runs, by what it finds, a tensor or a value that is pending. What the operators have no step for is called as it stands in the
forward, on tensors.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from .. import ops
from ..nn import Activation, Block
from ..nn.activation import BatchStatistics, update_running_statistics
from ..nn.block import to_nhwc
from ..nn.chain import advance
from ..nn.folded import inferring
from ..nn.modules import (
    autocast_dtype,
    batch_statistics,
    geometry,
    is_global_avg_pool,
    is_max_pool,
    is_nothing,
    observed,
)
from ..ops import Conv, Norm, Pending
from ..ops.checks import output_size
from .kinds import is_conv_like, is_norm_like, is_relu_like, norm_forward, taken, why_no_conv
from .trace import IN_PLACE, NORM_OF, Traced, calls, type_of


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
        x, conv = self.x, self.conv
        return ops.conv_affine_act(x, conv.weight.to(x.dtype), geometry(conv), None, conv.bias, self.residual, self.relu)


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
        """A value, made where it was pending."""
        value = self.values[index]
        if type(value) is Lazy:
            value = self.values[index] = ops.norm_add_act(*value)
        elif type(value) is LazyConv:
            value = self.values[index] = value.make()
        return value

    def make_all(self) -> None:
        """Make whatever is pending, before somebody may write to what it reads."""
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


class Plan:
    """The steps of a forward."""

    def __init__(self, traced: Traced):
        self.traced = traced
        self.pairs: list[Pair] = []
        self.folds: list[Pair] = []  #: those, and some that the operators can't run
        self.alone: list[nn.Module] = []  #: convolutions of an activation that is made on the way, without a norm
        self.affine: list[nn.Module] = []  #: convolutions with a bias and without a norm, which is one call in inference
        self.refused: dict[nn.Module, str] = {}  #: convolutions that no step fuses, and why
        self.calls: list[nn.Module] = []  #: modules that are called as they are
        self.blocks: list[Block] = []
        drop_identities(traced)
        self.nodes = list(traced.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        *steps, output = self.nodes
        self.output = self._template(output.args[0])
        self.steps = self._steps(steps)
        self._trains = bool(self.pairs) or any(block.fusible() or any(map(observed, block.modules())) for block in self.blocks)

    @property
    def fuses(self) -> bool:
        """Whether an operator has anything to do in it."""
        return self._trains or any(not conv.training for conv in self.affine)

    def run(self, args: Sequence[Tensor]) -> Any:
        """What the forward makes of these tensors."""
        run = Run(len(self.nodes))
        run.values[: len(args)] = args
        for step in self.steps:
            run.values[step.index] = step.run(step, run)
            for index in step.over:
                run.values[index] = None
        out = filled(self.output, run)
        update_running_statistics(run.statistics)
        return out

    # ---- how steps are made of nodes ---------------------------------------------------------------------------------

    def _module(self, node: Node) -> nn.Module | None:
        return self.traced.modules[node.target] if node.op == "call_module" else None

    def _steps(self, nodes: list[Node]) -> list[Step]:
        convs = {norm: conv for norm in nodes if (conv := self._conv_before(norm)) is not None}
        acts = {relu: norm for relu in nodes if (norm := self._norm_before(relu)) is not None and norm not in convs}
        within = {*convs.values(), *acts.values()}
        partners, last = self._partners(convs, nodes), self._last_reads(nodes, within)
        steps = []
        for node in nodes:
            if node.op == "placeholder" or node in within:
                continue
            if node in convs or node in partners or node in partners.values():
                step = self._pair_step(node, convs, partners.get(node))
            elif node in acts:
                norm = acts[node]
                step = Step(run_norm_act, self.order[node], self._template(norm.args), {}, self._module(norm))
            else:
                step = self._other_step(node)
            steps.append(step._replace(over=tuple(self.order[n] for n in last.get(node, ()))))
        return steps

    def _conv_before(self, node: Node) -> Node | None:
        """The convolution whose output `node` alone reads, where that is a norm; the convolution then runs where the norm stands."""
        before = self._only_input(node)
        conv, norm = None if before is None else self._module(before), self._module(node)
        if not (isinstance(conv, nn.Conv2d) and is_norm_like(norm)) or self._only_input(before) is None:
            return None
        if len(before.users) == 1:
            self.folds.append(Pair(conv, norm))
        if not is_conv_like(conv):
            return None
        if len(before.users) != 1:
            self.refused[conv] = "its output is read by others than the norm"
        elif self._writes_between(before, node):
            self.refused[conv] = "something between it and its norm may write to what it reads"
        else:
            self.pairs.append(Pair(conv, norm))
            return before
        return None

    def _norm_before(self, node: Node) -> Node | None:
        """The norm whose output `node`, a ReLU, alone reads: of a sum or a concatenation, as in networks that normalise first."""
        before = self._only_input(node) if self._is_relu(node) else None
        norm = None if before is None else self._module(before)
        fits = is_norm_like(norm) and not isinstance(norm, nn.SyncBatchNorm) and self._only_input(before) is not None
        return before if fits and len(before.users) == 1 and not self._writes_between(before, node) else None

    @staticmethod
    def _only_input(node: Node) -> Node | None:
        """What a node reads, where that is one value and nothing else."""
        return node.args[0] if len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs else None

    def _is_relu(self, node: Node) -> bool:
        module = self._module(node)
        return is_relu_like(module) if module is not None else calls(node, "relu", "relu_")

    def _partners(self, convs: dict[Node, Node], nodes: list[Node]) -> dict[Node, Node]:
        """Two convolutions of one value, each by its norm or, without one, by itself: first -> second. One node then has both gradients."""
        readers: dict[Node, list[Node]] = {}
        for node in nodes:
            module = self._module(node)
            bare = node not in convs.values() and is_conv_like(module) and module.bias is None
            if node in convs or (bare and self._only_input(node) is not None):
                readers.setdefault(convs.get(node, node).args[0], []).append(node)
        pairs = [found[:2] for found in readers.values() if len(found) > 1 and any(node in convs for node in found[:2])]
        return {one: two for one, two in pairs if not self._writes_between(one, two)}

    def _last_reads(self, nodes: list[Node], within: set[Node]) -> dict[Node, list[Node]]:
        """Of each node, what nobody reads after it. What is within another step reads where that stands."""
        last: dict[Node, list[Node]] = {}
        for node in nodes:
            readers = [next(iter(user.users)) if user in within else user for user in node.users]
            if readers and all(user.op != "output" for user in readers):
                last.setdefault(max(readers, key=self.order.__getitem__), []).append(node)
        return last

    def _pair_step(self, node: Node, convs: dict[Node, Node], partner: Node | None) -> Step:
        read = convs.get(node, node).args[0]
        along = None if partner is None else (self.order[partner], self._pair(partner, convs))
        alone = len(read.users) == (1 if partner is None else 2)
        return Step(run_pair, self.order[node], (Ref(self.order[read]),), {}, alone=alone, pair=self._pair(node, convs), partner=along)

    def _pair(self, node: Node, convs: dict[Node, Node]) -> Pair:
        if node in convs:
            return Pair(self._module(convs[node]), self._module(node))
        self.alone.append(self._module(node))
        return Pair(self._module(node), None)

    def _other_step(self, node: Node) -> Step:
        module = self._module(node)
        call = node.target if module is None else module
        step = Step(run_call, self.order[node], self._template(node.args), self._template(node.kwargs), call, writes=self._may_write(node))
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            return step._replace(run=run_read, call=(self.traced.root.get_submodule(owner), name))
        if calls(node, "view"):
            return step._replace(run=run_view)
        read = self._only_input(node)
        alone = read is not None and len(read.users) == 1
        if self._is_relu(node) and read is not None:
            return step._replace(run=run_relu, alone=alone)
        if calls(node, "add", "add_", "iadd") and len(node.args) == 2 and not node.kwargs and all(isinstance(a, Node) for a in node.args):
            one, two = node.args
            return step._replace(run=run_add, alone=tuple(one is not two and len(a.users) == 1 for a in node.args))
        return step if module is None else self._module_step(node, step, module, alone)

    def _module_step(self, node: Node, step: Step, module: nn.Module, alone: bool) -> Step:
        if isinstance(module, Block) and self._only_input(node) is not None:
            self.blocks.append(module)
            return step._replace(run=run_advance, alone=alone)
        if node.target.startswith(NORM_OF):
            return step._replace(call=partial(norm_forward, module))
        self.calls.append(module)
        if alone and (is_max_pool(module) or is_global_avg_pool(module)):
            return step._replace(run=run_pool)
        if isinstance(module, nn.modules.conv._ConvNd):
            if not is_conv_like(module):
                self.refused[module] = why_no_conv(module)
            elif alone and module.bias is None and self._is_relu(node.args[0]):
                self.alone.append(module)
                return step._replace(run=run_conv)
            else:
                self.refused.setdefault(module, self._why_alone(node))
                if module.bias is not None and self._only_input(node) is not None:
                    self.affine.append(module)
                    return step._replace(run=run_affine)
        return step

    def _why_alone(self, node: Node) -> str:
        """Why a convolution has no norm that could be fused to it."""
        followers = [self._module(user) for user in node.users]
        norms = [m for m in followers if m is not None and ("norm" in type_of(m).__name__.lower() or type_of(m).__name__.startswith("BN"))]
        if norms:
            return f"the norm behind it is {type_of(norms[0]).__name__}" + (", which has a hook" if observed(norms[0]) else "")
        return "no batch norm follows it"

    def _writes_between(self, one: Node, two: Node) -> bool:
        return any(self._may_write(node) for node in self.nodes[self.order[one] + 1 : self.order[two]])

    def _may_write(self, node: Node) -> bool:
        """Whether a node may write to a value that others read as well: by its name, or as a module that is not PyTorch's."""
        module = self._module(node)
        if module is not None:
            known = is_norm_like(module) or is_conv_like(module) or isinstance(module, Block)
            if not known and not type_of(module).__module__.startswith("torch.nn."):
                return True
            writes = bool(getattr(module, "inplace", False))
        elif node.op in ("call_method", "call_function"):
            name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
            flagged = node.kwargs.get("inplace") or "out" in node.kwargs or (name in _HAVE_FLAG and True in node.args[1:])
            writes = bool(flagged or name in _WRITES or (name.endswith("_") and not name.endswith("__")))
        else:
            return False
        return writes and not self._is_fresh(node.args[0] if node.args else None)

    def _is_fresh(self, value: Any) -> bool:
        """Whether a value shares its memory with no other, and one node alone reads it."""
        if not isinstance(value, Node) or len(value.users) != 1:
            return False
        module = self._module(value)
        return is_norm_like(module) or is_conv_like(module) or calls(value, "add")

    def _template(self, a: Any) -> Any:
        if isinstance(a, Node):
            return Ref(self.order[a])
        if isinstance(a, dict):
            return {key: self._template(value) for key, value in a.items()}
        if isinstance(a, tuple | list):
            return (list if isinstance(a, list) else tuple)(self._template(item) for item in a)
        if isinstance(a, slice):
            return slice(*map(self._template, (a.start, a.stop, a.step)))
        return a


def drop_identities(traced: Traced) -> None:
    """Take out the nodes of nn.Identity: who reads them reads what they read."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and len(node.args) == 1 and is_nothing(traced.modules[node.target]):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


_HAVE_FLAG = ("relu", "relu6", "dropout", "dropout2d", "elu", "hardtanh", "leaky_relu", "silu", "hardswish", "selu", "celu", "mish")
_WRITES = frozenset((*IN_PLACE, "iconcat", "setitem"))


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


# ---- what steps do --------------------------------------------------------------------------------------------------------


def run_call(step: Step, run: Run) -> Any:
    """The function, method or module itself, on tensors."""
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
    """A parameter or buffer."""
    return getattr(*step.call)


def run_relu(step: Step, run: Run) -> Any:
    """Left to whoever reads it, if nobody else reads what it reads."""
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
    """A norm of a tensor, and its ReLU."""
    norm, x = step.call, run.tensor(step.args[0].index)
    if not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0:
        return torch.relu(norm_forward(norm, x))  # which raises PyTorch's own errors
    act, out = ops.norm_act(to_nhwc(x), taken(norm))
    run.statistics += batch_statistics(norm, out)
    return act


def run_pool(step: Step, run: Run) -> Any:
    """A pool, of an activation that is made on the way."""
    value = run.values[step.args[0].index]
    if type(value) is Lazy and value.relu:
        return advance(step.call, Activation(value.x, value.residual)).finish()
    return run_call(step, run)


def run_advance(step: Step, run: Run) -> Any:
    """A block, which leaves its output pending."""
    index = step.args[0].index
    value = run.values[index]
    pending = step.alone and type(value) is Lazy and value.relu
    out = advance(step.call, Activation(value.x, value.residual) if pending else Activation(run.tensor(index)))
    run.statistics += out.statistics
    return Lazy(out.x, out.residual, True) if isinstance(out.x, Pending) else out.x


def run_conv(step: Step, run: Run) -> Any:
    """A convolution without a norm, of an activation that is made on the way and that nobody else reads."""
    value, conv = run.values[step.args[0].index], step.call
    if not (type(value) is Lazy and value.relu and value.residual is None and takes(value, conv)):
        return run_call(step, run)
    return ops.norm_act_conv(value.x, layer(Pair(conv, None), value.x.y.dtype)).y


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
    first, *second = (out.y if pair.norm is None else Lazy(out) for pair, out in zip(pairs, made, strict=True))
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
    return Conv(weight if weight.dtype == dtype else weight.to(dtype), norm if bias is None else with_bias(norm, bias), geometry(conv))


def with_bias(norm: Norm, bias: Tensor) -> Norm:
    """The norm of y that gives the norm of y + bias: the batch's mean takes the bias away again, so that its gradient is zero."""
    if norm.training:
        shift = bias * 0
    else:
        shift = bias * (norm.running_var + norm.eps).rsqrt()
        shift = shift if norm.gamma is None else shift * norm.gamma
    return norm._replace(beta=shift if norm.beta is None else norm.beta + shift)


def told(pair: Pair, out: Pending) -> tuple[BatchStatistics, ...]:
    """What a convolution's output tells its norm's running statistics."""
    statistics = () if pair.norm is None else batch_statistics(pair.norm, out)
    bias = pair.conv.bias
    return statistics if bias is None else tuple(s._replace(mean=s.mean + bias.detach()) for s in statistics)
