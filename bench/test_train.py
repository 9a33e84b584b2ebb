"""The suite `train` under pytest-benchmark: `pytest bench/test_train.py --benchmark-json train.json`.

One training step of ResNet-50 on a GPU (batch 256, bfloat16), or of resnet18, small, on a CPU, ours and its peers. A step is timed up
to its end on the device. bench/train.py writes the figures that the documents show.
"""

import pytest
import torch
import train

from fused_resnet.bench import steps, timing
from fused_resnet.bench.schema import read_results
from fused_resnet.bench.steps import Batches, TrainingStep, distance
from fused_resnet.bench.timing import Times, measure

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
MODEL, BATCH, SIZE = ("resnet50", 256, 224) if CUDA else ("resnet18", 8, 64)


@pytest.fixture(scope="module")
def batches():
    return Batches(BATCH, SIZE, 1000, DEVICE)


@pytest.mark.parametrize("impl", ["eager", "eager_nhwc", "compile", "ours"] if CUDA else ["eager", "eager_nhwc", "ours"])
def test_step(benchmark, impl, batches):
    torch.backends.cudnn.benchmark = True
    step = TrainingStep(MODEL, impl, DTYPE, batches)
    benchmark.extra_info.update(model=MODEL, batch=BATCH, dtype=str(DTYPE))

    def call():
        step()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20 if CUDA else 3, warmup_rounds=5 if CUDA else 1)


ARGUMENTS = ["--device", "cpu", "--dtype", "fp32", "--repeats", "3", "--model", "resnet18", "--commit", "c0ffee"]


def test_the_program_writes_what_it_measured(tmp_path):
    assert train.main([*ARGUMENTS, "--out", str(tmp_path), "--impl", "eager_nhwc", "ours"]) == 0
    (path,) = tmp_path.rglob("*.json")
    rows = read_results(path).rows
    assert [row.impl for row in rows] == ["eager_nhwc", "ours"]
    for row in rows:
        assert row.status == "ok"
        assert row.images_per_s == pytest.approx(8 / (row.median_ms * 1e-3))
        assert row.max_rel_error < 5e-3  # a ReLU that rounding turns costs some 1e-3
        assert row.tflops > 0 and row.roofline_fraction > 0


def test_what_is_wrong_gets_no_figure(tmp_path, monkeypatch):
    class Faulty(TrainingStep):
        def gradients(self):
            return [1.1 * g if self.backend == "auto" else g for g in super().gradients()]

    monkeypatch.setattr(train, "TrainingStep", Faulty)
    assert train.main([*ARGUMENTS, "--out", str(tmp_path), "--impl", "ours"]) == 1
    (path,) = tmp_path.rglob("*.json")
    (row,) = read_results(path).rows
    assert row.status.startswith("wrong: the gradient is 1.0e-01 from float32's")
    assert row.median_ms is None


def test_half_precision_gradients_are_those_of_the_loss():
    batches = Batches(8, 64, 1000, torch.device("cpu"))
    wide = TrainingStep("resnet18", "eager_nhwc", torch.float32, batches)
    narrow = TrainingStep("resnet18", "eager_nhwc", torch.bfloat16, batches, wide.module.state_dict())
    assert 0 < distance(narrow.gradients(), wide.gradients()) < 0.5
    assert steps.LOSS_SCALE != 1


def test_distance_of_a_nan_is_infinite():
    assert distance([torch.tensor([1.0]), torch.tensor([float("nan")])], [torch.tensor([1.0]), torch.tensor([1.0])]) == float("inf")


def test_a_peer_that_fails_drops_out_and_the_others_go_on():
    def full():
        raise torch.OutOfMemoryError("no room\nat all")

    results = measure({"full": full, "fine": lambda: None}, torch.device("cpu"), repeats=5)
    assert results["full"] == "oom: no room"
    assert isinstance(results["fine"], Times)


def test_a_peer_that_is_slow_keeps_what_it_has_or_is_a_timeout(monkeypatch):
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    peers = {"slow": lambda: None}
    assert measure(peers, torch.device("cpu"), repeats=9, limit_s=3)["slow"] == "timeout: 1 calls in 3 s"
    assert measure(peers, torch.device("cpu"), repeats=9, limit_s=30)["slow"] == Times(2000.0, 2000.0, 2000.0)


def test_summary_is_median_and_percentiles():
    assert timing.summary([float(ms) for ms in range(11)]) == Times(5.0, 1.0, 9.0)
