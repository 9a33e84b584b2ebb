"""What an operator costs the host: the benchmark of its time runs, and a step enters as few functions as it did when it was measured."""

import sys

import pytest
import torch
from support.checkout import script

import fused_resnet
from fused_resnet.backends import BACKENDS

#: Of a step of ResNet-50: 53 convolutions, four of them in one operator with another, and two pools.
OPERATORS = 51
#: Functions that a step may enter for each of these, both ways. 47.0 with PyTorch 2.13; more than 200 through the dispatcher.
LIMIT = 49


@pytest.fixture
def bench(monkeypatch):
    """The benchmark as a module, its backend registered."""
    bench = script("bench/python_overhead.py")
    monkeypatch.setitem(BACKENDS, bench.NoKernels.name, bench.NoKernels())
    return bench


def test_a_step_without_kernels(torchvision_models, bench):
    """The backend without kernels takes a whole step of ResNet-50."""
    found = bench.measure(rounds=1)
    assert set(found) == {"eager", "fused", "recompute"} and all(t >= 0 for pair in found.values() for t in pair)
    fused = found["fused"]
    assert sum(fused) < 1.0, "a kernel did run"


def python_calls(run) -> int:
    """How many functions of Python a call of `run` enters, those of autograd's nodes included."""
    entered = 0

    def count(frame, event, _):
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


def test_a_step_enters_few_functions(torchvision_models, bench):
    """Time is noise on a shared machine, the number of calls is not. Through the dispatcher, as under a profiler, it is above the limit."""
    model = fused_resnet.fuse(torchvision_models.resnet50())
    x, dy = torch.zeros(2, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.zeros(2, 1000)
    with fused_resnet.backend(bench.NoKernels.name):
        model(x).backward(dy)
        few = python_calls(lambda: model(x).backward(dy))
        with torch.autograd.profiler.profile():
            watched = python_calls(lambda: model(x).backward(dy))
    assert few <= LIMIT * OPERATORS < watched, f"{few} calls, {watched} where somebody watches"
