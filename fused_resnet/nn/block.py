"""The residual block: convolutions with norms, a shortcut around them, and the rule by which activations stay pending."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from .. import ops
from .activation import Activation
from .modules import batch_statistics, compute_dtype, conv_and_norm, is_conv, is_norm, is_relu, observed, runs_modules


class Block(nn.Module):
    """A residual block that hands its output on as an `Activation`, to be finished by whoever reads it.

    Called as a module it takes and gives tensors. A network of blocks calls `advance` instead (see `advance` below).
    Subclasses hold their modules under torchvision's names, and say with `branch` in which order they come.
    """

    #: Whether the input is added to the branch's output. A plain network's block (He et al. 2015, section 3.3) has no shortcut.
    shortcut = True

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

    def fusible(self) -> bool:
        """Whether the operators can stand for the modules of this block, and none of them is watched."""
        convs_and_norms = self.branch() + ([tuple(self.downsample)] if self._projects() else [])
        return (
            all(is_conv(conv) and is_norm(norm) for conv, norm in convs_and_norms)
            and is_relu(self.relu)
            and not (self.downsample is not None and observed(self.downsample))
        )

    def _projects(self) -> bool:
        """Whether the shortcut is a convolution and a norm."""
        return isinstance(self.downsample, nn.Sequential) and len(self.downsample) == 2

    def advance(self, a: Activation) -> Activation:
        """From the activation before this block to the one behind it, which stays pending."""
        if not self.fusible():
            return enter(self.forward_modules(a.finish()))
        first, *rest = self.branch()
        out, residual, statistics = self._first_convolution(a, first)
        for conv, norm in rest:
            out = ops.norm_act_conv(out, conv_and_norm(conv, norm, out.y.dtype))
            statistics += batch_statistics(norm, out)
        return Activation(out, residual, a.statistics + statistics)

    def _first_convolution(self, a: Activation, first: tuple[nn.Conv2d, nn.BatchNorm2d]):
        """Make the activation before this block while the first convolution (and the projection) reads it."""
        exists = isinstance(a.x, Tensor)
        if exists:  # under autocast, PyTorch's modules may have made it in float32
            a = enter(a.x, compute_dtype(a.x))
        dtype = a.x.dtype if exists else a.x.y.dtype
        conv, norm = conv_and_norm(*first, dtype), first[1]
        if self.shortcut and self._projects():
            projection = conv_and_norm(*self.downsample, dtype)
            if exists:
                out, residual = ops.conv_stats_pair(a.x, conv, projection)
            else:
                out, residual, _ = ops.norm_add_act_conv_pair(a.x, a.residual, conv, projection)
            return out, residual, batch_statistics(norm, out) + batch_statistics(self.downsample[1], residual)
        if exists:
            out, act = ops.conv_stats(a.x, conv), a.x
        elif self.shortcut or a.residual is not None:
            out, act = ops.norm_add_act_conv(a.x, a.residual, conv)
        else:  # nobody but this convolution reads the activation
            out, act = ops.norm_act_conv(a.x, conv), None
        residual = None
        if self.shortcut:
            residual = act if self.downsample is None else enter(self.downsample(act), dtype).x
        return out, residual, batch_statistics(norm, out)


class Stage(nn.Sequential):
    """Blocks in a row. Between them activations stay pending; its own output is a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last block for an activation x."""
        dtype = compute_dtype(x)
        if runs_modules(x, dtype):
            return super().forward(x)
        a = enter(x, dtype)
        for block in self:
            a = advance(block, a)
        return a.finish()


def advance(module: nn.Module, a: Activation) -> Activation:
    """Run `module` on `a` without making the activations between blocks; where a hook wants to see a tensor, it gets one."""
    if observed(module) or not isinstance(module, Block | Stage):
        return enter(module(a.finish()))
    if isinstance(module, Block):
        return module.advance(a)
    for block in module:
        a = advance(block, a)
    return a


def enter(x: Tensor, dtype: torch.dtype | None = None) -> Activation:
    """A tensor as an activation: in channels_last, the one place where a network converts, and in `dtype`."""
    return Activation(to_nhwc(x if dtype is None else x.to(dtype)))


def to_nhwc(x: Tensor) -> Tensor:
    """x in channels_last; itself where it is so already."""
    return x.contiguous(memory_format=torch.channels_last)
