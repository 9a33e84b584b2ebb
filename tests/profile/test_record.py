"""Recordings of a step: each kernel's time belongs to its layer, and nothing else changes."""

import contextlib
import os

import pytest
import torch
from support.profiles import gpu_trace
from torch import nn

from fused_resnet import backends
from fused_resnet.bench import steps
from fused_resnet.bench.steps import Implementation, Subject, TrainingStep
from fused_resnet.models import resnet18
from fused_resnet.profile import analysis, record
from fused_resnet.profile.record import Work
from fused_resnet.profile.run import _design
from fused_resnet.reference import Reference
from fused_resnet.roofline import resnet
from fused_resnet.tuning import Configuration

CPU = torch.device("cpu")
SUBJECT = Subject("resnet18", resnet18, (3, 64, 64))
UNITS = {layer.name for layer in resnet("resnet18", 1).layers}


def by_layer(works):
    found = {}
    for work in works:
        found[work.layer, work.phase] = found.get((work.layer, work.phase), 0) + work.us
    return found


def quiet(step, times=2):
    """By layer and phase the least of a few recordings: what else the machine does only adds to a time."""
    runs = [by_layer(record.record(step, CPU).works) for _ in range(times)]
    return {place: min(run.get(place, 0.0) for run in runs) for place in runs[0]}


@pytest.fixture
def fused(monkeypatch):
    """A name for the operators of this package on ATen, which run on a CPU."""
    monkeypatch.setitem(steps.IMPLEMENTATIONS, "ours:eager", Implementation("eager", True))
    return "ours:eager"


@pytest.mark.parametrize("cupti", [True, False])
def test_each_layer_has_its_time_forward_and_backward(cupti):
    recording = record.record(TrainingStep(SUBJECT, "eager_nhwc", torch.float32, 4, CPU), CPU, cupti)
    found = by_layer(recording.works)
    assert {layer for layer, _ in found} == UNITS | {"maxpool", "avgpool", "fc", "loss", "optimizer"}
    assert all((unit, phase) in found for unit in UNITS for phase in ("forward", "backward"))
    assert {phase for layer, phase in found if layer == "optimizer"} == {"optimizer"}
    # What no layer claims is little: the loss, on 4 rows.
    assert sum(work.layer == "loss" for work in recording.works) < 0.2 * len(recording.works)
    assert not recording.device_only
    layers = [e for e in recording.trace if e.get("cat") == "layer"]
    assert {e["args"]["layer"] for e in layers} == {layer for layer, _ in found}


def test_noise_of_the_profiler_is_kept_back_and_nothing_else(capfd):
    with record.without_noise():
        os.write(2, b"USDT:2026-11-28 17:17:25 20797:20797 SyncActivityProfilerHandler.cpp:52] profiler_start\n")
        os.write(2, b"[W1128 17:17:31.245855190 CPUAllocator.cpp:245] Memory block of unknown size was allocated before\n")
        os.write(2, b"a user's own words\n")
    assert capfd.readouterr().err == "a user's own words\n"
    record.record(step := TrainingStep(SUBJECT, "eager_nhwc", torch.float32, 2, CPU), CPU)
    record.memory_timeline(step, CPU)
    assert capfd.readouterr().err == ""


def test_fused_operators_belong_to_the_convolution_that_they_end_in(fused):
    found = by_layer(record.record(TrainingStep(SUBJECT, fused, torch.float32, 4, CPU), CPU).works)
    # A projection is a part of the operator of its block's first convolution.
    units = {unit for unit in UNITS if "downsample" not in unit}
    assert {layer for layer, _ in found} == units | {"maxpool", "avgpool", "fc", "loss", "optimizer"}
    assert all((unit, phase) in found for unit in units for phase in ("forward", "backward"))


def test_a_slow_down_of_one_kernel_is_shown_in_its_layer(fused, monkeypatch):
    step = TrainingStep(Subject("resnet18", resnet18, (3, 32, 32)), fused, torch.float32, 2, CPU)
    before = quiet(step)
    right = Reference.norm_act_max_pool

    def slowed(self, *args):
        for _ in range(100):  # which stands out beside whatever else the machine does
            right(self, *args)
        return right(self, *args)

    monkeypatch.setattr(Reference, "norm_act_max_pool", slowed)
    after = quiet(step)
    grown = {place: after[place] - before.get(place, 0) for place in after}
    assert max(grown, key=grown.get) == ("maxpool", "forward")
    assert after["maxpool", "forward"] > 4 * before["maxpool", "forward"]


class Slow(nn.Conv2d):
    """A convolution that does its work again and again."""

    def forward(self, x):
        for _ in range(40):
            super().forward(x)
        return super().forward(x)


def test_a_slow_layer_of_a_users_network_is_shown():
    def make():
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Slow(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    step = TrainingStep(Subject("mine", make, (3, 32, 32)), "eager", torch.float32, 4, CPU)
    found = quiet(step)
    assert max(found, key=found.get) == ("3", "forward")


def test_operators_run_in_ranges_that_are_named_after_their_layers(fused, monkeypatch):
    """What Nsight's tools show of a GPU; on a CPU there are no such ranges, and names are written down instead."""
    names = []

    def written_down(device, name):
        names.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(record, "nvtx_range", written_down)
    recording = record.record(TrainingStep(SUBJECT, "eager_nhwc", torch.float32, 4, CPU), CPU)
    assert {f"{work.layer} {work.phase}" for work in recording.works if work.layer != "loss"} == {n for n in names if "loss" not in n}
    assert {"conv1 forward", "layer4.1.conv2 backward", "optimizer optimizer"} <= set(names)


def test_the_design_of_a_step_is_that_of_the_operators_that_ran(monkeypatch):
    assert [_design("off", False), _design("off", True), _design("passes_triton", False)] == ["eager", "passes", "passes"]
    tuned = backends.BACKENDS["tuned_triton"]
    monkeypatch.setattr(tuned, "_chosen", {"a piece of work": None})
    assert _design("tuned_triton", False) == "passes"
    monkeypatch.setitem(tuned._chosen, "another", Configuration(64, 64, 32, 4, 3))
    assert _design("tuned_triton", False) == "fused"


def test_tracing_leaves_the_model_as_it_was(fused):
    """The layers are found in a step of their own, which must not change what runs: hooks would keep blocks from being fused."""
    call = nn.Module.__call__
    step = TrainingStep(SUBJECT, fused, torch.float32, 4, CPU)
    names = {work.name for work in record.record(step, CPU).works}
    assert any("fused_resnet::norm_act_conv" in name for name in names)
    assert nn.Module.__call__ is call


def test_kernels_of_a_gpu_go_to_the_layers_of_the_operators_that_launched_them():
    works = record.attributed(gpu_trace(), {7: "conv1", 8: "layer1"}, on_gpu=True)
    assert works == [
        Work("sm90_fprop", "conv1", "forward", 500, 40), Work("relu_kernel", "layer1", "forward", 545, 10),
        Work("sm90_dgrad", "conv1", "backward", 555, 60), Work("Memset", "conv1", "backward", 620, 5),
        Work("multi_tensor_apply", "optimizer", "optimizer", 650, 15),
    ]  # fmt: skip
    assert analysis.gaps(works) == pytest.approx((5 + 0 + 5 + 25) / 1e3)
    track = record.layer_track(works, gpu_trace())
    assert [(e["name"], e["ts"], e["dur"]) for e in track[1:]] == [
        ("conv1 forward", 1500, 40), ("layer1 forward", 1545, 10), ("conv1 backward", 1555, 70), ("optimizer optimizer", 1650, 15),
    ]  # fmt: skip


def test_gaps_do_not_count_what_overlaps():
    assert analysis.gaps([Work("a", "x", "forward", 0, 100), Work("b", "x", "forward", 10, 20), Work("c", "x", "forward", 130, 5)]) == 0.03


def test_memory_rises_in_forward_and_falls_in_backward():
    line = record.memory_timeline(TrainingStep(SUBJECT, "eager_nhwc", torch.float32, 16, CPU), CPU)
    peak = max(level for _, level in line)
    saved = 16 * 64 * 64 * 4 * 3
    assert peak > 3 * saved
    assert [at for at, _ in line] == sorted(at for at, _ in line)
    assert line[-1][1] < peak


def test_a_thinned_line_keeps_its_peaks():
    line = [(float(i), float(i % 7 == 3) * i) for i in range(1000)]
    thin = record.thinned(line, 100)
    assert len(thin) == 100 and max(level for _, level in thin) == max(level for _, level in line)
    assert record.thinned([], 10) == []
