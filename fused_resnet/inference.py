"""Inference without batch norms: in eval mode a norm is an affine map with constants, which its convolution can hold.

What then runs a convolution with its bias, residual and ReLU as one kernel is in `nn.folded`.
"""

import copy
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from .convert import fuse
from .convert.known import LayerGetter, TimmResNet, TorchvisionResNet
from .nn import Block, ResidualNetwork
from .nn.modules import is_frozen_norm, observed


def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` in which convolutions hold the batch norms behind them; nn.Identity stands where those were.

    The same outputs to rounding, for a network in eval mode: weight·scale and a bias, scale = gamma / sqrt(running_var + eps), in float64
    and rounded once. Its parameters require no gradient, and its keys are not those of `model`.

    The copy is fused as by `fuse`: where no gradient can flow and a backend runs, each of these convolutions with its bias, residual and
    ReLU is one kernel of the backend's. Everywhere else, and for whoever exports, traces or compiles it, it is PyTorch's modules, one
    after the other. `unfuse` leaves those alone.

    Looked at are the stems and blocks that `fuse` knows, torchvision's, timm's and this package's, and convolutions that a norm follows
    within an nn.Sequential. A norm that normalises by its batch's statistics, that a hook watches, or whose convolution has a hook, stays
    a norm.

    Raises ValueError where `model` or a part of it is in training mode.
    """
    training = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model: expected a network in eval mode, by model.eval(); {training[0]} is in training mode")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network without a block that is known
        folded = fuse(copy.deepcopy(model)).requires_grad_(False)  # so that blocks tell their convolutions and norms
    for module in list(folded.modules()):
        for conv, norm in list(_pairs(module)):  # a list, since what it is read from is changed
            if foldable(conv, norm):
                _replace(module, conv, fold_norm(conv, norm))
                _replace(module, norm, nn.Identity())
    return folded


def foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether `fold_norm` can take these two, and nobody watches either."""
    known = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_frozen_norm(norm)
    return type(conv) is nn.Conv2d and known and norm.running_mean is not None and not observed(conv) and not observed(norm)


@torch.no_grad()
def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """One convolution, in eval mode, that gives norm(conv(x)): conv with or without a bias, norm by its running statistics."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
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
    if isinstance(module, ResidualNetwork | TorchvisionResNet | TimmResNet | LayerGetter):
        conv, norm = (module._modules.get(name) for name in ("conv1", "bn1"))
        yield conv[-1] if isinstance(conv, nn.Sequential) else conv, norm  # a deep stem
    elif isinstance(module, Block):
        yield from module.branch()
    elif isinstance(module, nn.Sequential):
        yield from zip(list(module), list(module)[1:], strict=False)


def _replace(owner: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` where `owner`, or one of its children, holds `old`."""
    for holder in (owner, *owner.children()):
        for name, child in holder.named_children():
            if child is old:
                setattr(holder, name, new)
