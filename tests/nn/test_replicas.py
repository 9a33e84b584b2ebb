"""Replicas, as `nn.DataParallel` makes them for each forward, on a CPU: PyTorch's own, but for the copies between GPUs."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.small import SIZE, network
from support.structures import OfLayers, PreUnit, Unit, Whole
from support.swapped import shake
from torch import Tensor, nn
from torch.nn.parallel import replicate

import fused_resnet
from fused_resnet.backends import BACKENDS


def of_torchvision() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return fused_resnet.fuse(shake(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).double())


def of_structure() -> nn.Module:
    return fused_resnet.fuse(shake(Whole(Unit(8, 12, 2), OfLayers(12, 12), PreUnit(12, 12), channels=12)).double())


#: What is replicated, and whether its replicas run the operators.
MODELS = {
    "ours": (network, True),
    "ours, recomputing": (lambda: fused_resnet.recompute(network()), True),
    "torchvision's": (of_torchvision, True),
    "known by structure": (of_structure, False),
}


@pytest.fixture
def copies(monkeypatch):
    """What replicas hold on a CPU: the first the very tensors, the second copies that autograd leads back to them."""

    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t if detach else t.view_as(t) for t in tensors], [t.detach().clone() if detach else t.clone() for t in tensors]]

    monkeypatch.setattr(sys.modules[replicate.__module__], "_broadcast_coalesced_reshape", broadcast)


def step(model: nn.Module, x: Tensor, backend: str) -> Tensor:
    """The outputs of two replicas, each with its half in a thread of its own; gradients are the model's."""
    replicas = replicate(model, [0, 1])
    assert all(not list(replica.parameters()) for replica in replicas)

    def forward(replica: nn.Module, part: Tensor) -> Tensor:
        with fused_resnet.backend(backend):
            return replica(part)

    with ThreadPoolExecutor(2) as threads:
        out = torch.cat(list(threads.map(forward, replicas, x.chunk(2))))
    out.square().sum().backward()
    return out.detach()


@pytest.mark.parametrize("name", MODELS)
def test_replicas_train_as_pytorchs(name, copies, monkeypatch, torchvision_models):
    """Two steps: outputs, every gradient, and the first replica's statistics, which are the model's."""
    make, fused = MODELS[name]
    ours = make()
    plain, calls = copy.deepcopy(ours), []
    original = BACKENDS["eager"].convolve
    monkeypatch.setattr(BACKENDS["eager"], "convolve", lambda *args: calls.append(1) or original(*args), raising=False)
    for _ in range(2):
        x = torch.randn((4, 3, 48, 40) if name == "torchvision's" else SIZE, dtype=torch.float64)
        for model in (ours, plain):
            model.zero_grad()
        torch.testing.assert_close(step(ours, x, "eager"), step(plain, x, "off"), rtol=1e-9, atol=1e-9)
        for (key, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
            assert p.grad is not None and (p.grad - q.grad).norm() <= 1e-8 * q.grad.norm().clamp_min(1e-6), key
        for (key, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=key)
    assert bool(calls) == fused
