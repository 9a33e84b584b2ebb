"""The benchmark of the host's time runs: its backend without kernels takes a whole step of ResNet-50."""

import importlib.util
from pathlib import Path

from fused_resnet.backends import BACKENDS

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "python_overhead.py"


def test_a_step_without_kernels(torchvision_models, monkeypatch):
    spec = importlib.util.spec_from_file_location("python_overhead", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setitem(BACKENDS, bench.NoKernels.name, bench.NoKernels())
    found = bench.measure(rounds=1)
    assert set(found) == {"eager", "fused"} and all(t >= 0 for pair in found.values() for t in pair)
    fused = found["fused"]
    assert sum(fused) < 1.0, "a kernel did run"
