"""What a CUDA graph would hold of a network's step, without a GPU: no constant is made within, and no number of the device is asked for.

Kernels are not run: where each would be launched, nothing happens. A whole step in a graph, on a GPU: tests/nn/test_compile.py.
"""

from contextlib import contextmanager

import pytest
import torch
from support.chains import RUNNABLE
from support.small import SIZE, SmallNetwork
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet
from fused_resnet import reference
from fused_resnet.backends import BACKENDS

ATEN = torch.ops.aten
#: What makes numbers out of nothing, or of the host's.
MAKERS = ("ones", "full", "arange", "tensor", "scalar_tensor", "as_tensor", "linspace", "eye", "from_numpy", "ones_like", "full_like")
#: What waits for the device.
WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")
MADE = {
    ATEN.ones,
    ATEN.full,
    ATEN.arange,
    ATEN.scalar_tensor,
    ATEN.lift_fresh,
    ATEN.new_ones,
    ATEN.new_full,
    ATEN.ones_like,
    ATEN.full_like,
}
WAITED = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.equal, ATEN.is_nonzero}
NAMES = [name for name in RUNNABLE if name in ("triton", "passes_triton", "passes_cuda")]


class Seen(TorchDispatchMode):
    """The operators that run."""

    def __init__(self):
        super().__init__()
        self.packets = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.packets.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=NAMES)
def backend(request, device, monkeypatch):
    """A backend that was chosen for the device, and whose Triton kernels are not launched."""
    kernels = pytest.importorskip("fused_resnet.kernels.fprop")
    kernels.one.cache_clear()
    reference._ones.cache_clear()
    assert BACKENDS[request.param].why_not(device, torch.float32) is None
    monkeypatch.setattr("fused_resnet.kernels.launch.PreparedLaunch.__call__", lambda self, device, **tensors: None)
    return request.param


@pytest.fixture
def network(device) -> tuple[nn.Module, Tensor]:
    """A network and its images."""
    return SmallNetwork().to(device, memory_format=torch.channels_last), torch.zeros(SIZE, device=device).contiguous(
        memory_format=torch.channels_last
    )


def train(model: nn.Module, images: Tensor, gradient: Tensor) -> None:
    model(images).backward(gradient)


@torch.no_grad()
def infer(model: nn.Module, images: Tensor, gradient: Tensor) -> None:
    model(images)


@pytest.fixture
def refused(monkeypatch):
    """A context in which making a constant in Python, or waiting for the device, fails the test."""

    @contextmanager
    def within():
        with monkeypatch.context() as patched:
            for place, names in ((torch, MAKERS), (Tensor, WAITS)):
                for name in names:
                    patched.setattr(place, name, lambda *_, _name=name, **__: pytest.fail(f"{_name} was called"))
            yield

    return within


@pytest.mark.parametrize("run", [train, infer])
def test_a_step_makes_no_constant_and_waits_for_nothing(backend, network, run, refused):
    """From its first call on."""
    model, images = network
    if run is infer:
        model = fused_resnet.fold(model.eval())
    with fused_resnet.backend(backend), refused():
        run(model, images, torch.zeros(SIZE[0], 5, device=images.device))


def test_nor_do_the_operators_of_a_step_that_somebody_watches(backend, network):
    """By the dispatcher, each layer an operator: what ATen makes is seen as well."""
    model, images = network
    with fused_resnet.backend(backend), Seen() as seen:
        train(model, images, torch.zeros(SIZE[0], 5, device=images.device))
    assert ATEN.empty in seen.packets and not seen.packets & (MADE | WAITED)


def test_a_constant_that_is_made_late_is_seen(backend, network, refused):
    """The planted fault: what was made when the backend was chosen is forgotten."""
    model, images = network
    model = fused_resnet.fold(model.eval())
    reference._ones.cache_clear()
    with fused_resnet.backend(backend), refused(), pytest.raises(pytest.fail.Exception, match="ones was called"):
        infer(model, images, images)
