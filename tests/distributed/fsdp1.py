"""FSDP1 (`FullyShardedDataParallel`), which by default holds parameters as plain tensors, against PyTorch's modules in one process."""

import copy

import torch
from common import fused_resnet, labels, local_average, mine, processes, summed_loss, worst
from conftest import TORCHVISION
from support.small import SIZE, network
from support.structures import PreUnit, Unit, Whole
from support.swapped import shake
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torchvision.models.resnet import BasicBlock, ResNet

from fused_resnet import models
from fused_resnet.backends import BACKENDS

assert TORCHVISION  # imported before torchvision: its binary library need not load
LEARNING_RATE = 0.01


def of_torchvision() -> nn.Module:
    return shake(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).double()


def of_structure() -> nn.Module:
    return shake(Whole(Unit(8, 12, 2), PreUnit(12, 12), channels=12)).double()


#: What is sharded -> (how it is made, what is done to it, its blocks, images, runs of convolutions in a forward)
NETWORKS = {
    "ours": (network, lambda model: model, {models.BasicBlock, models.Bottleneck}, SIZE, 12),
    "ours, recomputing": (network, fused_resnet.recompute, {models.BasicBlock, models.Bottleneck}, SIZE, 12),
    "torchvision's": (of_torchvision, fused_resnet.fuse, {BasicBlock}, (4, 3, 48, 40), 9),
    "known by structure": (of_structure, fused_resnet.fuse, {Unit, PreUnit}, (4, 3, 32, 24), 7),
}


def gradients(ours: FullyShardedDataParallel, x: torch.Tensor) -> list[torch.Tensor]:
    """Of a step, whole: what a step of SGD takes from the parameters."""
    optimizer = torch.optim.SGD(ours.parameters(), lr=LEARNING_RATE)
    optimizer.zero_grad()
    with FullyShardedDataParallel.summon_full_params(ours):
        before = [p.detach().clone() for p in ours.module.parameters()]
    with fused_resnet.backend("eager"):
        summed_loss(ours(mine(x)), mine(labels(x)), len(mine(x))).backward()
    optimizer.step()
    with FullyShardedDataParallel.summon_full_params(ours):
        return [(p - q.detach()) / LEARNING_RATE for p, q in zip(before, ours.module.parameters(), strict=True)]


def trains_as_pytorchs(name: str, by_block: bool, original: bool) -> None:
    """Two steps; `original`: parameters stay parameters, views of the flat one."""
    make, change, blocks, size, runs = NETWORKS[name]
    one = make()
    ours = FullyShardedDataParallel(
        change(copy.deepcopy(one)),
        device_id=torch.device("cpu"),
        use_orig_params=original,
        auto_wrap_policy=ModuleWrapPolicy(blocks) if by_block else None,
    )
    calls, eager = [], BACKENDS["eager"]
    eager.convolve = lambda *args, original=eager.convolve: calls.append(1) or original(*args)
    for _ in range(2):
        x, calls[:] = torch.randn(size, dtype=torch.float64), ()
        expected = local_average(one, x)
        found = gradients(ours, x)
        assert len(calls) == runs, (name, by_block, original, len(calls))
        for (key, p), gradient in zip(expected.named_parameters(), found, strict=True):
            assert (gradient - p.grad).norm() < 1e-8 * p.grad.norm().clamp_min(1e-3), (name, by_block, original, key)
        assert worst(ours, expected, "buffers") < 1e-8, (name, by_block, original)
        torch.optim.SGD(expected.parameters(), lr=LEARNING_RATE).step()
        expected.zero_grad()
        one = expected
    del eager.convolve


with processes():
    for name in NETWORKS:
        for by_block, original in ((True, False), (False, True)):
            trains_as_pytorchs(name, by_block, original)
