"""The residual block: convolutions with norms, a shortcut around them, and the rule by which activations stay pending."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Pending, Source
from . import folded
from .activation import Activation
from .modules import (
    Requirement,
    compute_dtype,
    is_conv,
    is_norm,
    is_nothing,
    is_relu,
    is_row,
    is_unobserved,
    met,
    runs_modules,
    takes,
    why_not,
)
from .prepared import prepared
from .recompute import run_of


class Block(nn.Module):
    """A residual block that hands its output on as an `Activation`, to be finished by whoever reads it.

    Called as a module it takes and gives tensors. A network of blocks calls `advance` instead (see `advance` below).
    Subclasses hold their modules under torchvision's names, and say with `branch` in which order they come.
    """

    #: Whether the input is added to the branch's output. A plain network's block (He et al. 2015, section 3.3) has no shortcut.
    shortcut = True
    #: Whether what backward needs of the inside of the branch is made again instead of kept; `fused_resnet.recompute` sets it.
    recompute = False

    relu: nn.ReLU
    downsample: nn.Module | None

    @abstractmethod
    def branch(self) -> list[tuple[nn.Module, nn.Module]]:
        """The convolutions and norms of the branch, in order. A ReLU stands between them."""

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [N, K, P, Q] for an activation x [N, C, H, W]."""
        if runs_modules(x, compute_dtype(x)):
            return self.forward_modules(x)
        return self.advance(Activation(x)).finish()

    def forward_modules(self, x: Tensor) -> Tensor:
        """The same by PyTorch's own modules, one after the other."""
        out = x
        *inner, (last_conv, last_norm) = self.branch()
        for conv, norm in inner:
            out = self.relu(norm(conv(out)))
        out = last_norm(last_conv(out))
        if self.shortcut:
            out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)

    def relus(self) -> list[nn.Module]:
        """The modules that stand for ReLU."""
        return [self.relu]

    def projection(self) -> tuple[nn.Module | None, nn.Module, nn.Module] | None:
        """(a pool or None, convolution, norm) of a shortcut that is made of these; None for any other."""
        shortcut = self.downsample
        if shortcut is None or not self.shortcut or not is_row(shortcut) or not 2 <= len(shortcut) <= 3:
            return None
        *pools, conv, norm = shortcut
        if not pools:
            return None, conv, norm
        return (None if is_nothing(pools[0]) else pools[0], conv, norm) if is_conv(conv) and is_norm(norm) else None

    def requirements(self) -> list[Requirement]:
        """What must be true of the modules of this block so that the operators can stand for them."""
        projection = self.projection()
        pairs = self.branch() + ([] if projection is None else [projection[1:]])
        needed = [(fits, module) for pair in pairs for fits, module in zip((is_conv, is_norm), pair, strict=True)]
        return needed + [(is_relu, module) for module in self.relus()] + [(is_unobserved, self.downsample)]

    def fusible(self) -> bool:
        """Whether the operators can stand for the modules of this block, and none of them is watched."""
        return met(self.requirements())

    def why_not(self) -> str | None:
        """Why this block runs PyTorch's own modules, in words; None where it need not."""
        wanted = folded.requirements(self) if type(self.branch()[0][1]) is nn.Identity else self.requirements()
        return why_not(wanted, {module: name for name, module in self.named_modules()})

    def advance(self, a: Activation) -> Activation:
        """From the activation before this block to the one behind it, which stays pending."""
        known = prepared(self)
        if known is None or not (isinstance(a.x, Pending) or takes(known.pairs[0].conv, a.x)):
            return folded.block_forward(self, self.branch(), a)
        if isinstance(a.x, Tensor):  # under autocast, PyTorch's modules may have made it in float32
            x = enter(a.x, compute_dtype(a.x)).x
            given = Source(x)
        else:
            x, given = a.x.y, ops.source(a.x, a.residual)
        made = run_of(given, known.layers(x), self.shortcut, self.recompute)
        statistics, projection = list(a.statistics), known.projection
        for pair, (pendings, _, _) in zip(known.pairs, made, strict=True):
            out = pendings[0]
            statistics += pair.statistics(out)
        act = made[0].act
        if known.beside:
            residual = made[0].pendings[-1]
        elif not self.shortcut or self.downsample is None:
            residual = act if self.shortcut else None
        elif projection is None:
            residual = enter(self.downsample(act), x.dtype).x
        else:
            residual = ops.conv_stats(enter(known.pool(act), x.dtype).x, projection.layer(x))
        if projection is not None:  # PyTorch's modules run it last
            statistics += projection.statistics(residual)
        return Activation(out, residual, tuple(statistics))


def enter(x: Tensor, dtype: torch.dtype | None = None) -> Activation:
    """A tensor as an activation: in channels_last, the one place where a network converts, and in `dtype`."""
    return Activation(to_nhwc(x if dtype is None else x.to(dtype)))


def to_nhwc(x: Tensor) -> Tensor:
    """x in channels_last; itself where it is so already."""
    return x.contiguous(memory_format=torch.channels_last)
