"""The torch.library namespace, and how an operator enters it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "fused_resnet"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
PLAIN = (Tensor, torch.nn.Parameter)
# What is asked at each call, twice, found once.
_modes = torch._C._len_torch_dispatch_stack
_transforms, _is_wrapped = torch._C._functorch.peek_interpreter_stack, torch._C._functorch.is_functorch_wrapped_tensor
_is_stacked = torch._C._functorch.is_legacy_batchedtensor  # by `is_grads_batched` and vectorised jacobians
_profiles, _traces = torch._C._autograd._profiler_enabled, torch._C._get_tracing_state
_DIRECT: dict[str, Callable[..., Any]] = {}


def define(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], differentiable: Callable[..., Any] | None = None
) -> None:
    """Define a functional operator: one implementation for all devices, its fake, and what runs it as a node of autograd.

    `define` and `impl` rather than `custom_op`, which costs several microseconds more at each call. Without `differentiable`, as a
    backward operator is, differentiating through it is an error and never a missing gradient.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, differentiable or _differentiable(name, _below_autograd(name), None, _refuse(name)), "Autograd")


def define_with_formula(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """`define` of an operator that `call` finds, by its autograd formula over the schema's flat arguments."""
    name = schema.partition("(")[0]
    formula = setup_context, backward or _refuse(name)
    define(schema, implementation, fake, _differentiable(name, _below_autograd(name), *formula))
    _DIRECT[name] = _differentiable(name, implementation, *formula)


def _below_autograd(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(name)(*args)

    return run


def _differentiable(
    name: str, run: Callable[..., Any], setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`run` as a node of autograd where something wants a gradient.

    `torch.library.register_autograd` does the same, and looks for default arguments at each call: 0.1 ms for our thirty, which have none.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node = type(f"{name}_node", (torch.autograd.Function,), members)

    def differentiable(*args: Any) -> Any:
        if wants_gradient(*args):
            return node.apply(*args)
        return run(*args)

    return differentiable


def call(name: str) -> Callable[..., Any]:
    """The operator of that name, to be called.

    Where nobody watches the dispatcher, its implementation is called without it: three trips of thirty arguments between Python and C++
    cost more than all else that an operator does on the host.
    """
    direct = _DIRECT[name]

    def run(*args: Any) -> Any:
        return overload(name)(*args) if is_watched(args[0]) else direct(*args)

    return run


def is_watched(x: Tensor) -> bool:
    """Whether an operator on x has to pass the dispatcher, since somebody sees it pass: x is not plain, or a profiler lists operators."""
    return not is_plain(x) or _profiles()  # in this order: a compiler does not get to the second


def is_plain(x: Tensor) -> bool:
    """Whether x is numbers and nothing else: no compiler, tracer, mode, transform, subclass or fake looks for operators on it."""
    return not (torch.compiler.is_compiling() or is_wrapped(x) or x.is_meta or _modes() > 0 or is_transformed() or _traces() is not None)


def is_wrapped(x: Tensor) -> bool:
    """Whether x stands for other tensors: of a subclass, or of a transform."""
    return type(x) not in PLAIN or _is_wrapped(x) or _is_stacked(x)


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, or forward-mode AD."""
    return forward_ad._current_level >= 0 or _is_in_transform()


def _is_in_transform() -> bool:
    return _transforms() is not None


# A compiler asks, too, and does not look inside: while it traces a transform, that is on the stack, which it guards.
_is_in_transform._dynamo_marked_constant = True


def wants_gradient(*args: Any) -> bool:
    """Whether one of the arguments is a tensor that wants a gradient.

    Raises RuntimeError where one has a tangent: the operators have no formula for forward-mode AD, and none is ever left out.
    """
    if forward_ad._current_level >= 0 and any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in args):
        raise RuntimeError('forward-mode AD is not supported by the fused operators; use fused_resnet.backend("off") around the forward')
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def _refuse(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{NAMESPACE}::{name} can't be differentiated: double backward is not supported by the fused operators; "
            f'use fused_resnet.backend("off") around the forward'
        )

    return backward


def overload(name: str) -> Callable[..., Any]:
    """The operator of that name, its overload resolved."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor, for a result that there is none of: an operator's results are tensors, of a fixed number."""
    return like.new_empty((0,), dtype=dtype)


def present(t: Tensor | None) -> Tensor | None:
    """None for what is `nothing`. A tensor of an empty batch is something."""
    return None if t is None or t.dim() == 1 else t


def empty_nhwc(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [N, C, H, W] in channels_last, on the device of `like` and of its dtype unless another is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def channels_last(grad: Tensor | None) -> Tensor | None:
    """A gradient in channels_last: autograd may hand over any strides, an expanded one for a sum."""
    return None if grad is None else grad.contiguous(memory_format=torch.channels_last)
