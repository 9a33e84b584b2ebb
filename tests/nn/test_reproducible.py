"""The same step gives the same bits, each time: no kernel adds values in an order that chance decides."""

import copy

import pytest
import torch
from support.chains import LANGUAGES, RUNNABLE
from torch import nn

import fused_resnet
from fused_resnet import models

BACKENDS = [name for name in (*LANGUAGES, "triton") if name in RUNNABLE]


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Loss, gradients and buffers of one step."""
    model = copy.deepcopy(model)
    assert all(module.training for module in model.modules())
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


def small(device: torch.device) -> nn.Module:
    """A block with a projection, and scores: each kind of kernel but the pools, and quick in Triton's interpreter."""
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(models.Bottleneck(16, 8, 1, projection), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(device)


def differ(backend: str, model: nn.Module, shape: tuple[int, ...], repeats: int, dtype: torch.dtype, device: torch.device) -> int:
    """In how many of `repeats` steps some tensor had other bits than in the first."""
    images = torch.randn(shape, device=device)
    labels = torch.randint(10, shape[:1], device=device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # of the framework's convolutions
    try:
        with fused_resnet.backend(backend):
            first = step(model, images, labels, dtype)
            return sum(
                any(not torch.equal(a, b) for a, b in zip(first, step(model, images, labels, dtype), strict=True)) for _ in range(repeats)
            )
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_few_steps_of_a_small_network(backend, device):
    assert differ(backend, small(device), (4, 16, 7, 6), 2, torch.float32, device) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_steps_of_resnet50(backend, device):
    model = models.resnet50(num_classes=10).to(device, memory_format=torch.channels_last)
    assert differ(backend, model, (32, 3, 224, 224), 100, torch.bfloat16, device) == 0


def test_another_order_of_a_sum_is_seen(device, monkeypatch):
    """The planted fault: the statistics of a batch whose images are summed in another order each time."""
    from fused_resnet.backends import BACKENDS

    passes = BACKENDS[LANGUAGES[-1]]
    right = passes.batch_stats

    def shuffled(y, *args):
        order = torch.randperm(y.shape[0], device=y.device)
        return right(y[order].contiguous(memory_format=torch.channels_last), *args)

    monkeypatch.setattr(passes, "batch_stats", shuffled)
    assert differ(passes.name, small(device), (16, 16, 7, 6), 3, torch.float32, device) > 0
