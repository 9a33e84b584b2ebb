"""A block's modules as the operators take them: found once, and kept for as long as the modules stay as they were.

Asking fifty modules for hooks, settings and parameters costs the host a fifth of a forward. So what was found is kept beside a copy of the
modules' attributes, and the next forward compares the two: one comparison of dictionaries a module.
"""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
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
_attributes, _members, _parameters = attrgetter("__dict__"), attrgetter("_modules"), attrgetter("_parameters")
_GLOBAL_HOOKS = _global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks


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
        #: Whether the operators make the residual, too, where there is one.
        self.is_whole = self.beside or not block.shortcut or block.downsample is None
        pairs = [*self.pairs, *([self.projection] if self.beside else [])]
        self._usual, self._modules = all(pair.usual for pair in pairs), [module for pair in pairs for module in pair[:2]]
        self._norms, self._tell = [pair.norm for pair in pairs], all(pair.tells for pair in pairs)
        self._kept: tuple[list, Sequence[Layer]] = [], ()

    def layers(self, x: Tensor) -> Sequence[Layer]:
        """The convolutions of the branch, and beside the first the projection, as `ops.convolve` takes them on x."""
        if not self._usual or torch.compiler.is_compiling():
            return self._layers(x)
        # What may change while the modules stay as they are.
        now = [x.dtype, *map(id, chain.from_iterable(map(dict.values, map(_parameters, self._modules))))]
        before, layers = self._kept
        if now != before:
            layers = self._layers(x)
            parameters = [p for module in self._modules for p in module._parameters.values() if p is not None]
            # A weight of another dtype was cast: a tensor of this forward's, which has its graph and not the next one's values.
            own = all(conv._parameters["weight"].dtype is x.dtype for conv in self._modules[::2])
            if own and all(type(p) is nn.Parameter for p in parameters):
                layers = Layers(layers)
                self._kept = now, layers  # which holds the parameters, so that no other gets the name of one
        return layers

    def statistics(self, made: Sequence[Convolved]) -> list[BatchStatistics]:
        """What the layers of the block tell the running statistics of its norms, in the order of PyTorch's modules."""
        outs = [first for (first, *_), _, _ in made]
        if self.beside:
            ((_, projected), _, _), *_ = made
            outs.append(projected)
        if self._tell and outs[0].y.shape[0]:
            norms = zip(self._norms, outs, strict=True)
            return [BatchStatistics(norm, mean, var, values_per_channel(y)) for norm, (y, mean, _, var, _, _) in norms]
        pairs = [*self.pairs, self.projection] if self.beside else self.pairs
        return [batch for pair, out in zip(pairs, outs, strict=True) for batch in pair.statistics(out)]

    def _layers(self, x: Tensor) -> list[Layer]:
        layers = [[pair.layer(x)] for pair in self.pairs]
        if self.beside:
            layers[0].append(self.projection.layer(x))
        return layers


class _Remembered:
    """What is known of a block, and how the block and its modules looked when it was found. It does not hold the block."""

    def __init__(self, block: nn.Module, requirements: Sequence[Requirement]):
        self.known = known = Prepared(block)
        members = dict.fromkeys(module for _, module in requirements if module is not None and module is not block)
        self._modules = [*members, *([] if known.pool is None else [known.pool])]
        self._parents = [module for module in self._modules if module._modules]
        self._hooks = [*_GLOBAL_HOOKS, *(vars(module)[name] for module in self._modules for name in _HOOKS)]
        self._always = [fits for fits, module in requirements if module is block]
        self._convs = [pair.conv for pair in (*known.pairs, known.projection) if pair is not None]
        self._looks = [dict(part) if isinstance(part, dict) else part for part in self._look(block)]

    def _look(self, block: nn.Module) -> list:
        """Attributes, members and classes."""
        modules, parents = self._modules, self._parents
        return [block.__dict__, block._modules, *map(_attributes, modules), *map(_members, parents), *map(type, modules)]

    def holds(self, block: nn.Module) -> bool:
        """Whether all look the same now, and nobody watches. Where a dictionary of hooks was exchanged, an attribute is not the same."""
        if any(self._hooks):
            return False
        try:
            if self._look(block) != self._looks:
                return False
        except (RuntimeError, ValueError):  # an attribute is an array, which compares by element
            return False
        for conv in self._convs:
            if conv._parameters.get("bias") is not None:
                return False
        for fits in self._always:  # noqa: SIM110  (a generator costs the host as much as what it asks)
            if not fits(block):
                return False
        return True


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
