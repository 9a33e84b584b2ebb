"""The residual block: convolutions with norms, a shortcut around them, and the rule by which activations stay pending."""

from abc import abstractmethod
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .. import ops
from . import folded
from .activation import Activation
from .modules import (
    Requirement,
    batch_statistics,
    compute_dtype,
    conv_and_norm,
    is_conv,
    is_norm,
    is_nothing,
    is_relu,
    is_row,
    is_unobserved,
    met,
    runs_modules,
    why_not,
)
from .recompute import Recomputation, recomputation


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
        dtype = compute_dtype(x)
        if runs_modules(x, dtype):
            return self.forward_modules(x)
        return self.advance(enter(x, dtype)).finish()

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
        if not self.shortcut or not is_row(shortcut) or not 2 <= len(shortcut) <= 3:
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
        if not self.fusible():
            return Activation(folded.block_forward(self, a.finish()))  # in its own layout: whoever needs another converts
        first, *rest = self.branch()
        again = recomputation(self.recompute)
        with again or nullcontext():
            out, residual, statistics = self._first_convolution(a, first, again)
            for conv, norm in rest:
                x, conv = out, conv_and_norm(conv, norm, out.y.dtype)
                out = ops.norm_act_conv(x, conv)
                if again is not None:
                    again.ran(x, conv, out)
                statistics += batch_statistics(norm, out)
        return Activation(out, residual, a.statistics + statistics)

    def _first_convolution(self, a: Activation, first: tuple[nn.Conv2d, nn.BatchNorm2d], again: Recomputation | None):
        """Make the activation before this block while the first convolution (and the projection) reads it."""
        exists = isinstance(a.x, Tensor)
        if exists:  # under autocast, PyTorch's modules may have made it in float32
            a = enter(a.x, compute_dtype(a.x))
        dtype = a.x.dtype if exists else a.x.y.dtype
        conv, norm, projection = conv_and_norm(*first, dtype), first[1], self.projection()
        if projection is not None and projection[0] is None:
            _, conv2, norm2 = projection
            shortcut = conv_and_norm(conv2, norm2, dtype)
            if exists:
                (out, residual), act = ops.conv_stats_pair(a.x, conv, shortcut), a.x
            else:
                out, residual, act = ops.norm_add_act_conv_pair(a.x, a.residual, conv, shortcut)
            if again is not None:
                again.ran(a.x, conv, out, a.residual, act)
            return out, residual, batch_statistics(norm, out) + batch_statistics(norm2, residual)
        if exists:
            out, act = ops.conv_stats(a.x, conv), a.x
        elif self.shortcut or a.residual is not None:
            out, act = ops.norm_add_act_conv(a.x, a.residual, conv)
        else:  # nobody but this convolution reads the activation
            out, act = ops.norm_act_conv(a.x, conv), None
        if again is not None:
            again.ran(a.x, conv, out, a.residual, act)
        statistics = batch_statistics(norm, out)
        if not self.shortcut or self.downsample is None:
            return out, act if self.shortcut else None, statistics
        if projection is None:
            return out, enter(self.downsample(act), dtype).x, statistics
        pool, conv2, norm2 = projection
        residual = ops.conv_stats(enter(pool(act), dtype).x, conv_and_norm(conv2, norm2, dtype))
        return out, residual, statistics + batch_statistics(norm2, residual)


def enter(x: Tensor, dtype: torch.dtype | None = None) -> Activation:
    """A tensor as an activation: in channels_last, the one place where a network converts, and in `dtype`."""
    return Activation(to_nhwc(x if dtype is None else x.to(dtype)))


def to_nhwc(x: Tensor) -> Tensor:
    """x in channels_last; itself where it is so already."""
    return x.contiguous(memory_format=torch.channels_last)
