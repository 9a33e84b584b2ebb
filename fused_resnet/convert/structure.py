"""Fuses a module by its structure: by what one forward of it calls, in which order, whatever its class is named."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Block, PreActivation, ResidualNetwork, Stage
from ..nn.modules import observed, runs_fused
from .kinds import is_conv_like, is_norm_like
from .plan import Plan
from .trace import Traced, original_of, same, trace

#: Forwards that are kept for one module: a network switches between training and eval mode, and hooks come and go.
_KEPT = 4
_lock = threading.RLock()
_CONVS = nn.modules.conv._ConvNd


class Plans:
    """The known forwards of one module. A copy is empty, since a plan names the modules that it runs."""

    def __init__(self, owner: nn.Module | None = None):
        self.owner = owner
        self.known: list[tuple[Traced, Plan | None]] = []

    def __reduce__(self) -> Any:
        return Plans, ()

    def current(self) -> tuple[Traced, Plan | None] | None:
        """The forward as it would run now."""
        for found in self.known:
            if found[0].holds():
                return found
        if torch.compiler.is_compiling():  # which can't trace within: what has changed runs as it stands
            return None
        with _lock:
            traced = trace(self.owner, is_leaf)
            found = traced, None if traced.graph is None else Plan(traced)
            self.known = [found, *self.known[: _KEPT - 1]]
        return found


def plans_of(module: nn.Module) -> Plans:
    """The plans of a module. They are no attribute of it, which nn.Module would search."""
    plans = vars(module).get("_plans")
    if plans is None or plans.owner is not module:
        plans = vars(module)["_plans"] = Plans(module)
    return plans


class Structured:
    """A module that runs by a plan of its forward, where the forward is known."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        replica = vars(self).get("_is_replica", False)  # of DataParallel, which lives for one forward
        traced, plan = (None if replica else plans_of(self).current()) or (None, None)
        if plan is not None and plan.fuses:
            given = arguments(traced, args, kwargs)
            if given is not None and runs_fused(given[0]):
                return plan.run(given)
        return self.fuse_original.forward(self, *args, **kwargs)

    def fuse_trace(self, *args: Any, **kwargs: Any) -> Any:
        """torch.fx looks into it."""
        return self.fuse_original.forward(self, *args, **kwargs)


def arguments(traced: Traced, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """What a forward was given, in order, where that is a tensor for each argument that it must have, and the default of any other."""
    names = traced.parameters
    if kwargs or len(args) > len(names):
        given = dict(zip((*names, *traced.defaults), args, strict=False))
        if len(given) < len(args) or given.keys() & kwargs.keys():
            return None
        given |= kwargs
        args = tuple(given.pop(name, None) for name in names)
        if any(name not in traced.defaults or not same(traced.defaults[name], value) for name, value in given.items()):
            return None
    return args if len(args) == len(names) and all(isinstance(a, Tensor) for a in args) else None


def is_leaf(module: nn.Module) -> bool:
    """Whether a trace takes a module as one step, and does not look into it."""
    if observed(module) or is_block(module) or isinstance(module, torch.jit.ScriptModule):
        return True
    cls = type(module)
    if hasattr(cls, "fuse_original"):
        return not looked_into(module)
    if is_conv_like(module) or is_norm_like(module):
        return True
    if cls.forward is nn.Sequential.forward:
        return holds_convolution(module)
    return cls.__module__.startswith("torch.nn.") or holds_convolution(module) or not is_traceable(module)


def is_block(module: nn.Module) -> bool:
    """Whether a module runs as a residual block."""
    return isinstance(module, Block | PreActivation) and not isinstance(module, Structured)


def looked_into(module: nn.Module) -> bool:
    """Whether a trace looks into a module that `fuse` has given its class."""
    return isinstance(module, Structured) or original_of(type(module)).forward is nn.Sequential.forward


def is_traceable(module: nn.Module) -> bool:
    """Whether a module without convolutions, an activation for one, can be looked into."""
    return trace(module, is_leaf).graph is not None


def holds_convolution(module: nn.Module) -> bool:
    """Whether a module holds a convolution."""
    return any(isinstance(m, _CONVS) for m in module.modules())


def may_be_looked_into(module: nn.Module) -> bool:
    """Whether a module holds convolutions, is somebody's own or a sequence, and can be traced."""
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Module.forward or not holds_convolution(module):
        return False
    if type(module).__module__.startswith("torch.nn.") and type(module).forward is not nn.Sequential.forward:
        return False
    if isinstance(module, ResidualNetwork | Stage) or (is_block(module) and (module.fusible() or module.why_not() is None)):  # ours
        return False
    found = plans_of(module).current()[1] is not None
    if not found:
        del vars(module)["_plans"]
    return found
