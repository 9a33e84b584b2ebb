"""The suites `train`, `inference` and `blocks` under pytest-benchmark: `pytest bench/test_networks.py --benchmark-json train.json`.

A step of ResNet-50 on a GPU (batch 256, bfloat16), or of resnet18, small, on a CPU, ours and its peers. A step is timed up to its end
on the device. `fused-resnet bench` writes the figures that the documents show.
"""

import dataclasses
import itertools
import signal
import time

import pytest
import torch
from torch import nn

from fused_resnet.bench import gate, networks, steps, timing
from fused_resnet.bench.machine import Ceilings
from fused_resnet.bench.networks import STEPS, Networks, largest_batch, subjects
from fused_resnet.bench.schema import read_results
from fused_resnet.bench.steps import BlockStep, InferenceStep, Subject, TrainingStep
from fused_resnet.bench.timing import Times, attempt, measure
from fused_resnet.cli import main

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
MODEL, BATCH, SIZE = ("resnet50", 256, 224) if CUDA else ("resnet18", 8, 64)
CPU = torch.device("cpu")


@pytest.mark.parametrize("impl", ["eager", "eager_nhwc", "compile", "ours"] if CUDA else ["eager", "eager_nhwc", "ours"])
@pytest.mark.parametrize("suite", STEPS)
def test_step(benchmark, suite, impl):
    torch.backends.cudnn.benchmark = True
    subject = subjects(suite, [MODEL], SIZE)[0]
    step = STEPS[suite](subject, impl, DTYPE, BATCH, DEVICE)
    benchmark.extra_info.update(case=subject.name, batch=BATCH, dtype=str(DTYPE))

    def call():
        step()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20 if CUDA else 3, warmup_rounds=5 if CUDA else 1)


ARGUMENTS = ["--device", "cpu", "--dtype", "fp32", "--repeats", "3", "--model", "resnet18", "--commit", "c0ffee"]


@pytest.mark.parametrize("suite", STEPS)
def test_the_program_writes_what_it_measured(suite, tmp_path):
    size = ["--batch", "4"] if suite == "blocks" else []
    command = ["bench", suite, *ARGUMENTS, *size, "--out", str(tmp_path), "--impl", "eager_nhwc", "ours", "--plot"]
    assert main(command) == 0
    (path,) = tmp_path.rglob("*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    rows = [row for row in read_results(path).rows if not row.case.endswith(":first_step")]
    cases = {"blocks": 7}.get(suite, 1)
    assert [row.impl for row in rows] == ["eager_nhwc", "ours"] * cases
    for row in rows:
        assert (row.suite, row.status) == (suite, "ok")
        assert row.images_per_s == pytest.approx(row.batch / (row.median_ms * 1e-3))
        assert row.max_rel_error < 5e-2  # a ReLU that rounding turns costs some 1e-2
        assert (row.tflops is not None) == (suite == "train")
    first = [row for row in read_results(path).rows if row.case.endswith(":first_step")]
    assert len(first) == 2 * cases and all(row.median_ms > 0 for row in first)


@pytest.mark.parametrize("suite, kind", STEPS.items())
def test_what_is_wrong_gets_no_figure(suite, kind, tmp_path, monkeypatch):
    class Faulty(kind):
        def computed(self, x):
            return {name: (2 if self.how.backend == "auto" else 1) * a for name, a in super().computed(x).items()}

    monkeypatch.setitem(networks.STEPS, suite, Faulty)
    assert main(["bench", suite, *ARGUMENTS, "--out", str(tmp_path), "--impl", "ours", "--batch", "8"]) == 1
    (path,) = tmp_path.rglob("*.json")
    rows = read_results(path).rows
    assert all(row.status.startswith("wrong: ") and "is 1.0e+00 from float64's" in row.status and row.median_ms is None for row in rows)


def suite(**changes):
    nothing = Times(1.0, 1.0, 1.0)
    given = Networks("train", CPU, torch.float32, Ceilings(nothing, 1, nothing, 10**15), ("eager_nhwc", "ours"), repeats=3)
    return dataclasses.replace(given, **changes)


class Small(nn.Module):
    """Runs out of memory above a batch of 44."""

    def __init__(self):
        super().__init__()
        self.row = nn.Sequential(nn.Conv2d(3, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU())

    def forward(self, x):
        if len(x) > 44:
            raise torch.OutOfMemoryError(f"no room for {len(x)}")
        return self.row(x).mean((2, 3))


def test_a_case_that_runs_out_of_memory_is_reported_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(gate, "MOST_IMAGES", 32)
    subject = Subject("small", Small, (3, 4, 4))
    rows = suite(implementations=("eager", "ours")).rows(subject, 64)
    assert [(row.impl, row.status) for row in rows] == [("eager", "oom: no room for 64"), ("ours", "oom: no room for 64")]
    assert {row.status for row in suite(implementations=("eager", "ours")).rows(subject, 32)} == {"ok"}


def test_a_reference_that_does_not_fit_is_reported():
    rows = suite(implementations=("eager", "ours")).rows(Subject("small", Small, (3, 4, 4)), 64)
    assert {row.status for row in rows} == {"oom: no room for 64 (float64 eager, with which all are compared)"}


def test_the_largest_batch_is_a_row_with_its_throughput():
    rows = suite(largest=128).rows(Subject("small", Small, (3, 4, 4)), 8)
    found = [row for row in rows if row.case == "small:largest_batch"]
    assert [(row.impl, row.batch, row.status) for row in found] == [("eager_nhwc", 40, "ok"), ("ours", 40, "ok")]
    assert all(row.images_per_s == pytest.approx(40 / (row.median_ms * 1e-3)) for row in found)


def test_what_is_wrong_has_no_largest_batch(monkeypatch):
    class Faulty(TrainingStep):
        def computed(self, x):
            return {name: (2 if self.how.backend == "auto" else 1) * a for name, a in super().computed(x).items()}

    monkeypatch.setitem(networks.STEPS, "train", Faulty)
    rows = suite(largest=64).rows(Subject("small", Small, (3, 4, 4)), 8)
    found = {row.impl: row for row in rows if row.case == "small:largest_batch"}
    assert found["eager_nhwc"].status == "ok" and found["ours"].status.startswith("wrong: ")


def test_what_did_not_fit_is_checked_before_its_largest_batch_is_timed(monkeypatch):
    monkeypatch.setattr(gate, "MOST_IMAGES", 32)
    rows = suite(largest=64).rows(Subject("small", Small, (3, 4, 4)), 64)
    found = {row.case: row for row in rows if row.impl == "ours"}
    assert found["small"].status == "oom: no room for 64"
    assert (found["small:largest_batch"].status, found["small:largest_batch"].batch) == ("ok", 40)
    assert found["small:largest_batch"].max_rel_error < 1e-3


def test_a_search_that_takes_too_long_says_how_far_it_got(monkeypatch):
    class Slow(TrainingStep):
        def __init__(self, subject, impl, dtype, batch, *others):
            super().__init__(subject, impl, dtype, batch, *others)
            if batch > 16:
                time.sleep(30)

    monkeypatch.setitem(networks.STEPS, "train", Slow)
    rows = suite(largest=64, limit_s=5, implementations=("ours",)).rows(Subject("small", Small, (3, 4, 4)), 8)
    (found,) = [row for row in rows if row.case == "small:largest_batch"]
    assert found.status == "timeout: 16 images fit; 5 s did not suffice to find out whether more do"
    assert found.median_ms is None


def test_memory_that_runs_out_in_the_last_measurement_is_a_row(monkeypatch):
    built = []

    class Fickle(TrainingStep):
        """The largest batch fits once: then another process takes the memory."""

        def __init__(self, subject, impl, dtype, batch, *others):
            super().__init__(subject, impl, dtype, batch, *others)
            if impl == "ours":
                built.append(batch)
            if built.count(40) > 1:
                raise torch.OutOfMemoryError("taken")

    monkeypatch.setitem(networks.STEPS, "train", Fickle)
    rows = suite(largest=64, implementations=("ours",)).rows(Subject("small", Small, (3, 4, 4)), 8)
    (found,) = [row for row in rows if row.case == "small:largest_batch"]
    assert (found.status, found.batch) == ("oom: taken", 40)


@pytest.mark.parametrize("start, limit, top, expected", [
    (8, 1024, 300, 296), (8, 1024, 5000, 1024), (256, 4096, 100, 100), (256, 4096, 0, None), (8, 8, 8, 8), (7, 64, 50, 48),
])  # fmt: skip
def test_the_largest_batch_is_found(start, limit, top, expected):
    asked = []
    found = largest_batch(lambda size: asked.append(size) or size <= top, start, limit)
    assert found == expected or (expected is not None and 0 <= top - found < networks.BATCH_STEP)
    assert len(asked) == len(set(asked)) < 20


def test_a_peer_that_does_not_end_is_a_timeout():
    started = time.perf_counter()
    assert attempt(lambda: time.sleep(60), limit_s=0.2) == "timeout: not done in 0.2 s"

    def swallows():
        try:
            time.sleep(30)
        except Exception:
            time.sleep(30)

    assert attempt(swallows, limit_s=0.2) == "timeout: not done in 0.2 s"
    assert attempt(lambda: None, limit_s=0.2) is None
    assert time.perf_counter() - started < 10
    time.sleep(0.3)  # no alarm is left behind


def test_another_alarm_goes_off_all_the_same():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    before = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert attempt(lambda: time.sleep(10), limit_s=0.1) == "timeout: not done in 0.1 s"
        assert not rung
        time.sleep(0.4)
        assert rung
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_blocks_are_each_shape_once():
    found = subjects("blocks", ["resnet18", "resnet50"], 64)
    assert len({subject.name for subject in found}) == len(found) == 7 + 8
    assert found[0].name == "resnet18.layer1.0" and found[0].shape == (64, 16, 16)


@pytest.mark.parametrize("kind", [TrainingStep, BlockStep, InferenceStep])
def test_half_precision_answers_are_those_of_float32(kind):
    subject = subjects("blocks" if kind is BlockStep else "train", ["resnet18"], 64)[0]
    wide = kind(subject, "eager_nhwc", torch.float32, 8, CPU)
    narrow = kind(subject.of(wide.module), "eager_nhwc", torch.bfloat16, 8, CPU)
    images = steps.inputs(8, subject.shape, CPU, 2)
    found, expected = narrow.answer(images), wide.answer(images)
    assert found.keys() == expected.keys() and all(t.dtype == torch.float32 for t in found.values())
    assert 0 < (found[steps.OUTPUT] - expected[steps.OUTPUT]).norm() < 0.1 * expected[steps.OUTPUT].norm()
    assert steps.LOSS_SCALE != 1


@pytest.mark.parametrize("impl, folded", [("eager_nhwc", False), ("folded", True), ("ours", True), ("ours:passes_triton", True)])
def test_in_inference_ours_is_folded(impl, folded):
    """And nothing else that is not said to be."""
    subject = subjects("inference", ["resnet18"], 64)[0]
    step = InferenceStep(subject, impl, torch.float32, 2, CPU)
    assert any(isinstance(m, nn.BatchNorm2d) for m in step.model.modules()) != folded
    assert next(step.model.layer1.parameters()).is_contiguous(memory_format=torch.channels_last)
    assert any(isinstance(m, nn.BatchNorm2d) for m in TrainingStep(subject, "ours", torch.float32, 2, CPU).model.modules())


def test_a_folded_network_is_not_trained():
    for suite in ("train", "blocks"):
        assert not any(steps.IMPLEMENTATIONS[impl].folded for impl in steps.implementations(suite))
    assert {"folded", "compile_folded"} < set(steps.implementations("inference"))
    assert main(["bench", "train", *ARGUMENTS, "--impl", "folded"]) == 2


def test_a_peer_that_fails_drops_out_and_the_others_go_on():
    def full():
        raise torch.OutOfMemoryError("no room\nat all")

    results = measure({"full": full, "fine": lambda: None}, torch.device("cpu"), repeats=5)
    assert results["full"] == "oom: no room"
    assert isinstance(results["fine"], Times)


def test_a_peer_that_is_slow_keeps_what_it_has_or_is_a_timeout(monkeypatch):
    clock = itertools.count(0, 2)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    peers = {"slow": lambda: None}
    assert measure(peers, torch.device("cpu"), repeats=9, limit_s=3)["slow"] == "timeout: 1 calls in 3 s"
    assert measure(peers, torch.device("cpu"), repeats=9, limit_s=30)["slow"] == Times(2000.0, 2000.0, 2000.0)


def test_summary_is_median_and_percentiles():
    assert timing.summary([float(ms) for ms in range(11)]) == Times(5.0, 1.0, 9.0)
