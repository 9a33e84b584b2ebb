"""What is known of other packages' modules: torchvision's and timm's residual networks, and nn.Sequential.

A class is known by its name and its package's, so that neither need be installed, and only while the methods that we stand for are
that package's own: a subclass that overrides one of them is somebody else's network.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Block, PreActivation, Stage
from ..nn.activation import Activation
from ..nn.chain import run
from ..nn.folded import is_folded
from ..nn.modules import (
    WANTED,
    Requirement,
    is_frozen_norm,
    is_frozen_norm_act,
    is_norm_act,
    is_nothing,
    observed,
    runs_fused,
)
from .trace import original_of


def is_as_known(module: nn.Module) -> bool:
    """Whether the class that `fuse` has replaced still has the methods that it had."""
    original = module.fuse_original
    for name, method in module.fuse_methods:  # noqa: SIM110  (a generator costs the host as much as what it asks)
        if getattr(original, name) is not method:
            return False
    return True


class _Known:
    """A module whose class is known."""

    def forward_modules(self, x: Any) -> Any:
        """The original's own forward."""
        return self.fuse_original.forward(self, x)


class _Leaf(_Known):
    """A block that is one node for torchvision's feature extraction, so that it stays fused. Other tracers of torch.fx look into it: what
    they are about, quantization for one, is its convolutions."""

    def fuse_trace(self, x: torch.fx.Proxy) -> torch.fx.Proxy:
        if type(x.tracer).__module__ != "torchvision.models.feature_extraction" or (isinstance(self, Block) and is_folded(self)):
            return self.forward_modules(x)
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def requirements(self) -> list[Requirement]:
        return [(is_as_known, self), *super().requirements()]


class _Transparent(_Known):
    """A module that torch.fx looks into."""

    def fuse_trace(self, x: torch.fx.Proxy) -> Any:
        return self.forward_modules(x)


CONV_BN = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
NORM_CONV = (("norm1", "conv1"), ("norm2", "conv2"), ("norm3", "conv3"))


def _pairs(block: nn.Module, names: tuple[tuple[str, str], ...]) -> list[tuple[nn.Module, nn.Module]]:
    """A block's modules of these names: two pairs of them in a basic block, three in a bottleneck."""
    modules = block._modules
    return [(modules[first], modules[second]) for first, second in names if second in modules]


class TorchvisionBlock(_Leaf, Block):
    """torchvision's BasicBlock or Bottleneck."""

    def branch(self) -> list[tuple[nn.Module, nn.Module]]:
        return _pairs(self, CONV_BN)


class TimmBlock(TorchvisionBlock):
    """timm's BasicBlock or Bottleneck: a ReLU for each norm, and places for what the operators have no step for."""

    def relus(self) -> list[nn.Module]:
        return [self.act1, self.act2, *([self.act3] if "act3" in self._modules else [])]

    def requirements(self) -> list[Requirement]:
        extras = (self.drop_block, self.aa, self.se, self.drop_path)
        return [(is_nothing, module) for module in extras] + super().requirements()


class TimmPreActBlock(_Leaf, PreActivation):
    """timm's PreActBasic or PreActBottleneck, whose norms hold their ReLU."""

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        return _pairs(self, NORM_CONV)

    def shortcut_modules(self) -> tuple[nn.Module | None, nn.Module | None]:
        if self.downsample is None:
            return None, None
        pool = self.downsample._modules.get("pool")
        return None if is_nothing(pool) else pool, self.downsample.conv

    def norm_requirements(self) -> list[Requirement]:
        needed = [(is_norm_act, norm) for norm, _ in self.layers()] + [(is_nothing, self.drop_path)]
        if self.downsample is not None:
            needed += [(is_downsample, self.downsample), (is_nothing, self.downsample.norm)]
        return needed


def is_downsample(module: nn.Module) -> bool:
    """timm's DownsampleConv or DownsampleAvg."""
    cls = original_of(type(module))
    timms = cls.__module__ == "timm.models.resnetv2" and cls.__name__ in ("DownsampleConv", "DownsampleAvg")
    return timms and not observed(module)


WANTED[is_downsample] = "not timm's, free of hooks"
WANTED[is_as_known] = "whose class was changed after fuse"


class Sequence(_Transparent, Stage):
    """nn.Sequential, or a subclass with the same forward."""

    def fuse_trace(self, x: torch.fx.Proxy) -> Any:
        return nn.Sequential.forward(self, x)


class TorchvisionResNet(_Transparent):
    """torchvision's ResNet: from the stem to the average pool in a row."""

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of images x."""
        if not runs_fused(x):
            return self.forward_modules(x)
        rows = (self.conv1, self.bn1, self.relu, self.maxpool, self.layer1, self.layer2, self.layer3, self.layer4, self.avgpool)
        return self.fc(torch.flatten(run(rows, Activation(x)).finish(), 1))


class TimmResNet(_Transparent):
    """timm's ResNet: from the stem to the last block in a row. Pool, dropout and classifier stay timm's."""

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of images x."""
        return self.forward_modules(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last block's output."""
        if self.grad_checkpointing or not runs_fused(x):
            return self.fuse_original.forward_features(self, x)
        rows = (self.conv1, self.bn1, self.act1, self.maxpool, self.layer1, self.layer2, self.layer3, self.layer4)
        return run(rows, Activation(x)).finish()


class LayerGetter(_Transparent):
    """torchvision's IntermediateLayerGetter, the body of its detection and segmentation networks."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs of the layers that are asked for, by their new names."""
        if not runs_fused(x):
            return self.forward_modules(x)
        found, row = OrderedDict(), []
        for name, module in self.items():
            row.append(module)
            if name in self.return_layers:
                x = run(row, Activation(x)).finish()
                found[self.return_layers[name]] = x
                row = []
        return found


#: (package, class) -> (what is known of it, the methods that must be its own).
KNOWN: dict[tuple[str, str], tuple[type, tuple[str, ...]]] = {
    ("torchvision.models.resnet", "BasicBlock"): (TorchvisionBlock, ("forward",)),
    ("torchvision.models.resnet", "Bottleneck"): (TorchvisionBlock, ("forward",)),
    ("torchvision.models.resnet", "ResNet"): (TorchvisionResNet, ("forward", "_forward_impl")),
    ("torchvision.models._utils", "IntermediateLayerGetter"): (LayerGetter, ("forward",)),
    ("timm.models.resnet", "BasicBlock"): (TimmBlock, ("forward",)),
    ("timm.models.resnet", "Bottleneck"): (TimmBlock, ("forward",)),
    ("timm.models.resnet", "ResNet"): (TimmResNet, ("forward_features",)),
    ("timm.models.resnetv2", "PreActBasic"): (TimmPreActBlock, ("forward",)),
    ("timm.models.resnetv2", "PreActBottleneck"): (TimmPreActBlock, ("forward",)),
    ("torch.nn.modules.container", "Sequential"): (Sequence, ("forward",)),
}


def knowledge_of(cls: type[nn.Module]) -> type | None:
    """What is known of a class, by itself or by a base whose methods it keeps; None where that is nothing."""
    if issubclass(cls, Block | PreActivation | Stage):  # ours, which are fused as they are
        return None
    for base in cls.__mro__:
        knowledge, methods = KNOWN.get((base.__module__, base.__qualname__), (None, ()))
        if knowledge is not None and all(getattr(cls, name) is getattr(base, name) and is_own(base, name) for name in methods):
            return knowledge if cls.__call__ is nn.Module.__call__ else None
    return None


def is_own(cls: type, name: str) -> bool:
    """Whether a method is what the class's own file defines, and nothing that somebody has put in its place."""
    method = getattr(cls, name)
    code, init = getattr(method, "__code__", None), getattr(cls.__init__, "__code__", None)
    return None not in (code, init) and code.co_filename == init.co_filename and method.__qualname__ == f"{cls.__qualname__}.{name}"


def is_norm_layer(module: nn.Module) -> bool:
    """Any batch norm of two dimensions, ours to fuse or not."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_frozen_norm(module) or is_frozen_norm_act(module)
