"""The gate before the figures of whole networks and blocks: planted faults are refused, right implementations are not."""

import dataclasses

import pytest
import torch
from support import planted
from support.gates import BATCH, CPU, DTYPES, FAULTS, PLANTED, SUBJECTS, gate_of, verdicts, whole
from support.small import SIZE
from torch import nn

from fused_resnet.backends import BACKENDS
from fused_resnet.bench import gate, networks
from fused_resnet.bench.gate import DRAWS, Gate, condition, distinct_images
from fused_resnet.bench.machine import Ceilings
from fused_resnet.bench.networks import STEPS, Networks
from fused_resnet.bench.steps import CHANGE, GRADIENT, Subject, TrainingStep
from fused_resnet.bench.timing import Times
from fused_resnet.reference import Reference

FAULT_IDS = [f"{suite}-{fault.__name__}" for suite, fault in FAULTS]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("suite, fault", FAULTS, ids=FAULT_IDS)
def test_a_planted_fault_is_refused(suite, fault, dtype, monkeypatch):
    made = gate_of(suite, dtype)
    monkeypatch.setitem(BACKENDS, "planted", fault())
    found = verdicts(made, PLANTED)
    assert any(found), f"{fault.__name__} passed"
    assert all(words is None or words.startswith("wrong: ") for words in found)
    if fault is planted.LateZeros:
        assert found[0] is None and found[1]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("suite", STEPS)
def test_what_is_right_is_not_refused(suite, dtype, monkeypatch):
    monkeypatch.setitem(BACKENDS, "planted", Reference())
    assert verdicts(gate_of(suite, dtype), PLANTED) == [None, None]
    assert verdicts(gate_of(suite, dtype), "eager") == [None, None]


def test_running_statistics_that_are_never_written_are_refused():
    made = gate_of("train", torch.float32)

    class Forgetful(TrainingStep):
        def run(self, x):
            kept = [t.clone() for t in self.statistics()]
            result = super().run(x)
            for t, old in zip(self.statistics(), kept, strict=True):
                t.data.copy_(old)
            return result

    step = Forgetful(made.subject, "eager", torch.float32, BATCH, CPU)
    error, words = made.verdict(step, DRAWS, BATCH)
    assert error == pytest.approx(1) and words.startswith(f"wrong: {CHANGE}") and "running_" in words


def test_no_tensor_of_zeros_is_within_its_bound():
    """Unless it is what is right."""
    for suite in STEPS:
        for dtype in DTYPES.values():
            for truth in (made := gate_of(suite, dtype))._truths.values():
                blank = {name: torch.zeros_like(t) for name, t in truth.answer.items()}
                errors = truth.errors(blank, BATCH)
                assert errors and all(errors[name] == pytest.approx(1) and truth.bounds[name] <= gate.MOST < 1 for name in errors), made


def test_what_is_missing_or_no_number_is_refused():
    truth = gate_of("train", torch.float32)._truths[None, DRAWS[0]]
    right = dict(truth.answer)
    name = next(name for name in right if name.startswith(GRADIENT))
    assert truth.verdict(right, BATCH) == (0.0, None)
    for wrong in (
        {**right, name: right[name] * float("nan")},
        {k: v for k, v in right.items() if k != name},
        {**right, name: right[name][:1]},
    ):
        error, words = truth.verdict(wrong, BATCH)
        assert error == float("inf") and words.startswith(f"wrong: {name} is inf")


def test_images_come_again_where_the_batch_is_large():
    """Gradients and statistics of a batch that holds each image three times are those of the images, but for the unbiased variance."""
    assert [distinct_images(n) for n in (1, 8, 16, 64, 256, 96, 257, 296, 100)] == [1, 8, 16, 64, 64, 48, 257, 37, 50]
    for suite in STEPS:
        made = gate_of(suite, torch.float32)
        step = made.step("eager_nhwc", torch.float32, 3 * BATCH)
        step()
        error, words = made.verdict(step, DRAWS, 3 * BATCH)
        assert words is None and error < 1e-3, (suite, words)


def test_a_network_is_conditioned_so_that_nothing_of_it_can_be_forgotten():
    original = whole()
    before = [t.clone() for t in original.state_dict().values()]
    made = condition(Subject("small", lambda: original, SIZE[1:]).of(original), CPU, BATCH)
    assert all(torch.equal(a, b) for a, b in zip(before, original.state_dict().values(), strict=True))
    for norm in (m for m in made.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.momentum == 0.1 and norm.num_batches_tracked == 0
        for t, usual in ((norm.weight, 1.0), (norm.bias, 0.0), (norm.running_mean, 0.0), (norm.running_var, 1.0)):
            assert ((t - usual).abs() > 1e-3).float().mean() > 0.9


def test_a_bias_before_a_norm_has_no_gradient_and_is_judged_all_the_same():
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    made = Gate(TrainingStep, Subject("biased", make, (3, 12, 12)), torch.bfloat16, BATCH, CPU)
    made.prepare(None)
    assert verdicts(made, "eager") == [None, None]
    truth = made._truths[None, DRAWS[0]]
    biased = {**truth.answer, "gradient of 0.bias": torch.ones(8)}
    assert truth.verdict(biased, BATCH)[1].startswith("wrong: gradient of 0.bias")


def test_where_eager_itself_is_far_away_nothing_is_judged():
    """A mean of two values that rounding makes equal."""

    class Hopeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x).mean((2, 3))
            return (y - y.detach().bfloat16().float().to(y.dtype)) * 1e4

    made = Gate(TrainingStep, Subject("hopeless", Hopeless, (3, 4, 4)), torch.bfloat16, BATCH, CPU)
    with pytest.raises(RuntimeError, match=r"eager in bfloat16 is itself .* from float64 \(.*\), so that nothing can be compared with it"):
        made.prepare(None)


def test_what_is_faster_than_its_products_can_be_is_refused(monkeypatch):
    """A replay of CUDA graphs that does nothing, say: right when it is asked, and no work done when it is timed."""
    second = Times(1e3, 1e3, 1e3)
    ceilings = Ceilings(second, 1, second, 10**6)  # 10^6 FLOP/s
    monkeypatch.setattr(networks, "measure_ceilings", lambda *_: ceilings)
    suite = Networks("train", CPU, torch.float32, ceilings, ("eager_nhwc",), repeats=3)
    (row,) = [row for row in suite.rows(SUBJECTS["train"], BATCH) if row.case == "small"]
    assert row.status.startswith("wrong: ") and "its products take more than" in row.status and row.median_ms is None
    monkeypatch.setattr(networks, "measure_ceilings", lambda *_: Ceilings(second, 1, second, 10**15))
    (row,) = [row for row in suite.rows(SUBJECTS["train"], BATCH) if row.case == "small"]
    assert row.status == "ok", "a busy machine's ceilings refuse nobody: they are measured again"
    fast = dataclasses.replace(suite, ceilings=Ceilings(second, 1, second, 10**15), counted={})
    (row,) = [row for row in fast.rows(SUBJECTS["train"], BATCH) if row.case == "small"]
    assert row.status == "ok"
