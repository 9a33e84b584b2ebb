"""`fuse` and `unfuse`: a module gets another class, and nothing else of it changes.

The class is made of what we know of the module (`known.py`) and of the module's own class, which stays a base: `isinstance`, methods
and attributes are as before, and no other instance sees anything. A fused module pickles as its own class with a note to fuse it.
"""

import copyreg
import inspect
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from ..nn import Block, PreActivation, Stage
from ..nn.chain import is_sequence
from ..nn.modules import observed
from .known import is_as_known, knowledge_of
from .sequences import all_known, holds_stem, stem_length, worth_fusing
from .structure import Structured, may_be_looked_into, plans_of
from .trace import original_of


class Fused:
    """First base of every class that `fuse` gives to a module. Its `__call__` stays nn.Module's, with all hooks."""

    # Attributes of the class, whose names somebody's own module is not likely to have.
    fuse_original: type[nn.Module]
    fuse_methods: tuple[tuple[str, Any], ...]  #: those of the original that are stood for, as they were

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the module as before `fuse`, with the same parameters. This one stays fused."""
        twin = self.fuse_original.__new__(self.fuse_original)
        vars(twin).update(vars(self), _modules=dict(self._modules))
        vars(twin).pop("_plans", None)
        return twin

    def __reduce_ex__(self, protocol: int) -> Any:
        constructor, arguments, *state = super().__reduce_ex__(protocol)
        if constructor is copyreg.__newobj__ and "fuse_original" in vars(type(self)):
            return _new, (self.fuse_original, isinstance(self, Structured)), *state
        return constructor, arguments, *state  # somebody has made a class of ours


def _new(original: type[nn.Module], structured: bool = False) -> nn.Module:
    """An empty module of the fused class, for pickle and deepcopy."""
    cls = fused_class(original, Structured if structured else knowledge_of(original))
    return cls.__new__(cls)


@cache
def fused_class(original: type[nn.Module], knowledge: type) -> type[nn.Module]:
    """The fused class in place of `original`, made of what is known of it."""
    name = f"Fused{original.__name__}"
    known = ("forward", "_forward_impl", "forward_features")
    methods = tuple((method, getattr(original, method)) for method in known if hasattr(original, method))
    body = {"fuse_original": original, "fuse_methods": methods, "forward": _forward(original, knowledge)}
    body |= {"__module__": __name__, "__qualname__": name, "__doc__": knowledge.__doc__}
    return type(name, (Fused, knowledge, original), body)


def _forward(original: type[nn.Module], knowledge: type) -> Callable:
    """The forward of a fused class. It has the signature of the original's, which torch.fx and others ask for."""
    signature = inspect.signature(original.forward)

    @wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, torch.fx.Proxy) for a in args) or any(isinstance(a, torch.fx.Proxy) for a in kwargs.values()):
            return self.fuse_trace(*args, **kwargs)
        if not is_as_known(self):
            return original.forward(self, *args, **kwargs)
        if kwargs and knowledge is not Structured:  # whatever the original calls its argument
            args, kwargs = signature.bind(self, *args, **kwargs).args[1:], {}
        return knowledge.forward(self, *args, **kwargs)

    return forward


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
        knowledge = best_knowledge(module)
        if knowledge is not None:
            module.__class__ = fused_class(type(module), knowledge)
    if not any(is_of_use(module) for module in model.modules()):
        name = original_of(type(model)).__name__
        text = f"nothing of {name} can be fused; report(model) says why (see docs/drop-in.md)"
        warnings.warn(f"fused_resnet.fuse: {text}", stacklevel=2)
    return model


def best_knowledge(module: nn.Module) -> type | None:
    """The knowledge that fuses most of a module: of its class, or of its structure; None where neither fuses anything."""
    knowledge = knowledge_of(type(module))
    if knowledge is not None and not worth_fusing(module):
        knowledge = None
    if knowledge is not None and suffices(module, knowledge):
        return knowledge
    if may_be_looked_into(module) and (knowledge is None or plans_of(module).current()[1].fuses):
        return Structured
    return knowledge


def suffices(module: nn.Module, knowledge: type) -> bool:
    """Whether what is known of a module's class fuses all of it, as soon as nobody watches its members."""
    if is_sequence(module):
        return all_known(module)
    if not issubclass(knowledge, Block | PreActivation):
        return stem_length(module) > 0 or not holds_stem(module)
    original, module.__class__ = type(module), fused_class(type(module), knowledge)
    reason = module.why_not()
    module.__class__ = original
    return reason is None or any(observed(m) for m in module.modules())


def is_of_use(module: nn.Module) -> bool:
    """Whether a module may run on the operators."""
    if isinstance(module, Structured):
        plan = plans_of(module).current()[1]
        return plan is not None and (plan.fuses or bool(plan.affine))
    return isinstance(module, Fused | Block | PreActivation | Stage)


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`, in place, and `recompute` with it; the model is returned. What was never fused stays as it is.

    Raises TypeError where `model` is no nn.Module, and where a fused module was given yet another class since then.
    """
    check(model)
    fused = [(name, module) for name, module in model.named_modules() if isinstance(module, Fused)]
    for name, module in fused:
        if "fuse_original" not in vars(type(module)):
            raise TypeError(f"model: expected {name or 'it'} to have the class that fuse gave it; got {type(module).__name__}")
    for _, module in fused:
        module.__class__ = module.fuse_original
        for name in ("recompute", "_plans"):
            vars(module).pop(name, None)
    return model


def check(model: nn.Module) -> None:
    """Raise TypeError where `model` is no module whose class can be exchanged."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected a torch.nn.Module; got one of TorchScript, whose code can't be exchanged")
