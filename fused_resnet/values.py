"""The values that travel between operators and backends: an activation that is still to be made, a convolution, a norm, what reads what.

Each is a NamedTuple, and so a pytree wherever PyTorch looks. Activations are [N, C, H, W] in `channels_last`; per-channel vectors are [C]
in the accumulate dtype, which is float64 for float64 tensors and float32 for all others.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .collectives import share_sums
from .problem import ConvProblem


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums over tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def values_per_channel(t: Tensor) -> int:
    """N·H·W of t [N, C, H, W]."""
    n, _, h, w = t.shape
    return n * h * w


def problem_of(x: Tensor, weight: Tensor, geometry: "ConvGeometry") -> ConvProblem:
    """The convolution of x by `weight` in numbers: the same object for the same shapes."""
    stride, padding, dilation, groups = geometry
    return _problem(x.shape, weight.shape, tuple(stride), tuple(padding), tuple(dilation), groups)


@lru_cache(4096)  # asked several times a convolution, and what is asked is checked
def _problem(x: torch.Size, weight: torch.Size, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> ConvProblem:
    (n, c, h, w), (k, _, r, s) = x, weight
    return ConvProblem(n, c, h, w, k, r, s, stride, padding, dilation, groups)


def nhwc(t: Tensor) -> Tensor:
    """`t` in channels_last. For results of ATen whose layout is not promised."""
    return t.contiguous(memory_format=torch.channels_last)


class Pending(NamedTuple):
    """A raw convolution output and its norm, not yet applied. A NamedTuple, and so a pytree wherever PyTorch looks."""

    y: Tensor  #: [N, K, P, Q], as the convolution rounded it
    mean: Tensor  #: [K]; its gradient is s1
    invstd: Tensor  #: [K]; its gradient is s2
    var: Tensor  #: [K], for the running statistics: biased, but unbiased where the norm has a group, whose count only the operator knows
    scale: Tensor  #: [K], gamma·invstd
    bias: Tensor  #: [K], beta − mean·scale


class ConvGeometry(NamedTuple):
    """How a convolution moves over its input: each field as `torch.nn.functional.conv2d` takes it."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @classmethod
    def of(cls, stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int], groups: int) -> "ConvGeometry":
        """The same from what `conv2d` also takes: one number for both directions."""
        if type(stride) is type(padding) is type(dilation) is tuple and len(stride) == len(padding) == len(dilation) == 2:
            return cls(stride, padding, dilation, groups)
        return cls(_pair(stride), _pair(padding), _pair(dilation), groups)


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    if isinstance(value, int):
        return value, value
    return value if len(value) != 1 else (*value, *value)


class Norm(NamedTuple):
    """The batch norm of a convolution's output. Vectors are [C] or None; `training` tells whose statistics normalise.

    `group` names the process group that shares the batch's statistics; "" where a process keeps its own.
    """

    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    eps: float
    group: str = ""


class Conv(NamedTuple):
    """A convolution [K, C/groups, R, S] without bias, and the norm of its output."""

    weight: Tensor
    norm: Norm
    geometry: ConvGeometry


class Source(NamedTuple):
    """What an operator reads: an activation that exists (only `x` is given), or one that is still to be made.

    Then x is raw, with its norm, and `residual` is None, an activation, or raw with a norm of its own.
    """

    x: Tensor
    mean: Tensor | None = None
    invstd: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    residual_mean: Tensor | None = None
    residual_invstd: Tensor | None = None
    residual_scale: Tensor | None = None
    residual_bias: Tensor | None = None

    @property
    def pending(self) -> bool:
        """Whether x is a raw convolution output."""
        return self.scale is not None

    def kind(self, mask: Tensor | None = None) -> str:
        """What is read: "act", "norm", "norm_add" or "norm_add_raw", for an activation that exists, or whose residual is none, one, or raw.

        Backward tells a residual that is an activation, and was not kept, by its mask.
        """
        if not self.pending:
            return "act"
        if self.residual_mean is not None:
            return "norm_add_raw"
        return "norm" if self.residual is None and mask is None else "norm_add"


class ConvOutput(NamedTuple):
    """One output of `convolve`, as its backward sees it. dz, s1, s2 are None where nobody used the output."""

    dz: Tensor | None
    s1: Tensor | None
    s2: Tensor | None
    y: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor
    gamma: Tensor | None
    training: bool
    geometry: ConvGeometry
    need_dw: bool
    group: str = ""  #: of its norm

    def ready(self) -> "ConvOutput":
        """The same with dz in channels_last, and with (s1, s2) of all processes that share the norm. Every one of these must ask.

        Autograd may hand dz over in any strides, an expanded one for a sum. The sums are scaled as `share_sums` does.
        """
        dz, s1, s2 = self.dz, self.s1, self.s2
        if dz is None or (not self.group and dz.is_contiguous(memory_format=torch.channels_last)):
            return self
        dz = nhwc(dz)
        if self.group and self.training:
            s1, s2 = share_sums(values_per_channel(self.y), s1, s2, self.group)
        return self._replace(dz=dz, s1=s1, s2=s2)
