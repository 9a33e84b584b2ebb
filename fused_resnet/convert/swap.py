"""`fuse` and `unfuse`: a module gets another class, and nothing else of it changes.

The class is made of what we know of the module (`known.py`) and of the module's own class, which stays a base: `isinstance`, methods
and attributes are as before, and no other instance sees anything. A fused module pickles as its own class with a note to fuse it.
"""

import copyreg
import warnings
from functools import cache
from typing import Any

import torch
from torch import nn

from ..nn import Block, PreActivation, Stage
from .known import knowledge_of
from .sequences import worth_fusing


class Fused:
    """First base of every class that `fuse` gives to a module. Its `__call__` stays nn.Module's, with all hooks."""

    original: type[nn.Module]

    def forward(self, x: Any) -> Any:
        """As the original's, by the operators where they take x."""
        if isinstance(x, torch.fx.Proxy):
            return self.trace(x)
        return super().forward(x)

    def forward_modules(self, x: Any) -> Any:
        """The original's own forward."""
        return self.original.forward(self, x)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the module as before `fuse`, with the same parameters. This one stays fused."""
        twin = self.original.__new__(self.original)
        vars(twin).update(vars(self), _modules=dict(self._modules))
        return twin

    def __reduce_ex__(self, protocol: int) -> Any:
        constructor, arguments, *state = super().__reduce_ex__(protocol)
        if constructor is copyreg.__newobj__ and arguments == (fused_class(self.original),):
            return _new, (self.original,), *state
        return constructor, arguments, *state  # somebody has made a class of ours


def _new(original: type[nn.Module]) -> nn.Module:
    """An empty module of the fused class, for pickle and deepcopy."""
    cls = fused_class(original)
    return cls.__new__(cls)


@cache
def fused_class(original: type[nn.Module]) -> type[nn.Module] | None:
    """The class that stands for `original`; None where nothing is known of it."""
    knowledge = knowledge_of(original)
    if knowledge is None:
        return None
    name = f"Fused{original.__name__}"
    body = {"original": original, "__module__": __name__, "__qualname__": name, "__doc__": knowledge.__doc__}
    return type(name, (Fused, knowledge, original), body)


def fuse(model: nn.Module) -> nn.Module:
    """Let `model` run on the fused operators, in place; it is returned for convenience.

    Parameters, buffers, keys, submodules and hooks stay the very same objects; only this instance changes, and a second call
    changes nothing. What is not known, or can't be fused, stays as it is: `report(model)` says what and why. Where the operators do
    not run (a CPU, float64) the model runs its own forward. Warns where nothing in `model` is known.

    Raises TypeError where `model` is no nn.Module, or is TorchScript's.
    """
    check(model)
    for module in reversed(list(model.modules())):  # members before what holds them: a sequence is judged by its members
        if isinstance(module, Fused | torch.jit.ScriptModule):
            continue
        cls = fused_class(type(module))
        if cls is not None and worth_fusing(module):
            module.__class__ = cls
    if not any(isinstance(module, Fused | Block | PreActivation | Stage) for module in model.modules()):
        warnings.warn(
            f"fused_resnet.fuse: no block of {type(model).__name__} is known; nothing has changed (see docs/drop-in.md)", stacklevel=2
        )
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`, in place, and `recompute` with it; the model is returned. What was never fused stays as it is.

    Raises TypeError where `model` is no nn.Module, and where a fused module was given yet another class since then.
    """
    check(model)
    fused = [(name, module) for name, module in model.named_modules() if isinstance(module, Fused)]
    for name, module in fused:
        if "original" not in vars(type(module)):
            raise TypeError(f"model: expected {name or 'it'} to have the class that fuse gave it; got {type(module).__name__}")
    for _, module in fused:
        module.__class__ = module.original
        vars(module).pop("recompute", None)
    return model


def check(model: nn.Module) -> None:
    """Raise TypeError where `model` is no module whose class can be exchanged."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected a torch.nn.Module; got one of TorchScript, whose code can't be exchanged")
