"""A traced forward as steps on the operators: convolutions with the norms behind them; norms and sums stay pending until they are read.

A step computes one value of the forward, in the forward's order. It is told beforehand who else reads what it reads. All else is decided
when it runs, by what it finds, a tensor or a value that is pending. What the operators have no step for is called as it stands in the
forward, on tensors.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from ..nn import Block
from ..nn.activation import update_running_statistics
from ..nn.modules import (
    is_global_avg_pool,
    is_max_pool,
    is_nothing,
    observed,
)
from .kinds import is_conv_like, is_norm_like, is_relu_like, norm_forward, why_not_conv
from .steps import (
    Pair,
    Ref,
    Run,
    Step,
    filled,
    run_add,
    run_advance,
    run_affine,
    run_call,
    run_conv,
    run_norm_act,
    run_pair,
    run_pool,
    run_read,
    run_relu,
    run_view,
)  # fmt: skip
from .trace import IN_PLACE, NORM_OF, Traced, calls, type_of


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
        """Whether an operator runs any of the steps."""
        return self._trains or any(not conv.training for conv in self.affine)

    def run(self, args: Sequence[Tensor]) -> Any:
        """The forward's result for these tensors."""
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
        """The one value that a node reads; None where it reads more."""
        alone = len(node.args) == 1 and isinstance(node.args[0], Node)
        # F.relu has always the keyword, which is no value.
        return node.args[0] if alone and (not node.kwargs or (calls(node, "relu") and [*node.kwargs] == ["inplace"])) else None

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
        """For each node the values that nobody reads after it. A node within another step reads where that step stands."""
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
                self.refused[module] = why_not_conv(module)
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
    """Take out the nodes of nn.Identity. Their readers then read what they read."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and len(node.args) == 1 and is_nothing(traced.modules[node.target]):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


_HAVE_FLAG = ("relu", "relu6", "dropout", "dropout2d", "elu", "hardtanh", "leaky_relu", "silu", "hardswish", "selu", "celu", "mish")
_WRITES = frozenset((*IN_PLACE, "iconcat", "setitem"))
