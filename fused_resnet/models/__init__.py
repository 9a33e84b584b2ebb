"""The networks: torchvision's ten builders, the paper's networks for 32×32 images, and its plain networks.

Each builder makes an untrained network unless `weights` says otherwise; on a GPU its blocks run fused.
"""

from typing import Any

from torch import nn

from .blocks import BasicBlock, Bottleneck, ConvBNAct2d, PlainBlock, PreActBlock
from .cifar import (
    CifarResNet,
    plain20,
    plain32,
    plain44,
    plain56,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    resnet1202,
)
from .resnet import (
    ResNet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

_BUILDERS = {
    build.__name__: build
    for build in (
        resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d, resnext101_32x8d, resnext101_64x4d,
        wide_resnet50_2, wide_resnet101_2, resnet20, resnet32, resnet44, resnet56, resnet110, resnet1202,
        plain18, plain34, plain20, plain32, plain44, plain56,
    )
}  # fmt: skip

# Written out: a type checker takes nothing else for exported.
__all__ = [
    "BasicBlock", "Bottleneck", "CifarResNet", "ConvBNAct2d", "PlainBlock", "PreActBlock", "ResNet", "get_model", "list_models",
    "plain18", "plain20", "plain32", "plain34", "plain44", "plain56", "resnet18", "resnet20", "resnet32", "resnet34", "resnet44",
    "resnet50", "resnet56", "resnet101", "resnet110", "resnet152", "resnet1202", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
    "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip


def list_models() -> list[str]:
    """The names of all builders."""
    return list(_BUILDERS)


def get_model(name: str, **kwargs: Any) -> nn.Module:
    """The network that the builder `name` makes of `kwargs`. Raises ValueError, with the known names, for an unknown one."""
    if name not in _BUILDERS:
        raise ValueError(f"model: expected one of {', '.join(_BUILDERS)}; got {name!r}")
    return _BUILDERS[name](**kwargs)
