"""The residual block: convolutions with norms, a shortcut around them, and the rule by which activations stay pending."""

from abc import abstractmethod
from collections.abc import Sequence

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
from .prepared import Prepared, prepared
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
        if known.is_whole:
            return advance_together([known], a, self.shortcut, self.recompute)
        x, given = _read(a)
        made = run_of(given, known.layers(x), self.shortcut, self.recompute)
        (_, act, _), (out, *_) = made[0], made[-1].pendings
        statistics, projection = known.statistics(made), known.projection
        if projection is None:
            residual = enter(self.downsample(act), x.dtype).x
        else:
            residual = ops.conv_stats(enter(known.pool(act), x.dtype).x, projection.layer(x))
            statistics += projection.statistics(residual)  # PyTorch's modules run it last
        return Activation(out, residual, (*a.statistics, *statistics))


def advance_together(known: Sequence[Prepared], a: Activation, shortcut: bool, recompute: bool = False) -> Activation:
    """From the activation before these blocks to the one behind them: one node of autograd. With `recompute` there is one block."""
    x, given = _read(a)
    blocks = [block.layers(x) for block in known]
    made = [run_of(given, blocks[0], shortcut, True)] if recompute else ops.convolve_blocks(given, blocks, shortcut)
    statistics = list(a.statistics)
    for block, of_block in zip(known, made, strict=True):
        statistics += block.statistics(of_block)
    (beside, act, _), (out, *_) = made[-1][0], made[-1][-1].pendings
    residual = beside[-1] if known[-1].beside else act if shortcut else None
    return Activation(out, residual, tuple(statistics))


def _read(a: Activation) -> tuple[Tensor, Source]:
    """(x, what stands for the activation). Under autocast, PyTorch's modules may have made it in float32."""
    if isinstance(a.x, Tensor):
        x = enter(a.x, compute_dtype(a.x)).x
        return x, Source(x)
    return a.x.y, ops.source(a.x, a.residual)


def enter(x: Tensor, dtype: torch.dtype | None = None) -> Activation:
    """A tensor as an activation: in channels_last, the one place where a network converts, and in `dtype`."""
    return Activation(to_nhwc(x if dtype is None else x.to(dtype)))


def to_nhwc(x: Tensor) -> Tensor:
    """x in channels_last; itself where it is so already."""
    return x.contiguous(memory_format=torch.channels_last)
