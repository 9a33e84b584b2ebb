"""Folded networks: convolutions that hold the norms behind them, with nn.Identity in the norms' place (`fused_resnet.fold`).

Where only numbers are wanted, each such convolution, its bias, the residual and the ReLU are one call of a backend. In training mode,
where a gradient may flow, or where somebody looks on (a compiler, a tracer, a hook), PyTorch's modules run one after the other, with the
same result to rounding.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..derived import derived
from .activation import Activation
from .modules import (
    Requirement,
    compute_dtype,
    geometry,
    held,
    is_conv,
    is_folded_conv,
    is_norm,
    is_nothing,
    is_relu,
    is_row,
    met,
    takes,
)

#: What stands, in a folded block, where a block has what the first asks for.
_INSTEAD = {is_conv: is_folded_conv, is_norm: is_nothing}


def requirements(block: nn.Module) -> list[Requirement]:
    """What must be true of the modules of a `Block`, that it is folded, and that one call a convolution can stand for them."""
    return [(_INSTEAD.get(fits, fits), module) for fits, module in block.requirements()]


def is_folded(block: nn.Module) -> bool:
    """Whether `requirements` are met."""
    return met(requirements(block))


def block_forward(block: nn.Module, branch: list[tuple[nn.Module, nn.Module]], a: Activation) -> Activation:
    """The output of a `Block` that is not `fusible`, for an activation [N, C, H, W]: folded, or by PyTorch's modules."""
    given = a.finish()
    if block.training or not (inferring(given, block.modules()) and is_folded(block) and takes(branch[0][0], given)):
        return Activation(block.forward_modules(given))
    out = x = _as_read(given, compute_dtype(given))
    *inner, (last, _) = branch
    for conv, _ in inner:
        out = conv_act(out, conv)
    if not block.shortcut:
        return Activation(conv_act(out, last), owned=True)
    residual, owned = _shortcut(block, x)
    owned = owned or (residual is given and a.owned and out is not x)  # a single convolution reads what it would write over
    return Activation(conv_act(out, last, residual, owned=owned), owned=True)


def conv_act_length(queue: Sequence[nn.Module], position: int) -> int:
    """How many of the modules from `position` on are a folded convolution, its nn.Identity, and a ReLU; 2 without one, else 0."""
    members = queue[position : position + 3]
    if len(members) < 2 or not (is_folded_conv(members[0]) and is_nothing(members[1])):
        return 0
    return 3 if len(members) == 3 and is_relu(members[2]) else 2


def row_forward(members: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What the members that `conv_act_length` counts make of x [N, C, H, W]."""
    if not members[0].training and takes(members[0], x) and inferring(x, members):
        return conv_act(_as_read(x, compute_dtype(x)), members[0], relu=len(members) == 3)
    for module in members:
        x = module(x)
    return x


def _shortcut(block: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """(what is added, whether it was made here and nobody else has seen it)."""
    projection = block.downsample
    if projection is None:
        return x, False
    *before, conv, norm = projection if is_row(projection) and len(projection) > 1 else (None, None)
    if is_folded_conv(conv) and is_nothing(norm):
        for module in before:  # timm's average pool
            x = module(x)
        return conv_act(_as_read(x, x.dtype), conv, relu=False), True
    return _as_read(projection(x), x.dtype), False


def conv_act(x: Tensor, conv: nn.Conv2d, residual: Tensor | None = None, relu: bool = True, owned: bool = False) -> Tensor:
    """One call of the backend's, which may write over a residual that is `owned`. Under autocast, weights are rounded once."""
    weight = held(conv, "weight")
    if weight.dtype != x.dtype:
        weight = derived(weight, x.dtype, lambda: weight.to(x.dtype))
    return ops.conv_affine_act(x, weight, geometry(conv), None, conv.bias, residual, relu, owned)


def inferring(x: Tensor, modules: Iterable[nn.Module]) -> bool:
    """Whether only numbers are wanted of x and of the parameters of `modules`, and there are any."""
    if not ops.inferring(x) or x.numel() == 0:
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(isinstance(t, Tensor) and t.requires_grad for m in modules for t in (*m._parameters.values(), *vars(m).values()))


def _as_read(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as the backends take it; itself but at a network's entry, and behind modules of others."""
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
