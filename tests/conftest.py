"""What all tests share: the device, a fresh seed that a failure prints, and torchvision where only its Python code loads."""

import os
import random
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:  # before the kernels are imported: Triton's interpreter then runs them on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("FUSED_RESNET_BACKEND", None)

from emulated import Emulated  # noqa: E402

from fused_resnet import backends  # noqa: E402

backends.BACKENDS[Emulated.name] = Emulated()


def _import_torchvision() -> bool:
    """Import torchvision; where its binary library does not load, define the two operators that its Python code asks for."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return False
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision  # noqa: F401

        torchvision._operators = library  # definitions live as long as their library
    return True


TORCHVISION = _import_torchvision()


@pytest.fixture
def torchvision_models():
    """torchvision.models; the test is skipped where torchvision is missing."""
    if not TORCHVISION:
        pytest.skip("torchvision is not installed")
    from torchvision import models

    return models


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """A new seed for each test, printed with a failure; FUSED_RESNET_TEST_SEED repeats one."""
    value = int(os.environ.get("FUSED_RESNET_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"seed: FUSED_RESNET_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture
def answers(monkeypatch):
    """Sets what a backend answers when it is asked whether it declines; forgotten after the test."""
    backends._declines.cache_clear()

    def answer(name, declines):
        monkeypatch.setattr(backends.BACKENDS[name], "declines", declines)
        backends._declines.cache_clear()

    yield answer
    backends._declines.cache_clear()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where everything must be at hand, a skip is a failure; what needs a GPU is the exception."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("FUSED_RESNET_NO_SKIPS") and not item.get_closest_marker("gpu") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped where FUSED_RESNET_NO_SKIPS is set: {report.longrepr}"
