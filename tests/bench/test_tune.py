"""What the tuner times, what it takes for right, and that the backend `tuned` runs what was found, and nothing else."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.chains import CHAINS, DEVICE, Ours, Shape, run
from support.rule import inputs, loss_weight, refused
from torch import nn
from torch.utils._pytree import tree_map

import fused_resnet
from fused_resnet import backends, models
from fused_resnet.backends import BACKENDS, TUNED
from fused_resnet.bench import tune
from fused_resnet.bench.journal import Journal
from fused_resnet.kernels.networks import tasks
from fused_resnet.problem import ConvProblem
from fused_resnet.roofline import resnet
from fused_resnet.tuning import Configuration, Entry, Table, Task, heuristics
from fused_resnet.tuning.table import Meta, path_of, write_table

#: The tuned backend that runs here.
NAME = next((name for name in TUNED if not BACKENDS[name].why_not(DEVICE, torch.float32)), None)
pytestmark = pytest.mark.skipif(NAME is None, reason="no tuned backend runs here")
SMALL = Configuration(16, 32, 32, warps=4, stages=2)
CHAIN = {chain.__name__: chain for chain in CHAINS}
POINTWISE = ConvProblem(2, 16, 4, 4, 24, 1, 1)
TASKS = {
    "fprop of an activation": Task("fprop", POINTWISE, "float32", "act"),
    "fprop of a norm": Task("fprop", ConvProblem(2, 16, 4, 4, 24, 3, 3, padding=(1, 1)), "float32", "norm"),
    "fprop across blocks": Task("fprop", POINTWISE, "float32", "norm_add_raw"),
    "dgrad across blocks": Task("dgrad", POINTWISE, "float32", "norm_add", dact=True),
    "dgrad with a projection": Task("dgrad", POINTWISE, "float32", "norm_add_raw", compact=2, compact_k=40),
    "wgrad of a norm": Task("wgrad", POINTWISE, "float32", "norm"),
}


def test_a_candidate_that_ended_a_run_is_passed_over(device, monkeypatch, tmp_path):
    """By an error of the GPU that lasts, or with the whole process, of which nothing is left but what stands in the file."""
    task, path = TASKS["wgrad of a norm"], tmp_path / "gpu.journal"
    rule, *others = map(str, heuristics.candidates(task, (9, 0))[:3])
    kernel = tune.Trial.call

    def call(trial, choice):
        def broken():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return broken if str(choice) == rule else kernel(trial, choice)

    monkeypatch.setattr(tune.Trial, "call", call)
    Journal(path).begin(f"{task}: {others[0]}")  # and there the process ended
    first = tune.tune(task, Table(), device, most=3, repeats=1, limit_s=300, journal=Journal(path))
    assert first.failed[rule] == "unsupported: CUDA error: an illegal memory access was encountered"
    assert first.failed[others[0]] == f"lost: it ended a run before; remove {path} to try it again"
    monkeypatch.setattr(tune.Trial, "call", kernel)
    again = tune.tune(task, Table(), device, most=3, repeats=1, limit_s=300, journal=Journal(path))
    assert set(again.failed) == {rule, others[0]} and again.failed[rule].startswith("lost") and again.entry is not None
    path.unlink()
    assert not tune.tune(task, Table(), device, most=3, repeats=1, limit_s=300, journal=Journal(path)).failed


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_it_finds_every_task_of_a_network(name, device):
    """Those that are counted without running anything, each as often; and those of choices that make others unnecessary."""
    shape = (4, 3, 32, 32)
    found = tune.tasks_of(lambda: models.get_model(name), shape, torch.float32, device)
    expected = Counter(tasks(resnet(name, 4, 32), "float32"))
    assert not expected - found
    more = found - expected
    assert more and {(task.kind, task.source) for task in more} == {("fprop", "act"), ("wgrad", "act")}
    assert all(task.conv.n == 4 for task in found)


@pytest.mark.parametrize("name", TASKS)
def test_a_kernel_agrees_with_the_passes_and_a_wrong_one_is_refused(name, device, monkeypatch):
    task, table = TASKS[name], Table()
    outcome = tune.tune(task, table, device, most=1, repeats=1, limit_s=300)
    assert not outcome.failed and table.entries == [outcome.entry]
    assert outcome.entry.ms <= outcome.entry.passes_ms

    module = __import__(f"fused_resnet.kernels.{task.kind}", fromlist=[task.kind])
    right = getattr(module, task.kind)

    def wrong(*args, **options):
        result = right(*args, **options)
        first, *rest = result if isinstance(result, tuple) else (result,)
        first = first.clone()
        first[0, 0] += first.abs().max()
        return (first, *rest) if rest else first

    monkeypatch.setattr(module, task.kind, wrong)
    outcome = tune.tune(task, Table(), device, most=1, repeats=1, limit_s=300)
    (status,) = outcome.failed.values()
    assert status.startswith("wrong") and outcome.entry.configuration is None


@pytest.mark.parametrize("fault", ["zeros", "the first answer again", "zeros in the end"])
@pytest.mark.parametrize("name", ["fprop of a norm", "dgrad across blocks", "wgrad of a norm"])
def test_what_is_right_when_it_is_checked_first_is_refused(name, fault, device, monkeypatch):
    """A candidate is checked once more behind its timing, on other operands."""
    task, first, calls = TASKS[name], [], []
    module = __import__(f"fused_resnet.kernels.{task.kind}", fromlist=[task.kind])
    right = getattr(module, task.kind)

    def wrong(*args, **options):
        result = right(*args, **options)
        calls.append(1)
        if fault == "zeros" or (fault == "zeros in the end" and len(calls) > 1):
            return tree_map(lambda t: t if t is None else torch.zeros_like(t), result)
        first.append(result)
        return first[0] if fault == "the first answer again" else result

    monkeypatch.setattr(module, task.kind, wrong)
    outcome = tune.tune(task, Table(), device, most=1, repeats=1, limit_s=300)
    (status,) = outcome.failed.values()
    assert status.startswith("wrong") and status.endswith("(after it was timed)") == (fault != "zeros")
    assert outcome.entry.configuration is None


FLOAT16 = [
    replace(TASKS[name], dtype="float16")
    for name in ("fprop of a norm", "dgrad across blocks", "dgrad with a projection", "wgrad of a norm")
]


@pytest.mark.parametrize("task", FLOAT16, ids=str)
def test_small_float16_tasks_are_not_called_wrong_and_their_sums_are_checked(task, device):
    """With 32 values a channel, sums cancel: their error is measured by their terms. By seeds, since one sees little."""
    for seed in range(6):
        torch.manual_seed(seed)
        trial = tune.Trial(task, Table(), device)
        expected = trial.call(None)()
        assert trial.error(trial.call(SMALL)(), expected)[1] is None, seed
        for number, (value, terms) in enumerate(zip(expected, trial.terms(expected), strict=True)):
            if terms is None:
                continue
            wrong = list(expected)
            wrong[number] = value.clone()
            wrong[number][3] += 0.05 * terms.norm[3]  # ten times what rounding costs
            assert f"wrong: result {number} " in trial.error(tuple(wrong), expected)[1]


@pytest.fixture
def table(tmp_path, monkeypatch, device):
    """Writes a table of measured choices where the backends look for one."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def write(*entries: Entry) -> None:
        write_table(path_of(gpu), Meta(gpu, "2", "3", "c0ffee", "2026-01-31T00:00:00Z"), Table(entries))
        backends.forget_choices()

    yield write
    monkeypatch.undo()
    backends.forget_choices()


@pytest.fixture
def launched(monkeypatch):
    """The kernels of convolutions that run, by name."""
    calls = []
    for name in ("fprop", "dgrad", "wgrad"):
        module = __import__(f"fused_resnet.kernels.{name}", fromlist=[name])

        def counted(*args, right=getattr(module, name), name=name, **options):
            calls.append(name)
            return right(*args, **options)

        monkeypatch.setattr(module, name, counted)
    return calls


def test_what_was_measured_runs_and_what_was_not_runs_as_passes(table, launched, device):
    model = nn.Sequential(models.BasicBlock(16, 16), models.BasicBlock(16, 16)).to(device).train()
    x = torch.randn(2, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    conv = ConvProblem(2, 16, 4, 4, 16, 3, 3, padding=(1, 1))

    def step() -> list[str]:
        launched.clear()
        with fused_resnet.backend(NAME):
            model(x).sum().backward()
        return sorted(launched)

    table()
    assert step() == []
    inner = [Entry(Task("fprop", conv, "float32", "norm"), SMALL, 0.5, 0.75)]
    table(*inner)
    assert step() == ["fprop"] * 2
    table(*inner, Entry(Task("wgrad", conv, "float32", "norm"), replace(SMALL, splits=2), 0.5, 0.75))
    assert step() == ["fprop"] * 2 + ["wgrad"] * 2
    table(Entry(Task("fprop", conv, "float32", "norm"), None, 0.75, 0.75), Entry(Task("dgrad", conv, "float32", "norm"), SMALL, 0.5, 0.75))
    assert step() == ["dgrad"] * 2


def test_a_mix_of_backends_is_right(table, device):
    """The chain of test_operators with a prologue forward, and the framework's convolutions backward, and the other way round."""
    shape = Shape(2, 16, 6, 5, 24, size=3)
    layers, x, r = inputs(shape, device)
    chain = CHAIN["norm_act_conv"]
    seen = []

    class Listing(type(BACKENDS[NAME])):
        def choose(self, task, device):
            seen.append(task)
            return super().choose(task, device)

    BACKENDS["listing"] = Listing()
    try:
        with fused_resnet.backend("listing"):
            run(chain, Ours, layers, x, r, loss_weight(chain, layers, x, r), torch.float32)
    finally:
        del BACKENDS["listing"]
    more = [replace(task, kind="wgrad") for task in seen if (task.kind, task.source) == ("fprop", "norm")]
    for kinds in (("fprop",), ("dgrad", "wgrad"), ("fprop", "wgrad")):
        table(*(Entry(task, SMALL, 0.5, 0.75) for task in [*seen, *more] if task.kind in kinds))
        with fused_resnet.backend(NAME):
            assert not refused(chain, layers, x, r, loss_weight(chain, layers, x, r), torch.float32, slack=4), kinds


def test_the_default_on_a_gpu_is_what_was_measured(answers):
    """`auto` asks for `tuned` first, which is the passes where nothing was measured."""
    for name in (*TUNED, *backends.PASSES):
        answers(name, lambda device, dtype: None)
    assert backends.resolve(torch.device("cuda"), torch.bfloat16) == TUNED[0]
