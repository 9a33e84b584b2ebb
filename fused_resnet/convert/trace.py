"""What a module's forward does, found by running it once on stand-ins for tensors: which modules it calls, on what, in which order.

The stand-ins are those of torch.fx, so that whatever would need a tensor's values or sizes ends the trace instead of being settled once and
for all. torch.fx itself exchanges nn.Module's methods while it traces, under the feet of other threads; here each module of the one that is
traced gets another class for that moment, which treats tensors as before. Unlike torch.fx, a trace also knows what it rests on: the
attributes that were read, the members of every module, its class and forward, and whether somebody watches it. `Traced.holds` asks for that
before each use.
"""

import inspect
import operator
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import Attribute, TracerBase

from ..nn import Block, PreActivation
from ..nn.modules import autocasts, observed

#: Attributes that every nn.Module has for itself; what of them matters is asked for by other means.
_OWN = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type, nn.Module)
#: What gives a tensor, and never several.
_GIVES_TENSOR = frozenset((
    "add", "iadd", "sub", "isub", "mul", "imul", "truediv", "neg", "matmul", "relu", "relu_", "add_", "sub_", "mul_", "cat", "flatten",
    "mean", "sum", "sigmoid", "tanh", "softmax", "gelu", "silu", "hardswish", "hardsigmoid", "leaky_relu", "relu6", "elu", "dropout",
    "dropout2d", "pad", "interpolate", "view", "reshape", "permute", "transpose", "contiguous", "unsqueeze", "squeeze", "clone",
    "conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "linear", "layer_norm", "batch_norm", "group_norm", "stack",
    "expand_as", "clamp", "exp",
))  # fmt: skip

_CONSTANTS = (bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)

_tracing = threading.local()


class Untraceable(Exception):
    """One run can't show what a forward does. The message says why."""


class Traced(NamedTuple):
    """One forward of a module."""

    root: nn.Module
    graph: Graph | None  #: None where it can't be traced
    why: str  #: why not
    modules: dict[str, nn.Module]  #: those that nodes call, by target
    parameters: tuple[str, ...]  #: names of the arguments that are tensors
    defaults: dict[str, Any]  #: of the other arguments, in order
    conditions: tuple["Condition", ...]

    def holds(self) -> bool:
        """Whether the module would do the same again."""
        for condition in self.conditions:  # noqa: SIM110  (a generator would cost the host more)
            if not condition.holds():
                return False
        return True


class Condition(NamedTuple):
    """A condition on one module under which a trace holds."""

    module: nn.Module
    cls: type | None  #: None for the root, over whose class others may put theirs
    forward: Callable
    members: tuple | None  #: its modules, where they were called
    read: tuple[tuple[str, Any], ...]
    watched: bool | None  #: None for the root, whose hooks run around the trace

    def holds(self) -> bool:
        """Whether the condition still holds."""
        module, cls, forward, members, read, watched = self
        if cls is not None and module.__class__ is not cls:
            return False
        if forward_of(type(module)) is not forward:
            return False
        if members is not None and tuple(module._modules.values()) != members:
            return False
        if watched is not None and observed(module) is not watched:
            return False
        if read:
            values = module.__dict__
            for name, value in read:
                if name not in values or not same(values[name], value):
                    return False
        return True


def forward_of(cls: type) -> Callable:
    """A class's forward; that of the class which `fuse` has replaced, for one that it gave."""
    return original_of(cls).forward


def original_of(cls: type) -> type:
    """The class that `fuse` has replaced by `cls`; `cls` itself where `fuse` did not make it."""
    return getattr(cls, "fuse_original", cls)


def trace(root: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> Traced:
    """One forward of `root`, looking into every module that is no leaf."""
    with torch.enable_grad():  # a checkpoint is seen by what it does to this mode
        return _trace(root, is_leaf)


def _trace(root: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> Traced:
    tracer = Tracer(root, is_leaf)
    forward = forward_of(type(root))
    parameters, defaults = _arguments(forward)
    graph, why = None, ""
    try:
        if not parameters:
            raise Untraceable("its forward takes no tensor")
        with tracer.watching():
            arguments = [tracer.create_proxy("placeholder", name, (), {}) for name in parameters]
            out = forward(root, *arguments)
            tracer.graph.create_node("output", "output", (tracer.create_arg(out),))
        graph = tracer.graph
    except Untraceable as error:
        why = str(error)
    except Exception as error:  # a forward that asks a stand-in for what only a tensor has may fail in any way
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
    return Traced(root, graph, why, tracer.called, parameters, defaults, tracer.conditions())


def _arguments(forward: Callable) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The arguments that a forward has to be given, which are taken for tensors (any number for one), and the defaults of the others."""
    _, *parameters = inspect.signature(forward).parameters.values()
    given = tuple(p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD)
    return given, {p.name: p.default for p in parameters if p.default is not p.empty}


class Stand(Proxy):
    """A stand-in that passes for a tensor where the value is certain to be one, and ends the trace where that is asked of another."""

    def __init__(self, node: Node, tracer: TracerBase, is_tensor: bool):
        super().__init__(node, tracer)
        self.is_tensor_for_sure = is_tensor

    @property
    def __class__(self) -> type:
        if not self.is_tensor_for_sure:
            raise Untraceable("its forward asks for the type of a value")
        return Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "is_tensor_for_sure"):
            raise Untraceable("its forward sets attributes of tensors")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Attribute:
        if not hasattr(Tensor, name):
            raise AttributeError(name)
        return super().__getattr__(name)


def _in_place(name: str) -> Callable[[Stand, Any], Any]:
    """An operator such as +=, of which torch.fx would make +."""
    call = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", call, (self, other), {})


IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift", "imatmul")
for _name in IN_PLACE:
    setattr(Stand, f"__{_name}__", _in_place(_name))


class Tracer(TracerBase):
    """Writes down the calls of one forward."""

    def __init__(self, root: nn.Module, is_leaf: Callable[[nn.Module], bool]):
        super().__init__()
        self.graph = Graph()
        self.root = root
        self.module_stack, self.node_name_to_scope = OrderedDict(), {}
        self.called: dict[str, nn.Module] = {}
        self.names = {module: name for name, module in root.named_modules()}
        self.leaves = {module: is_leaf(module) for module in self.names if module is not root}
        self.classes = {module: type(module) for module in self.names}
        self.reads: dict[nn.Module, dict[str, Any]] = {}
        self.met: set[nn.Module] = {root}
        self._ambient = _ambient()

    # ---- what torch.fx asks of a tracer ------------------------------------------------------------------------------

    def create_node(self, kind: str, target: Any, args: tuple, kwargs: dict, name: str | None = None, type_expr: Any = None) -> Node:
        if _ambient() != self._ambient:
            raise Untraceable("its forward changes the mode of autograd or autocast")
        return self.graph.create_node(kind, target, args, kwargs, name, type_expr)

    def proxy(self, node: Node) -> Proxy:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op == "call_module":
            module = self.called[node.target]
            certain = gives_tensor(module)
        else:
            certain = node.op == "placeholder" or node.op == "get_attr" or name in _GIVES_TENSOR
        return Stand(node, self, certain)

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if issubclass(kind, Proxy):
            return a.node
        if issubclass(kind, Tensor):
            return self._held_tensor(a)
        if kind in (tuple, list, torch.Size):
            return (list if kind is list else tuple)(self.create_arg(item) for item in a)
        if kind in (dict, OrderedDict):
            made = {self._constant(key): self.create_arg(value) for key, value in a.items()}
            return made if kind is dict else self.create_node("call_function", OrderedDict, (list(made.items()),), {})
        if kind is slice:
            return slice(*map(self.create_arg, (a.start, a.stop, a.step)))
        return self._constant(a)

    def _constant(self, a: Any) -> Any:
        if isinstance(a, _CONSTANTS):
            return a
        raise Untraceable(f"its forward hands on {_a(type(a).__name__)}")

    def _held_tensor(self, tensor: Tensor) -> Node:
        for module, name in self.names.items():
            for key, value in (*module._parameters.items(), *module._buffers.items()):
                if value is tensor:
                    return self.create_node("get_attr", f"{name}.{key}" if name else key, (), {})
        raise Untraceable("its forward computes on parameters")

    # ---- modules that are called -------------------------------------------------------------------------------------

    def call(self, module: nn.Module, args: tuple, kwargs: dict, forward: Callable) -> Any:
        """What stands for module(*args, **kwargs): a node for a leaf; for another module, what its own call does."""
        self.met.add(module)
        if not self.leaves[module]:
            return forward(*args, **kwargs)
        return self.node_of(module, args, kwargs)

    def node_of(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if is_norm_and_act(module):  # two steps
            self.met.add(module.act)
            out = self._module_node(NORM_OF + self.names[module], module, args, kwargs)
            return self.call(module.act, (out,), {}, partial(nn.Module.__call__, module.act))
        return self._module_node(self.names[module], module, args, kwargs)

    def _module_node(self, target: str, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        self.called[target] = module
        if isinstance(module, nn.Conv2d):  # by which it is decided whether the operators can run it
            for name in ("padding", "padding_mode"):
                self.read(module, name, getattr(module, name))
        return self.create_proxy("call_module", target, args, kwargs)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Let the modules of the root tell this tracer what is called and read."""
        draws = _draws()
        before = getattr(_tracing, "tracer", None)
        for module, cls in self.classes.items():
            module.__class__ = _watched(cls)
        _tracing.tracer = self
        try:
            yield
        finally:
            _tracing.tracer = before
            for module, cls in self.classes.items():
                module.__class__ = cls
            changed = self._mend()
            drew = _draws() != draws
            if drew:
                _draw_again_from(draws)
        if changed:
            raise Untraceable(f"its forward changes {changed}")
        if drew:
            raise Untraceable("its forward draws random numbers")

    def read(self, module: nn.Module, name: str, value: Any) -> None:
        """Notes that the forward read an attribute that not every nn.Module has."""
        if name in _OWN or name in self.reads.setdefault(module, {}):
            return
        self.reads[module][name] = _snapshot(value, name)

    def _mend(self) -> str:
        """Give containers that the forward has written to their values back; the name of one such."""
        changed = ""
        for module, reads in self.reads.items():
            for name, value in reads.items():
                held = module.__dict__.get(name)
                if isinstance(held, (list, dict, set)) and not same(held, value):
                    held.clear()
                    held.extend(value) if isinstance(held, list) else held.update(value)
                    changed = name
        return changed

    def conditions(self) -> tuple[Condition, ...]:
        """What the trace rests on. Of a module that was not called, nothing."""
        return tuple(self._condition(module) for module in self.names if module in self.met or module in self.reads)

    def _condition(self, module: nn.Module) -> Condition:
        cls, root = self.classes[module], module is self.root
        members = None if self.leaves.get(module, False) else tuple(module._modules.values())
        read = tuple(self.reads.get(module, {}).items())
        return Condition(module, None if root else cls, forward_of(cls), members, read, None if root else observed(module))


#: Before the target of a node that stands for the norm alone of a module that is a norm and its activation.
NORM_OF = "norm of "


def is_norm_and_act(module: nn.Module) -> bool:
    """Whether a module is timm's BatchNormAct2d, or its frozen one: a norm with an activation behind it."""
    cls = type_of(module)
    if cls.__module__ != "timm.layers.norm_act" or cls.__name__ not in ("BatchNormAct2d", "FrozenBatchNormAct2d"):
        return False
    return type_of(module.drop) is nn.Identity


def type_of(module: nn.Module) -> type:
    """A module's class, also while it is traced."""
    cls = type(module)
    return cls.__mro__[2] if issubclass(cls, _Watched) else cls


def gives_tensor(module: nn.Module) -> bool:
    """Whether a leaf is certain to give one tensor."""
    cls = type_of(module)
    if isinstance(module, Block | PreActivation | nn.Conv2d | nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention | nn.Transformer) or getattr(module, "return_indices", False):
        return False
    return cls.__module__.startswith("torch.nn.modules")


class _Watched:
    """First base of the class that a module has while it is traced."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer = getattr(_tracing, "tracer", None)
        if tracer is None or not any(_has_stand(a) for a in (*args, *kwargs.values())):
            return super().__call__(*args, **kwargs)
        return tracer.call(self, args, kwargs, super().__call__)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        tracer = getattr(_tracing, "tracer", None)
        if tracer is not None and name in object.__getattribute__(self, "__dict__"):
            tracer.read(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(_tracing, "tracer", None) is not None and name != "__class__":
            raise Untraceable(f"its forward changes {name}")
        super().__setattr__(name, value)


@cache
def _watched(cls: type) -> type:
    return type(cls.__name__, (_Watched, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _has_stand(value: Any) -> bool:
    if type(value) in (list, tuple):
        return any(map(_has_stand, value))
    if type(value) is dict:
        return any(map(_has_stand, value.values()))
    return type(value) is Stand or type(value) is Attribute


def _snapshot(value: Any, name: str) -> Any:
    """What tells later whether an attribute is the same: itself, or a copy of a container of plain values."""
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        for item in items:
            _snapshot(item, name)
        return value.copy() if isinstance(value, (list, dict, set)) else value
    if isinstance(value, _PLAIN) or callable(value):
        return value
    raise Untraceable(f"its forward reads {name}, {_a(type(value).__name__)}")


def same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, complex, str, bytes, tuple, list, dict, set)) and a == b)


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _ambient() -> tuple:
    """What a forward can change around the calls it makes."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    casts = [(kind, autocasts(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind)]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks, casts


def _draws() -> tuple:
    """The states of the random generators."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), bytes(torch.get_rng_state().numpy()), None if numpy is None else str(numpy.random.get_state())


def _draw_again_from(state: tuple) -> None:
    random.setstate(state[0])
    torch.set_rng_state(torch.frombuffer(bytearray(state[1]), dtype=torch.uint8))


def calls(node: Node, *names: str) -> bool:
    """Whether a node calls a function or method of one of these names, of PyTorch or of the operators of Python."""
    if node.op == "call_method":
        return node.target in names
    if node.op != "call_function":
        return False
    where = getattr(node.target, "__module__", None) or ""
    known = where.startswith(("torch", "_operator")) or isinstance(node.target, BuiltinFunctionType)
    return known and getattr(node.target, "__name__", "") in names
