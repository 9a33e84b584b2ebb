"""With the backend `off` the networks are PyTorch's own modules, on a CPU as elsewhere, and cost no more."""

import time

import pytest
import torch

from fused_resnet import backend, models


def step_seconds(model, x) -> float:
    """The wall-clock time of one forward and backward."""
    start = time.perf_counter()
    with backend("off"):
        model(x).sum().backward()
    return time.perf_counter() - start


@pytest.mark.alone
def test_resnet50_on_a_cpu_costs_what_torchvisions_costs(torchvision_models):
    """At most 1.05 times: the best of interleaved steps, so that what else the machine does falls on both."""
    ours, theirs = models.resnet50(), torchvision_models.resnet50()
    x = torch.randn(4, 3, 96, 96)
    step_seconds(ours, x), step_seconds(theirs, x)
    times = []
    for rounds in (10, 20, 40):
        times += [(step_seconds(ours, x), step_seconds(theirs, x)) for _ in range(rounds)]
        best = [min(t) for t in zip(*times, strict=True)]
        print(f"best of {len(times)}: ours {best[0]:.4f} s, torchvision {best[1]:.4f} s, ratio {best[0] / best[1]:.3f}")
        if best[0] <= 1.05 * best[1]:
            return
    raise AssertionError(f"resnet50 took {best[0] / best[1]:.3f} times torchvision's step")
