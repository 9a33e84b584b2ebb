"""What a block keeps for backward between its convolutions, made again instead: memory for time.

The inner raw outputs of a branch, and the activations behind them where a backend keeps those too, follow from what the branch read, which
is kept in any case. While the branch runs, all that its operators save goes through hooks; at its end what can be made again is let go of.
In backward the first node that asks has it made, by the kernels of the forward and from the coefficients of its norms, which are saved:
the bits are the same, no statistics are taken, and no process is asked. What the last node has read is let go of at once.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .. import ops
from ..ops import Conv, Convolved, Layer, Source
from ..reference import Reference
from .modules import autocasts

#: Of a tensor: its storage, and what it is of that. No two tensors that are alive have the same.
Key = tuple[int, int, torch.Size]


class _Kept:
    """A tensor that a node has saved: itself, or who makes it again."""

    __slots__ = ("again", "tensor", "version")

    def __init__(self, tensor: Tensor):
        # Without its graph, of which the node is a part: a circle would never be freed.
        self.tensor, self.version, self.again = tensor.detach(), tensor._version, None

    def unpack(self) -> Tensor:
        if self.again is not None:
            return self.again.handed_to(self)
        if self.tensor._version != self.version:  # autograd leaves this to whoever sets hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {list(self.tensor.shape)} is at version {self.tensor._version}; expected version {self.version}"
            )
        return self.tensor


class _Again:
    """A tensor that is made when it is first asked for, and let go of once all that saved it have had it: each backward anew."""

    def __init__(self, make: Callable[[], Tensor], keepers: list[_Kept]):
        self._make, self._tensor, self._had, self._keepers = make, None, set(), len(keepers)
        for keeper in keepers:
            keeper.again, keeper.tensor = self, None

    def get(self) -> Tensor:
        tensor = self._tensor
        if tensor is None:
            tensor = self._make()
            self._tensor = tensor if self._keepers else None
        return tensor

    def handed_to(self, keeper: _Kept) -> Tensor:
        tensor = self.get()
        self._had.add(id(keeper))
        if len(self._had) == self._keepers:
            self._tensor = None
            self._had.clear()
        return tensor


class _Maker(NamedTuple):
    """What makes the tensors of a convolution of the branch again. It holds none of them."""

    implementation: Reference
    norm: tuple[Tensor, ...] | None  #: (mean, invstd, scale, bias) of a raw output that was read; None where an activation was
    written: bool  #: whether the convolution read an activation that was written
    convolution: Callable[[Source], Tensor]

    def activation(self, raw: Tensor) -> Tensor:
        """relu(norm(raw)), as the backend wrote it."""
        return self.implementation.norm_add_act(Source(raw, *self.norm), relu=True, save_mask=False)[0]

    def output(self, read: Tensor) -> Tensor:
        """y of the activation that was written, or else of the raw output."""
        return self.convolution(Source(read) if self.written else Source(read, *self.norm))


class _Layer(NamedTuple):
    """A convolution of the branch that has run."""

    maker: _Maker
    read: Tensor  #: the activation; or the raw output of which the operator made it
    hidden: Tensor | None  #: the activation that a backend keeps for itself in the second case
    y: Tensor


class Recomputation:
    """A context in which a branch runs. It tells each convolution to `ran`; at the end its inner outputs are let go of."""

    def __enter__(self) -> "Recomputation":
        self._kept: list[_Kept] = []
        self._layers: list[_Layer] = []
        self._seen = 0
        self._hooks = saved_tensors_hooks(self._pack, _Kept.unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._hooks.__exit__(kind, *error)
        if kind is None:
            self._let_go()
        del self._kept, self._layers, self._hooks  # which the graph would hold

    def ran(self, given: Source, conv: Conv, made: Convolved) -> None:
        """A convolution, the first of its layer, has run: on an activation that exists now, or on what `given` stands for."""
        out, act = made.pendings[0], made.act
        implementation = ops.implementation(given.x)
        conv = conv._replace(weight=conv.weight.detach())
        written = act is not None or implementation.keeps_act(given, [conv])
        hidden = self._hidden(given.x, conv.weight, out.y) if act is None and written else None
        self._seen = len(self._kept)
        if act is None and written and hidden is None:
            return  # no gradient is wanted, so that nothing was saved
        norm = tuple(t.detach() for t in given[1:5]) if act is None else None
        maker = _Maker(implementation, norm, written, implementation.convolution_again(given, conv, written))
        self._layers.append(_Layer(maker, given.x if act is None else act, hidden, out.y))

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self._kept.append(kept)
        return kept

    def _hidden(self, x: Tensor, weight: Tensor, y: Tensor) -> Tensor | None:
        """What the last operator has saved of x's shape beside x, weight and y."""
        known = {_key(t) for t in (x, weight, y)}
        found = (kept.tensor for kept in self._kept[self._seen :])
        return next((t for t in found if t.shape == x.shape and t.dtype == x.dtype and _key(t) not in known), None)

    def _let_go(self) -> None:
        keepers: defaultdict[Key, list[_Kept]] = defaultdict(list)
        for kept in self._kept:
            if kept.tensor.dim() == 4:
                keepers[_key(kept.tensor)].append(kept)
        again: dict[Key, _Again] = {}

        def origin(tensor: Tensor) -> Callable[[], Tensor] | None:
            """What gives a tensor in backward; None where nothing would but for us, so that to keep it would be the dearer."""
            key = _key(tensor)
            if key in again:
                return again[key].get
            kept = keepers[key][0].tensor if keepers[key] else None
            return None if kept is None else lambda: kept

        def let_go(tensor: Tensor, make: Callable[[Tensor], Tensor], read: Callable[[], Tensor]) -> None:
            key = _key(tensor)
            again[key] = _Again(lambda: _as_in_forward(make, read()), keepers[key])

        for layer in self._layers:
            read = origin(layer.read)
            if read is None:
                continue
            if layer.hidden is not None:
                let_go(layer.hidden, layer.maker.activation, read)
                read = origin(layer.hidden)
            if layer is not self._layers[-1]:
                let_go(layer.y, layer.maker.output, read)


def run_of(source: Source, layers: Sequence[Layer], act_is_read: bool, recompute: bool) -> list[Convolved]:
    """`ops.convolve`; with `recompute` in a context in which what is kept between the layers can be let go of, each a node of its own."""
    again = recomputation(recompute)
    if again is None:
        return ops.convolve(source, layers, act_is_read)
    made = []
    with again:
        for layer in layers:
            made += ops.convolve(source, [layer], act_is_read)
            again.ran(source, layer[0], made[-1])
            source, act_is_read = ops.source(made[-1].pendings[0]), False
    return made


def recomputation(wanted: bool) -> Recomputation | None:
    """The context of a branch whose inner outputs are to be made again; None where that is not `wanted`, or can't be.

    Without gradients nothing is kept. A compiler decides for itself. Hooks around the branch (a checkpoint without reentry, `save_on_cpu`)
    would no longer see what the branch saves, and have plans for it.
    """
    if not wanted or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    hooks = torch._C._autograd
    free = hooks._saved_tensors_hooks_is_enabled() and hooks._top_saved_tensors_default_hooks(True) is None
    return Recomputation() if free else None


def _key(tensor: Tensor) -> Key:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape


@torch.no_grad()
def _as_in_forward(make: Callable[[Tensor], Tensor], read: Tensor) -> Tensor:
    """make(read) in the dtypes of the forward, whatever autocast the backward runs under."""
    kind = read.device.type
    with torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext():
        return make(read)
