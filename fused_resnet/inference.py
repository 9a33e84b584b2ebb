"""Inference without batch norms: in eval mode a norm is an affine map with constants, which its convolution can hold.

What then runs a convolution with its bias, residual and ReLU as one kernel is in `nn.folded`.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import nn

from .convert import fuse, unfuse
from .convert.kinds import frozen_eps, is_norm_like, keeps
from .convert.known import LayerGetter, TimmPreActBlock, TimmResNet, TorchvisionResNet
from .convert.structure import Structured, plans_of
from .convert.trace import is_norm_and_act
from .nn import Block, ResidualNetwork
from .nn.modules import changed, is_row, observed


def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` in which convolutions hold the batch norms behind them; nn.Identity stands where those were.

    The same outputs to rounding, for a network in eval mode: weight·scale and a bias, scale = gamma / sqrt(running_var + eps), in float64
    and rounded once. Its parameters require no gradient, and its keys are not those of `model`.

    The copy is fused as by `fuse`: where no gradient can flow and a backend runs, each of these convolutions with its bias, residual and
    ReLU is one kernel of the backend's. Everywhere else, and for whoever exports, traces or compiles it, it is PyTorch's modules, one
    after the other. `unfuse` leaves those alone.

    Folded is each norm that alone reads a convolution's output, where `fuse` can follow the forward that calls them; not those of this
    package's `PreActBlock`. A norm that normalises by its batch's statistics, that a hook watches, or whose convolution has a hook or
    another norm besides, stays a norm.

    Raises ValueError where `model` or a part of it is in training mode.
    """
    training = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model: expected a network in eval mode, by model.eval(); {training[0]} is in training mode")
    folded = _fused(copy.deepcopy(model)).requires_grad_(False)  # so that modules tell their convolutions and norms
    holders = _holders(folded)
    for conv, norm in _once(pair for module in list(folded.modules()) for pair in _pairs(module)):
        _replace(holders, conv, fold_norm(conv, norm))
        _replace(holders, norm, norm.act if is_norm_and_act(norm) else nn.Identity())
    return _fused(unfuse(folded))  # by what it is now


def _fused(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network of which nothing can be fused
        return fuse(model)


def foldable(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether `fold_norm` can take these two, neither has a hook, and nobody has changed what PyTorch's classes do."""
    return (
        not changed()
        and keeps(conv, nn.Conv2d, "_conv_forward")
        and is_norm_like(norm)
        and norm.running_mean is not None
        and not observed(conv)
    )


@torch.no_grad()
def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """One convolution, in eval mode, that gives norm(conv(x)): conv with or without a bias, norm by its running statistics."""
    eps = norm.eps if hasattr(norm, "eps") else frozen_eps(norm)
    scale = (norm.running_var.double() + eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.running_mean * scale if conv.bias is None else (conv.bias - norm.running_mean) * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    weight = conv.weight
    out = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        bias=True, padding_mode=conv.padding_mode, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    out.weight.data = torch.empty_like(weight).copy_(weight.double() * scale[:, None, None, None])
    out.bias.data = bias.to(weight.dtype)
    return out.eval().requires_grad_(False)


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The convolutions and norms of `module`, as they follow each other."""
    if isinstance(module, Structured):
        plan = plans_of(module).current()[1]
        yield from plan.folds if plan is not None else ()
    elif isinstance(module, ResidualNetwork | TorchvisionResNet | TimmResNet | LayerGetter):
        conv, norm = (module._modules.get(name) for name in ("conv1", "bn1"))
        yield conv[-1] if isinstance(conv, nn.Sequential) else conv, norm  # a deep stem
    elif isinstance(module, Block):
        yield from module.branch()
    elif isinstance(module, TimmPreActBlock):
        layers = module.layers()
        yield from ((conv, norm) for (_, conv), (norm, _) in pairwise(layers))
    elif is_row(module):
        yield from pairwise(module)


def _once(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> list[tuple[nn.Module, nn.Module]]:
    """The pairs that can be folded, whose convolution has no other norm, and whose norm no other convolution."""
    found = dict.fromkeys((conv, norm) for conv, norm in pairs if foldable(conv, norm))
    times = Counter(module for pair in found for module in pair)
    return [pair for pair in found if times[pair[0]] == times[pair[1]] == 1]


def _holders(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """For each module the modules that hold it, and the names by which they do."""
    holders: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for holder in model.modules():
        for name, child in holder._modules.items():
            if child is not None:
                holders.setdefault(child, []).append((holder, name))
    return holders


def _replace(holders: dict[nn.Module, list[tuple[nn.Module, str]]], old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is held."""
    for holder, name in holders.get(old, ()):
        setattr(holder, name, new)
