"""The bytes that a network's operators move in a training step, counted from what they launch.

The step runs as it would on a GPU, by the code of a backend, but for two things: a kernel is written down where it would be launched
(`kernels.launch.recording`), and so are the framework's convolutions and other large operators. So it needs neither a GPU nor the
memory, and takes seconds. Numbers are not computed.

A tensor that a kernel is given counts once, as in `roofline`: of a strided 1x1 what its windows cover. What kernels
hand to one another, partial sums and split-K results, is counted apart.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..backends import BACKENDS, backend
from ..backends.triton import CAPABILITY
from ..kernels.launch import Launch, recording
from ..problem import ConvProblem
from ..reference import Reference
from ..roofline import optimizer_step
from ..tuning import heuristics
from ..values import nhwc

ATEN = torch.ops.aten
CONVOLUTIONS = {ATEN.conv2d, ATEN.convolution, ATEN.convolution_backward}
PRODUCTS = {ATEN.mm, ATEN.addmm}
#: Casts, and what makes memory.
NOT_COUNTED = {ATEN._to_copy, ATEN.empty, ATEN.empty_like, ATEN.new_empty}


@dataclass(frozen=True)
class Moved:
    """A launch: of a kernel of ours, or of the framework."""

    name: str
    bytes: int
    workspace: int = 0  #: bytes of partial results, which are not in `bytes`


class Traffic(NamedTuple):
    """What a training step moves, and what it holds between forward and backward."""

    moved: list[Moved]
    saved: int  #: bytes of activations, masks and taps that are alive once the loss is


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _covered(x: Tensor, kernel: tuple[int, int], stride: Iterable[int], padding: Iterable[int], dilation: Iterable[int]) -> int:
    """Bytes of x that lie under some window."""
    problem = ConvProblem(*x.shape, 1, *kernel, tuple(stride), tuple(padding), tuple(dilation))
    return problem.touched_input_bytes(x.element_size())


def _of_launch(launch: Launch) -> Moved:
    a = launch.arguments
    tensors = {name: value for name, value in a.items() if isinstance(value, Tensor)}
    distinct = {(t.data_ptr(), t.shape): (name, t) for name, t in tensors.items()}.values()
    # Activations, masks and weights have four axes, vectors one; partial results have rows of their own.
    workspace = sum(_bytes(t) for _, t in distinct if t.dim() in (2, 3) or t.dtype == torch.int64)
    moved = sum(_bytes(t) for _, t in distinct) - workspace
    if "STRIDE_H" in a and "x_ptr" in tensors and "dz_ptr" not in tensors:
        geometry = [(a[f"{name}_H"], a[f"{name}_W"]) for name in ("STRIDE", "PADDING", "DILATION")]
        moved += _covered(a["x_ptr"], (a["R"], a["S"]), *geometry) - _bytes(a["x_ptr"])
    return Moved(launch.kernel.__name__, moved, workspace)


class _Framework(TorchDispatchMode):
    """Writes down the framework's convolutions, products, and what it does to whole activations. Convolutions are not computed."""

    sees_fused_operators = True

    def __init__(self, batch: int):
        super().__init__()
        self.batch, self.moved, self.made = batch, [], {}

    def alive(self) -> int:
        """Bytes of the activations that somebody still holds."""
        return sum(size for storage, size in self.made.values() if not storage.expired())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = self._run(func, args, kwargs)
        if not (func.is_view or (args and isinstance(args[0], nn.Parameter))):  # a cast weight is no activation
            for t in tree_leaves(result):
                if isinstance(t, Tensor) and self._is_activation(t):
                    storage = t.untyped_storage()
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def _is_activation(self, t: Tensor) -> bool:
        return t.dim() == 4 and t.shape[0] == self.batch

    def _run(self, func, args, kwargs):
        packet = func.overloadpacket
        if packet in CONVOLUTIONS:
            shapes = func(*tree_map_only(Tensor, lambda t: t.to("meta"), args))
            # A GPU's convolution of channels_last is channels_last; that of the device "meta" need not be.
            layout = torch.preserve_format if packet is ATEN.convolution_backward else torch.channels_last
            result = tree_map_only(Tensor, lambda t: torch.empty_like(t, device=args[0].device, memory_format=layout), shapes)
            self.moved += _of_convolution(packet, args, result)
            return result
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten" or func.is_view or packet in NOT_COUNTED:
            return result
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor) and not any(t is r for r in read)]
        if packet in PRODUCTS or any(map(self._is_activation, (*read, *written))):
            self.moved.append(Moved(str(packet), sum(map(_bytes, (*read, *written)))))
        return result


def _of_convolution(packet, args: tuple, result) -> list[Moved]:
    """fprop; or dgrad and wgrad, which the framework runs apart."""
    backward = packet is ATEN.convolution_backward
    dy, x, weight = args[:3] if backward else (result, *args[:2])
    geometry = args[4:7] if backward else args[3:6]
    geometry += ((1, 1), (0, 0), (1, 1))[len(geometry) :]  # the dispatcher leaves out what is as by default
    covered = _covered(x, weight.shape[2:], *geometry)
    if not backward:
        return [Moved(str(packet), covered + _bytes(weight) + _bytes(dy))]
    dx, dw, _ = result
    moved = [] if dx is None else [Moved(f"{packet}, dgrad", _bytes(dy) + _bytes(weight) + _bytes(dx))]
    return moved if dw is None else [*moved, Moved(f"{packet}, wgrad", _bytes(dy) + covered + _bytes(dw))]


def counted(name: str) -> Reference:
    """A backend that does what `name` does on a GPU, where kernels are recorded. For a CPU's tensors of any dtype."""

    class Counted(type(BACKENDS[name])):
        framework: _Framework

        def why_not(self, device, dtype):
            return None

        def choose(self, task, device):
            return heuristics.configuration(task, CAPABILITY)

        def convolve(self, *args):
            with self.framework:
                return super().convolve(*args)

        def convolve_backward(self, *args):
            with self.framework:
                return super().convolve_backward(*args)

    return Counted()


def training_step(
    make: Callable[[], nn.Module],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    name: str,
    tell: Callable[[Launch], object] = lambda launch: None,
) -> Traffic:
    """What a training step of a network moves on images of `shape` [N, C, H, W] under autocast to `dtype`, by the backend `name`.

    `name`: triton or passes_triton. `tell` is called with each launch. SGD with momentum is counted by the rules of `roofline`. The
    casts of weights are not counted.
    """

    def counted_and_told(launches: list[Launch]) -> list[Moved]:
        for launch in launches:
            tell(launch)
        return [*map(_of_launch, launches)]

    framework, implementation = _Framework(shape[0]), counted(name)
    implementation.framework = framework
    BACKENDS["counted"] = implementation
    try:
        with torch.device("cpu"):
            model = make().train().to(memory_format=torch.channels_last)
            images = nhwc(torch.empty(shape))
        labels = torch.zeros(shape[0], dtype=torch.long)
        with recording() as launches, framework, backend("counted"), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
            moved = counted_and_told(launches)
            launches.clear()  # they hold what they were given
            saved = framework.alive()
            loss.backward()
    finally:
        del BACKENDS["counted"]
    optimizer = optimizer_step(sum(p.numel() for p in model.parameters()), dtype.itemsize)
    return Traffic([*moved, *counted_and_told(launches), *framework.moved, Moved(optimizer.work, optimizer.bytes)], saved)


def by_name(moved: Iterable[Moved]) -> dict[str, tuple[int, int, int]]:
    """(launches, bytes, bytes of workspaces) of each kernel, the largest first."""
    launches, sums, workspaces = Counter(), Counter(), Counter()
    for m in moved:
        launches[m.name] += 1
        sums[m.name] += m.bytes
        workspaces[m.name] += m.workspace
    return {name: (launches[name], bytes_, workspaces[name]) for name, bytes_ in sums.most_common()}
