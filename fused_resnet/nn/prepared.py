"""A block's modules as the operators take them: found once, and kept for as long as the modules stay as they were.

Asking fifty modules for hooks, settings and parameters costs the host a fifth of a forward. So what was found is kept beside a copy of the
modules' attributes, and the next forward compares the two: one comparison of dictionaries a module.
"""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from ..ops import Conv, ConvGeometry, Convolved, Layer, Layers, Norm, Pending, values_per_channel
from .activation import BatchStatistics
from .modules import Requirement, batch_statistics, geometry, met, norm_of, weight_for

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = _global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks


class Snapshot:
    """How modules looked: their classes, attributes, members, and that nobody watches them."""

    def __init__(self, modules: Sequence[nn.Module]):
        self._modules, self._parents = modules, [module for module in modules if module._modules]
        self._classes = [type(module) for module in modules]
        self._attributes = [dict(vars(module)) for module in modules]
        self._members = [dict(module._modules) for module in self._parents]
        self._hooks = [*_GLOBAL_HOOKS, *(vars(module)[name] for module in modules for name in _HOOKS)]

    def holds(self) -> bool:
        """Whether they look the same now. A dictionary of hooks that was exchanged is an attribute that is not."""
        modules = self._modules
        return (
            not any(self._hooks)
            and [module.__class__ for module in modules] == self._classes
            and _equal([module.__dict__ for module in modules], self._attributes)
            and _equal([module._modules for module in self._parents], self._members)
        )


class _Pair(NamedTuple):
    """A convolution and its norm."""

    conv: nn.Conv2d
    norm: nn.Module
    geometry: ConvGeometry
    usual: bool  #: whether the norm is PyTorch's own, in training, so that nothing of it can change but its parameters
    tells: bool  #: whether it then keeps running statistics

    @classmethod
    def of(cls, conv: nn.Conv2d, norm: nn.Module) -> "_Pair":
        held = "weight" in conv._parameters and "weight" in norm._parameters and "bias" in norm._parameters
        usual = held and type(norm) is nn.BatchNorm2d and norm.training
        return cls(conv, norm, geometry(conv), usual, usual and norm.track_running_stats)

    def layer(self, x: Tensor) -> Conv:
        """As an operator takes them that reads x."""
        conv, norm, moves, usual, _ = self
        if not usual:
            return Conv(weight_for(conv, x), norm_of(norm), moves)
        weight, parameters = conv._parameters["weight"], norm._parameters
        if weight.dtype is not x.dtype:
            weight = weight_for(conv, x)
        return Conv(weight, Norm(parameters["weight"], parameters["bias"], None, None, True, norm.eps), moves)

    def statistics(self, out: Pending) -> tuple[BatchStatistics, ...]:
        """What `out` tells the norm's running statistics."""
        size = values_per_channel(out.y) if self.tells else 0
        return (BatchStatistics(self.norm, out.mean, out.var, size),) if size else batch_statistics(self.norm, out)


class Prepared:
    """What the operators need to know of a block whose modules they can stand for."""

    def __init__(self, block: nn.Module):
        projection = block.projection()
        self.pairs = [_Pair.of(conv, norm) for conv, norm in block.branch()]
        self.pool, self.projection = (None, None) if projection is None else (projection[0], _Pair.of(*projection[1:]))
        #: Whether the projection reads what the branch's first convolution reads.
        self.beside = projection is not None and self.pool is None
        pairs = [*self.pairs, *([self.projection] if self.beside else [])]
        self._usual, self._modules = all(pair.usual for pair in pairs), [module for pair in pairs for module in pair[:2]]
        self._kept: tuple[list, Sequence[Layer]] = [], ()

    def layers(self, x: Tensor) -> Sequence[Layer]:
        """The convolutions of the branch, and beside the first the projection, as `ops.convolve` takes them on x."""
        if not self._usual or torch.compiler.is_compiling():
            return self._layers(x)
        # What may change while the modules stay as they are.
        now = [x.dtype]
        for module in self._modules:
            now += map(id, module._parameters.values())
        before, layers = self._kept
        if now != before:
            layers = self._layers(x)
            parameters = [p for module in self._modules for p in module._parameters.values() if p is not None]
            if all(type(p) is nn.Parameter for p in parameters) and all(c.weight.dtype is x.dtype for convs in layers for c in convs):
                layers = Layers(layers)
                self._kept = now, layers  # which holds the parameters, so that no other gets the name of one
        return layers

    def is_whole(self, block: nn.Module) -> bool:
        """Whether the operators make the residual, too, where there is one."""
        return self.beside or not block.shortcut or block.downsample is None

    def statistics(self, made: Sequence[Convolved]) -> list[BatchStatistics]:
        """What the layers of the block tell the running statistics of its norms, in the order of PyTorch's modules."""
        told = [(pair, pendings[0]) for pair, (pendings, _, _) in zip(self.pairs, made, strict=True)]
        if self.beside:
            told.append((self.projection, made[0].pendings[-1]))
        return [batch for pair, out in told for batch in pair.statistics(out)]

    def _layers(self, x: Tensor) -> list[Layer]:
        layers = [[pair.layer(x)] for pair in self.pairs]
        if self.beside:
            layers[0].append(self.projection.layer(x))
        return layers


class _Remembered:
    """What is known of a block, and how the block looked when it was found. It does not hold the block."""

    def __init__(self, block: nn.Module, requirements: Sequence[Requirement]):
        self.known = known = Prepared(block)
        members = dict.fromkeys(module for _, module in requirements if module is not None and module is not block)
        self._members = Snapshot([*members, *([] if known.pool is None else [known.pool])])
        self._own = [dict(attributes) for attributes in (vars(block), block._modules)]
        self._always = [fits for fits, module in requirements if module is block]
        self._convs = [pair.conv for pair in (*known.pairs, known.projection) if pair is not None]

    def holds(self, block: nn.Module) -> bool:
        """Whether the block looks the same now."""
        if not (self._members.holds() and _equal([block.__dict__, block._modules], self._own)):
            return False
        for conv in self._convs:
            if conv._parameters.get("bias") is not None:
                return False
        for fits in self._always:  # noqa: SIM110  (a generator costs the host as much as what it asks)
            if not fits(block):
                return False
        return True


def _equal(now: list, before: list) -> bool:
    """Whether these hold the same objects, or equal ones."""
    try:
        return now == before
    except (RuntimeError, ValueError):  # there is an array, which compares by element
        return False


#: By block. A copy of a block, or one that was loaded, is another block, and finds its own.
_KNOWN: WeakKeyDictionary[nn.Module, _Remembered] = WeakKeyDictionary()


def prepared(block: nn.Module) -> Prepared | None:
    """What the operators need to know of a block; None where they can't stand for its modules, or somebody watches these."""
    # A compiler guards what it reads, and a replica of DataParallel lives for one forward.
    for_once = torch.compiler.is_compiling() or "_is_replica" in block.__dict__
    if not for_once:
        found = _KNOWN.get(block)
        if found is not None and found.holds(block):
            return found.known
    requirements = block.requirements()
    if not met(requirements):
        return None
    if for_once:
        return Prepared(block)
    found = _KNOWN[block] = _Remembered(block, requirements)
    return found.known
