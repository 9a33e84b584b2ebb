"""What a training step of any module is made of: its ATen operators, traced without a GPU, a device's memory, or numbers.

`trace` runs a module forward and backward on fake tensors and writes down every operator: its layer, its FLOPs, the tensors that it
reads and writes, by the counting rules of `roofline`. Batch norm is two each way: statistics and apply, reduce and apply. `fusion` makes
fewer kernels of them.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..backends import backend
from ..problem import ConvProblem, Kernel
from ..roofline import MASTER_BYTES, optimizer_step
from .units import OUTSIDE, Units

ATEN = torch.ops.aten
HEAVY, POINTWISE, REDUCTION = "heavy", "pointwise", "reduction"
NORMS = {ATEN.native_batch_norm, ATEN._native_batch_norm_legit, ATEN.native_layer_norm, ATEN.native_group_norm}
NORM_BACKWARDS = {ATEN.native_batch_norm_backward, ATEN.native_layer_norm_backward, ATEN.native_group_norm_backward}
#: Each makes a value of some, and can join the pass that makes its operand; a max pool's are a window.
REDUCTIONS = {ATEN.mean, ATEN.sum, ATEN.var_mean, ATEN.max_pool2d_with_indices}
#: They write where they read, or next to it, and can join the pass that reads their result.
ALIGNED = {ATEN._to_copy, ATEN.max_pool2d_with_indices_backward}
#: An operator on tensors of no more elements is not worth a word: a counter, a loss.
SCALAR = 1


@dataclass
class Op:
    """A kernel in the making. Values are tensors by number; `reads` and `writes` hold the bytes of each."""

    layer: str
    work: str
    kind: str
    backward: bool
    flops: int = 0
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    sums: set[int] = field(default_factory=set)  #: of `writes`, what is not known before the last of the operands was read

    @property
    def kernel(self) -> Kernel:
        """As `roofline` counts."""
        return Kernel(self.layer, self.work, self.flops, sum(self.reads.values()) + sum(self.writes.values()))


@dataclass
class Trace:
    """A training step as operators in the order of their execution."""

    ops: list[Op]
    batch: int
    itemsize: int  #: bytes of an activation's element
    layer_parameters: dict[str, int]  #: trained numbers of each layer
    shapes: dict[str, tuple[int, ...]]  #: of each layer, in the order of the forward, what its first operator makes
    sizes: dict[int, int]  #: bytes of each value
    fixed: set[int]  #: the values that are parameters and buffers
    masks: dict[int, int]  #: of a ReLU's result, as its backward reads it: the value of its mask, a bit an element
    covered: dict[int, int]  #: of a convolution's input gradient: the bytes under some window; zeros are elsewhere
    taps: dict[int, int]  #: of a max pool's int64 index: the value of the same in a byte each, which holds a window's tap

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(self.layer_parameters.values())

    def layer_flops(self, layer: str) -> int:
        """FLOPs of a layer's forward, whole batch."""
        return sum(op.flops for op in self.ops if op.layer == layer and not op.backward)

    @property
    def forward_flops(self) -> int:
        """FLOPs of the forward, whole batch."""
        return sum(op.flops for op in self.ops if not op.backward)

    def saved_layers(self, ops: Iterable[Op]) -> dict[str, int]:
        """Bytes of activations that these operators keep from forward to backward, whole batch, by the layer that makes them.

        What no layer makes, such as the images, counts to the first that reads it.
        """
        ops = list(ops)
        forward = [op for op in ops if not op.backward]
        read = {value for op in ops if op.backward for value in op.reads} - self.fixed
        makers = {value: op.layer for op in reversed(forward) for value in op.reads}
        makers |= {value: op.layer for op in forward for value in op.writes}
        saved: dict[str, int] = {}
        for value in read & makers.keys():
            saved[makers[value]] = saved.get(makers[value], 0) + self.sizes[value]
        return saved

    def saved_bytes(self, ops: Iterable[Op]) -> int:
        """Bytes of activations that these operators keep from forward to backward, whole batch."""
        return sum(self.saved_layers(ops).values())

    def kernels(self, ops: Iterable[Op]) -> list[Kernel]:
        """These operators as kernels, with SGD's step behind them."""
        return [*(op.kernel for op in ops), optimizer_step(self.parameters, self.itemsize)]


class _Recorder(TorchDispatchMode):
    """Writes down what runs below autograd. An operator of backward belongs to the layer whose forward made its node."""

    sees_fused_operators = True

    def __init__(self, fixed: Iterable[Tensor], units: Units):
        super().__init__()
        self.units, self.backward, self.layer = units, False, OUTSIDE
        self.ops: list[Op] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[int, int] = {}
        self.masks: dict[int, int] = {}
        self.covered: dict[int, int] = {}
        self.taps: dict[int, int] = {}
        self._alive, self._values, self._layers = [], {}, {}
        self.fixed = {self._value(t) for t in fixed}

    def _value(self, tensor: Tensor, new: bool = False) -> int:
        """The number of what a tensor holds now. A view is its base; who writes in place makes a new value."""
        storage = tensor.untyped_storage()
        if new or storage._cdata not in self._values:
            self._alive.append(tensor)  # else another tensor might get the same address
            self._values[storage._cdata] = self._fresh(self._bytes(tensor))
        return self._values[storage._cdata]

    def _fresh(self, size: int) -> int:
        self.sizes[len(self.sizes)] = size
        return len(self.sizes) - 1

    @staticmethod
    def _bytes(tensor: Tensor) -> int:
        """What is moved to read all of it: not more than there is, where it was expanded."""
        return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        reads = {self._value(t): self._bytes(t) for t in inputs}
        result = function(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        node = torch._C._current_autograd_node()
        own = node is None or "AccumulateGrad" not in node.name()  # it copies gradients of parameters into their strides
        if own and inputs and outputs and not function.is_view and any(t.numel() > SCALAR for t in (*inputs, *outputs)):
            self.layer = self._layer_of(node, function, inputs)
            if not self.backward:
                self.shapes.setdefault(self.layer, tuple(outputs[0].shape))
            self._record(function, args, reads, outputs, result)
        return result

    def _layer_of(self, node, function, inputs: list[Tensor]) -> str:
        if not self.backward:
            # The node of an operator is made before the operator gets here.
            unit = self.units.of(function, inputs)
            self._layers.setdefault(torch._C._autograd._get_sequence_nr() - 1, unit)
            return unit
        # Where gradients are added there is no node: they belong to the layer whose backward made the last of them.
        return self.layer if node is None else self._layers.get(node._sequence_nr(), self.layer)

    def _add(self, work: str, kind: str, reads: dict[int, int], writes: dict[int, int], flops: int = 0) -> None:
        self.ops.append(Op(self.layer, work, kind, self.backward, flops, reads, writes, set(writes) if kind == REDUCTION else set()))

    def _record(self, function, args, reads: dict[int, int], outputs: list[Tensor], result) -> None:
        packet, size = function.overloadpacket, self._bytes
        if packet is ATEN.convolution_backward:
            return self._convolution_backward(args, result)
        writes = {self._value(t, new=True): size(t) for t in outputs}
        if packet is ATEN.convolution:
            x, weight = args[:2]
            if problem := _problem(x, weight, args[3:]):
                reads[self._value(x)] = problem.touched_input_bytes(x.itemsize)
            return self._add("fprop" if problem else packet.__name__, HEAVY, reads, writes, _flops(x, weight, outputs[0], args[6]))
        if packet in NORMS or packet in NORM_BACKWARDS:
            return self._norm(packet, args, reads, writes)
        if packet in flop_registry:
            flops = flop_registry[packet](*args, out_val=result)
            return self._add(packet.__name__, HEAVY, reads, writes, flops)
        if packet is ATEN.threshold_backward:
            act = self._value(args[1])
            self.masks.setdefault(act, self._fresh(-(-args[1].numel() // 8)))
        if packet is ATEN.max_pool2d_with_indices:
            self.taps[self._value(outputs[1])] = self._fresh(outputs[1].numel())
        if packet is ATEN.max_pool2d_with_indices_backward:
            del reads[self._value(args[1])]  # of which it takes the shape
        kind = POINTWISE if torch.Tag.pointwise in function.tags or packet in ALIGNED else HEAVY
        return self._add(packet.__name__.rstrip("_"), REDUCTION if packet in REDUCTIONS else kind, reads, writes)

    def _convolution_backward(self, args, result) -> None:
        """dgrad and wgrad. The gradient of a weight is float32's."""
        dy, x, weight = args[:3]
        problem, flops = _problem(x, weight, args[4:]), _flops(x, weight, dy, args[7])
        operand = {self._value(dy): self._bytes(dy)}
        dx, dw = result[:2]
        if dx is not None:
            reads = operand | {self._value(weight): self._bytes(weight)}
            gradient = self._value(dx, new=True)
            self.covered[gradient] = problem.touched_input_bytes(dx.itemsize) if problem else self._bytes(dx)
            self._add("dgrad", HEAVY, reads, {gradient: self._bytes(dx)}, flops)
        if dw is not None:
            touched = problem.touched_input_bytes(x.itemsize) if problem else self._bytes(x)
            writes = {self._value(dw, new=True): dw.numel() * MASTER_BYTES}
            self._add("wgrad", HEAVY, operand | {self._value(x): touched}, writes, flops)

    def _norm(self, packet, args, reads: dict[int, int], writes: dict[int, int]) -> None:
        """Two kernels each way: the first makes the vectors (mean and invstd; dgamma and dbeta), the second the tensor."""
        out, vectors = dict(list(writes.items())[:1]), dict(list(writes.items())[1:])
        if packet in NORM_BACKWARDS:
            self._add("backward reduce", REDUCTION, dict(reads), vectors)
        elif packet in (ATEN.native_layer_norm, ATEN.native_group_norm) or args[5]:  # in training
            x = self._value(args[0])
            self._add("statistics", REDUCTION, {x: reads[x]}, vectors)
        else:
            vectors = {}
        self._add("backward apply" if packet in NORM_BACKWARDS else "apply", POINTWISE, reads | vectors, out)


def _flops(x: Tensor, weight: Tensor, y: Tensor, transposed: bool) -> int:
    """Of a convolution, in any number of dimensions and groups: forward, and as many for either gradient.

    Each weight is multiplied at each pixel of the output, or of the input where the convolution is transposed. PyTorch's own formula for
    the gradients forgets groups.
    """
    pixels = (x if transposed else y).shape[2:].numel()
    return 2 * len(x) * pixels * weight.numel()


def _problem(x: Tensor, weight: Tensor, rest: Sequence) -> ConvProblem | None:
    """A convolution's shapes, `rest` being its stride, padding, dilation, transposed, …, groups; None where it is not 2-d."""
    stride, padding, dilation, transposed, _, groups = rest[:6]
    if x.dim() != 4 or transposed:
        return None
    pairs = [tuple(v) * (3 - len(v)) for v in (stride, padding, dilation)]
    k, _, r, s = weight.shape
    n, c, h, w = x.shape
    return ConvProblem(n, c, h, w, k, r, s, *pairs, groups)


def trace(make: Callable[[], nn.Module], shape: Sequence[int], dtype: torch.dtype) -> Trace:
    """One training step of the module that `make` makes, in `dtype`, on images of `shape`, [N, C, H, W].

    Its result must be scores [N, classes], or a tensor, or a collection of tensors, whose sum is then the loss. `make` is called
    under a default dtype and on fake tensors: it costs no memory, and must not look at numbers. A module that exists already is left
    as it is.
    """
    before = torch.get_default_dtype()
    with FakeTensorMode(), backend("off"), _unlogged():
        try:
            torch.set_default_dtype(dtype)
            model = _faked(make(), dtype).train()
        finally:
            torch.set_default_dtype(before)
        images = torch.empty(tuple(shape), dtype=dtype).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(shape[0], dtype=torch.long)
        fixed = [*model.parameters(), *model.buffers()]
        units = Units(model)
        with units.watched(), _Recorder(fixed, units) as recorder:
            result = model(images)
            units.last = OUTSIDE
            loss = scalar(result, labels)
            recorder.backward = True
            loss.backward()
    found = recorder.shapes, recorder.sizes, recorder.fixed, recorder.masks, recorder.covered, recorder.taps
    return Trace(recorder.ops, shape[0], dtype.itemsize, units.parameters(), *found)


@contextmanager
def _unlogged() -> Iterator[None]:
    """From 2.14 on PyTorch logs what fails on fake tensors, with a traceback, beside raising the error that the caller tells."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _faked(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the module whose parameters and buffers are fake, on the CPU and in `dtype` where they are floating-point."""
    memo: dict[int, Tensor] = {}
    for t in (*module.parameters(), *module.buffers()):
        if not isinstance(t, FakeTensor):
            like = torch.empty_strided(t.shape, t.stride(), dtype=dtype if t.is_floating_point() else t.dtype)
            memo[id(t)] = nn.Parameter(like, t.requires_grad) if isinstance(t, nn.Parameter) else like
    return copy.deepcopy(module, memo) if memo else module


def scalar(result, labels: Tensor) -> Tensor:
    """A loss of what a model returns: cross-entropy of scores [N, classes], else the sum of all its tensors' means."""
    if isinstance(result, Tensor) and result.dim() == 2:
        return nn.functional.cross_entropy(result.float(), labels)
    return sum(t.float().mean() for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad)
