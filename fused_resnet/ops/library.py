"""The torch.library namespace, and how an operator enters it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fused_resnet"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define a functional operator with one implementation for all devices, its fake and its autograd formula.

    `define` and `impl` rather than `custom_op`, which costs several microseconds more at each call. Without a formula, as a
    backward operator has none, differentiating through it is an error and never a missing gradient.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward or _refuse(name), setup_context=setup_context, lib=LIBRARY
    )


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
    return like.new_empty(0, dtype=dtype)


def empty_nhwc(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [N, C, H, W] in channels_last, on the device of `like` and of its dtype unless another is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def channels_last(grad: Tensor | None) -> Tensor | None:
    """A gradient in channels_last: autograd may hand over any strides, an expanded one for a sum."""
    return None if grad is None else grad.contiguous(memory_format=torch.channels_last)
