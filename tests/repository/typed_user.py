"""A user's program, for the type checker alone: `make lint` reads it with mypy's strict rules. Nothing runs it.

It uses every public name, and says which type it expects back. tests/repository/test_rules.py holds that no name is missing.
"""

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import functional, models


def networks() -> None:
    network: nn.Module = models.resnet50(weights=None, num_classes=10)
    small: models.CifarResNet = models.resnet20(num_classes=10, in_channels=1)
    named: nn.Module = models.get_model(models.list_models()[0], num_classes=10)
    stage: nn.Module = fused_resnet.nn.Stage(fused_resnet.BasicBlock(8, 8), fused_resnet.Bottleneck(8, 2))
    layers: list[nn.Module] = [fused_resnet.ConvBNAct2d(3, 8, stride=2), stage, fused_resnet.PreActBlock(8, 16, stride=2)]
    scores: Tensor = small.forward(torch.randn(2, 1, 28, 28))
    print(network, named, layers, scores)


def fusing(model: nn.Module) -> None:
    fused: nn.Module = fused_resnet.fuse(model)
    fused = fused_resnet.recompute(fused, enabled=True)
    text: str = str(fused_resnet.report(fused))
    folded: nn.Module = fused_resnet.fold(fused.eval())
    plain: nn.Module = fused_resnet.unfuse(fused)
    with fused_resnet.backend("eager"):
        scores = folded(torch.randn(2, 3, 32, 32))
    freed: int = fused_resnet.release_memory()
    version: str = fused_resnet.__version__
    print(text, plain, scores, freed, version)


def one_layer(x: Tensor, weight: Tensor, vectors: list[Tensor]) -> None:
    gamma, beta, mean, var = vectors
    act: Tensor = functional.conv_bn_act(x, weight, gamma, beta, mean, var, residual=None, training=True, momentum=0.1, padding=1)
    norm = fused_resnet.ops.Norm(gamma, beta, None, None, True, 1e-5)
    conv = fused_resnet.ops.Conv(weight, norm, fused_resnet.ops.ConvGeometry.of(1, 1, 1, 1))
    pending: fused_resnet.ops.Pending = fused_resnet.ops.conv_stats(x, conv)
    act = fused_resnet.ops.norm_add_act(pending)
    print(act)
