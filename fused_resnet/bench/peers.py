"""Batch norms of other makers in a network of this package: cuDNN's, apex's, inplace_abn's.

`install` puts them in the place of PyTorch's, with the same parameters, and runs each block so that a norm does what it can do in one
kernel: the ReLU behind it, and at a block's end the addition. Nothing of it is imported before it is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ..nn import Block, ResidualNetwork

ATEN = torch.ops.aten
APEX_DTYPES = (torch.float16,)
#: Of inplace_abn's leaky ReLU: it can't have ReLU, which throws away what its backward computes the input from.
SLOPE = 0.01


class CudnnNorm(nn.Module):
    """cuDNN's batch norm in the layout of its input; the ReLU is ATen's."""

    def __init__(self, norm: nn.BatchNorm2d, act: bool):
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        running = n.running_mean, n.running_var
        out = ATEN.cudnn_batch_norm(x, n.weight, n.bias, *running, n.training, n.momentum, n.eps)[0]
        return out.relu_() if self.act else out


class ApexNorm(nn.Module):
    """apex's batch norm for NHWC (apex.contrib.groupbn), with the residual's addition and ReLU in its kernel. float16 alone."""

    def __init__(self, norm: nn.BatchNorm2d, act: bool):
        super().__init__()
        from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

        self.norm = BatchNorm2d_NHWC(norm.num_features, fuse_relu=act)
        _take_over(self.norm, norm)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dtype not in APEX_DTYPES:
            raise RuntimeError(f"apex's batch norm takes float16, not {x.dtype}")
        # It counts NHWC as the order of the dimensions, and does not look at strides.
        x, residual = (None if t is None else t.permute(0, 2, 3, 1).contiguous() for t in (x, residual))
        return self.norm(x, residual).permute(0, 3, 1, 2)


class InPlaceNorm(nn.Module):
    """inplace_abn's batch norm, which writes its result over its input, with a leaky ReLU or none."""

    def __init__(self, norm: nn.BatchNorm2d, act: bool):
        super().__init__()
        from inplace_abn import InPlaceABN

        activation = "leaky_relu" if act else "identity"
        self.norm = InPlaceABN(norm.num_features, norm.eps, norm.momentum, activation=activation, activation_param=SLOPE)
        _take_over(self.norm, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class LeakyNorm(nn.Module):
    """PyTorch's batch norm with inplace_abn's activation: what that one is compared with."""

    def __init__(self, norm: nn.BatchNorm2d, act: bool):
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(x)
        return nn.functional.leaky_relu(out, SLOPE) if self.act else out


@dataclass(frozen=True)
class Norms:
    """Batch norms that stand for PyTorch's in a network."""

    make: Callable[[nn.BatchNorm2d, bool], nn.Module]  #: (PyTorch's, whether an activation follows) -> the other maker's
    package: str = "torch"  #: that has to be installed
    on_cpu: bool = False  #: whether it runs there as well
    adds: bool = False  #: whether the norm at a block's end takes the residual as well, and makes the ReLU behind the addition
    like: "Norms | None" = None  #: what computes the same with PyTorch's operators; None where PyTorch's own modules do

    @property
    def installed(self) -> bool:
        """Whether the package is there. Whether it works is seen when it is used."""
        return find_spec(self.package) is not None


NORMS = {
    "cudnn": Norms(CudnnNorm),
    "apex": Norms(ApexNorm, "apex", adds=True),
    "inplace_abn": Norms(InPlaceNorm, "inplace_abn", on_cpu=True, like=Norms(LeakyNorm, on_cpu=True)),
}


def install(module: nn.Module, norms: Norms) -> None:
    """Put `norms` into a network of `fused_resnet.models`, or into a block of one, in the place of PyTorch's.

    Names and order of parameters stay as they are but for a level, `norm`. Raises RuntimeError where a package is not installed or
    does not run on the module's device, and for a network that is not of this package's blocks.
    """
    if not norms.installed:
        raise RuntimeError(f"{norms.package} is not installed")
    device = next(module.parameters()).device
    if device.type != "cuda" and not norms.on_cpu:
        raise RuntimeError(f"these batch norms run on CUDA GPUs, not on {device.type!r}")
    owners = [m for m in module.modules() if isinstance(m, Block | ResidualNetwork)]
    if not owners:
        raise RuntimeError(f"expected a network of fused_resnet.models, whose norms are known; got {type(module).__name__}")
    for owner in owners:
        if isinstance(owner, Block):
            *inner, (_, last) = owner.branch()
            for _, norm in inner:
                _swap(owner, norm, norms.make(norm, True))
            _swap(owner, last, norms.make(last, norms.adds))
            if isinstance(owner.downsample, nn.Sequential):
                _swap(owner.downsample, owner.downsample[1], norms.make(owner.downsample[1], False))
            owner.forward_modules = partial(_run_block, owner, norms.adds)
        else:
            _swap(owner, owner.bn1, norms.make(owner.bn1, True))
            owner.relu = nn.Identity()


def _run_block(block: Block, adds: bool, x: Tensor) -> Tensor:
    """A block's forward, whose norms include the activations."""
    residual = None
    if block.shortcut:
        residual = x if block.downsample is None else block.downsample(x)
    *inner, (conv, norm) = block.branch()
    for inner_conv, inner_norm in inner:
        x = inner_norm(inner_conv(x))
    x = conv(x)
    if adds:
        return norm(x, residual)
    x = norm(x)
    return torch.relu(x if residual is None else x + residual)


def _swap(owner: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, child in owner.named_children() if child is old)
    setattr(owner, name, new)


def _take_over(new: nn.Module, norm: nn.BatchNorm2d) -> None:
    """Let another maker's norm have the parameters and the running statistics of PyTorch's."""
    new.to(norm.weight.device)
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(new, name, getattr(norm, name))
