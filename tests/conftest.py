"""What all tests share: the device, a seed that a failure prints, the tiers, and torchvision where only its Python code loads."""

import importlib.util
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import tiers

CUDA = torch.cuda.is_available()
if not CUDA:  # before the kernels are imported: Triton's interpreter then runs them on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("FUSED_RESNET_BACKEND", None)

from support import executed  # noqa: E402
from support.emulated import Emulated  # noqa: E402

from fused_resnet import backends, native  # noqa: E402

if path := os.environ.get("FUSED_RESNET_TEST_CPU_LIBRARY"):  # another build of it, before it is loaded: tests/csrc/test_sanitized_cpu.py
    native.CPU.path = Path(path)
backends.BACKENDS[Emulated.name] = Emulated()
if executed.ARCHITECTURE:
    executed.install()


from support import devices  # noqa: E402  (it lists the backends that are tested: those of above among them)

if importlib.util.find_spec("triton"):
    from fused_resnet.kernels import launch

    LAUNCHES = devices.Launches(launch)
else:
    LAUNCHES = None


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


@pytest.fixture
def on_device(device) -> Iterator[torch.device]:
    """Whatever a test makes without saying where lies on the device: for tests of backends that a CPU has by Triton's interpreter alone."""
    before = torch.get_default_device()
    if CUDA:
        torch.set_default_device(device)
    yield device
    if CUDA:
        torch.set_default_device(before)


@pytest.fixture(autouse=True)
def launches_where_a_gpu_would(request) -> Iterator[None]:
    """Without a GPU, a test that launches kernels on a CPU's tensors whatever device there is fails: with one it would, too."""
    before = LAUNCHES.count if LAUNCHES else 0
    yield
    launched = LAUNCHES and not CUDA and LAUNCHES.count > before
    says_where = any(request.node.get_closest_marker(name) for name in ("cpu", "skipif"))
    if launched and not says_where and not devices.takes_the_device(request.function, request.fixturenames, request.module):
        pytest.fail("Triton's kernels were launched on a CPU's tensors, which fails where a GPU is: make them on the fixture `device`")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, and the largest integer, so that what a kernel leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def name(item: pytest.Item) -> str:
    """Of a test, wherever pytest was called from and whatever folder the file is in."""
    return f"{item.path.name}::{item.nodeid.partition('::')[2]}"


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """A seed for each test, printed with a failure: of its name, a new one with --fresh-seeds, or FUSED_RESNET_TEST_SEED."""
    fresh = request.config.getoption("--fresh-seeds")
    value = int(
        os.environ.get("FUSED_RESNET_TEST_SEED") or (random.SystemRandom().randrange(2**31) if fresh else tiers.number(name(request.node)))
    )
    print(f"seed: FUSED_RESNET_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture
def answers(monkeypatch):
    """Sets what a backend answers when it is asked why it can't run; forgotten after the test."""
    backends._remembered.cache_clear()

    def answer(name, why_not):
        monkeypatch.setattr(backends.BACKENDS[name], "why_not", why_not)
        backends._remembered.cache_clear()

    yield answer
    backends._remembered.cache_clear()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few cases of each parametrised test, as `make test` (tests/support/tiers.py)")
    parser.addoption("--fresh-seeds", action="store_true", help="new seeds in each run, instead of those of the tests' names")


def quick(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """The tests of `make test`: none marked full, and of a parametrised one few cases."""
    items = [item for item in items if not item.get_closest_marker("full")]
    families = defaultdict(dict)
    for item in items:
        if hasattr(item, "callspec"):
            # What runs in another tier, or not here, stands for nothing in this one.
            elsewhere = tuple(bool(item.get_closest_marker(marker)) for marker in ("slow", "gpu"))
            rows = dict(enumerate(item.callspec._idlist))  # one for each decorator: arguments that one of them sets together stay together
            families[item.path, item.nodeid.partition("[")[0], elsewhere][name(item)] = rows
    chosen = set().union(*map(tiers.each_value, families.values()))
    return (item for item in items if not hasattr(item, "callspec") or name(item) in chosen)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        kept = set(quick(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    for item in items:
        if item.get_closest_marker("gpu") and not CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("cpu") and CUDA:
            item.add_marker(pytest.mark.skip(reason="its kernels run on a CPU, which they do not where a GPU is"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where everything must be at hand, a skip is a failure; what needs a GPU is the exception."""
    outcome = yield
    report = outcome.get_result()
    if (
        report.skipped
        and os.environ.get("FUSED_RESNET_NO_SKIPS")
        and not item.get_closest_marker("gpu")
        and not hasattr(report, "wasxfail")
    ):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped where FUSED_RESNET_NO_SKIPS is set: {report.longrepr}"
