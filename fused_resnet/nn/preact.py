"""The pre-activation block of He et al. 2016: norm and ReLU before each convolution, the shortcut free of both."""

from abc import abstractmethod

from torch import Tensor, nn

from .. import ops
from ..ops import Conv, Norm, Source
from .activation import update_running_statistics
from .block import enter
from .modules import (
    Requirement,
    batch_statistics,
    compute_dtype,
    conv_and_norm,
    geometry,
    is_conv,
    met,
    norm_of,
    runs_fused,
    takes,
    weight_for,
    why_not,
)
from .recompute import run_of


class PreActivation(nn.Module):
    """x + conv(relu(norm(… conv(relu(norm(x)))))). Takes and gives tensors: the next norm wants statistics of the sum.

    A projection reads the first activation, as the first convolution does. Subclasses hold the modules, and say with `layers` which.
    """

    #: As of `Block`.
    recompute = False

    @abstractmethod
    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """The norms and the convolutions behind them, in order."""

    @abstractmethod
    def forward_modules(self, x: Tensor) -> Tensor:
        """The block by PyTorch's own modules, one after the other."""

    @abstractmethod
    def norm_requirements(self) -> list[Requirement]:
        """What must be true of norms and ReLUs."""

    def shortcut_modules(self) -> tuple[nn.Module | None, nn.Module | None]:
        """(a pool or None, the projection or None). A projection is a convolution without a norm."""
        return None, None

    def requirements(self) -> list[Requirement]:
        """What must be true of the modules of this block so that the operators can stand for them."""
        projection = self.shortcut_modules()[1]
        convs = [conv for _, conv in self.layers()] + ([] if projection is None else [projection])
        return [*self.norm_requirements(), *((is_conv, conv) for conv in convs)]

    def fusible(self) -> bool:
        """Whether the operators can stand for the modules of this block, and none of them is watched."""
        return met(self.requirements())

    def why_not(self) -> str | None:
        """Why this block runs PyTorch's own modules, in words; None where it need not."""
        return why_not(self.requirements(), {module: name for name, module in self.named_modules()})

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [N, K, P, Q] for x [N, C, H, W], which is no activation: a sum of branches."""
        if not (runs_fused(x) and self.fusible() and takes(self.layers()[0][1], x)):
            return self.forward_modules(x)
        x = enter(x, compute_dtype(x)).x
        pairs, (pool, projection) = self.layers(), self.shortcut_modules()
        norms = [norm for norm, _ in pairs]
        act, normed = ops.norm_act(x, norm_of(norms[0]))
        layers = [[_conv(conv, after, x)] for (_, conv), after in zip(pairs, [*norms[1:], None], strict=True)]
        if projection is not None and pool is None:
            layers[0].append(_conv(projection, None, x))
        made = run_of(Source(act), layers, True, self.recompute)
        outs = [normed, *(first for (first, *_), _, _ in made)]
        if projection is None:
            residual = x
        elif pool is None:
            residual = made[0].pendings[-1]
        else:
            # By an operator: its weight's gradient has the weight's strides. Its norm changes nothing, so y is what it stands for.
            residual = ops.conv_stats(enter(pool(act), x.dtype).x, _conv(projection, None, x)).y
        update_running_statistics(sum((batch_statistics(norm, out) for norm, out in zip(norms, outs, strict=False)), ()))
        return ops.norm_add_act(outs[-1], residual, relu=False)


def _conv(conv: nn.Conv2d, norm: nn.Module | None, x: Tensor) -> Conv:
    """A convolution with the norm behind it. Where there is none, one that changes nothing: scale 1, bias 0, exactly."""
    if norm is not None:
        return conv_and_norm(conv, norm, x)
    weight = weight_for(conv, x)
    zeros, ones = (fill((conv.out_channels,)) for fill in (weight.new_zeros, weight.new_ones))
    return Conv(weight, Norm(None, None, zeros, ones, False, 0.0), geometry(conv))
