"""What an experiment on degradation runs, and what fits into a time."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.trainings import CPU, one_thread, tiny_data

from fused_resnet.experiment import degradation
from fused_resnet.experiment.plan import PLAN, Plan, PlanError, Run, fitted, read_plan
from fused_resnet.train import SettingError, TrainConfig

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
SETTINGS = TrainConfig(data="tiny", epochs=3, batch_size=16, lr=0.05, warmup_epochs=0.5)
PLAN_OF_TWO = Plan(SETTINGS, (20, 32), seeds=1, width=2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"depths": (20,)}, "depths: expected two or more of 20 32 44 56 or 18 34; got 20"),
        ({"depths": (20, 20)}, "depths: expected two or more"),
        ({"depths": (18, 56)}, "depths: expected two or more of 20 32 44 56 or 18 34; got 18 56"),
        ({"seeds": 0}, "seeds: expected a whole number of at least 1; got 0"),
        ({"width": 3}, "width: expected an even number of at least 2; got 3"),
        ({"depths": (18, 34), "width": 8}, "width: expected none"),
    ],
)
def test_what_can_not_be_run_is_named(change, expected):
    with pytest.raises(SettingError) as caught:
        replace(Plan(SETTINGS), **change)
    assert expected in str(caught.value)


def test_a_plan_has_each_network_from_each_seed_early():
    plan = Plan(SETTINGS, (56, 20), seeds=2)
    assert plan.networks == ["plain20", "resnet20", "plain56", "resnet56"]
    assert plan.runs == [Run(network, seed) for seed in (0, 1) for network in plan.networks]
    assert (plan.config(Run("plain56", 1)).model, plan.config(Run("plain56", 1)).seed) == ("plain56", 1)
    assert plan.moments == {"start": 0, "middle": 1, "end": 3}
    assert replace(plan, settings=replace(SETTINGS, epochs=1)).moments == {"start": 0, "end": 1}


def test_the_imagenet_networks_want_colour():
    with pytest.raises(SettingError, match="depths: expected some of 20 32 44 56 for the 1-channel images of tiny; got 18 34"):
        Plan(SETTINGS, (18, 34)).build("plain18", tiny_data())


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = replace(PLAN_OF_TWO, picked="by hand", command="fused-resnet experiment degradation")
    plan.write(tmp_path)
    assert read_plan(tmp_path) == plan


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file; expected the folder of an experiment"),
        (b'{"format": ', "it can't be read"),
        (b"[" * 100_000, "it can't be read"),
        (b"[]", "expected version 1 of the plan"),
        (b'{"format": "fused_resnet.degradation", "version": 2}', "expected version 1 of the plan"),
        (b'{"format": "fused_resnet.degradation", "version": 1}', "its settings can't be used"),
        (b'{"format": "fused_resnet.degradation", "version": 1, "settings": {"epochs": 0}, "depths": [20, 56]}', "epochs: expected"),
    ],
)
def test_a_damaged_plan_is_named(tmp_path, content, expected):
    if content is not None:
        (tmp_path / PLAN).write_bytes(content)
    with pytest.raises(PlanError, match=expected) as caught:
        read_plan(tmp_path)
    assert str(tmp_path / PLAN) in str(caught.value)


def test_minutes_pick_epochs_then_widths():
    plan = Plan(SETTINGS, seeds=2)
    at = {16: 60.0, 8: 25.0, 4: 20.0}  # seconds of an epoch of all runs
    wide = fitted(plan, 12, 50, lambda p: at[p.width])
    assert (wide.settings.epochs, wide.width, wide.settings.warmup_epochs) == (12, 16, 1.0)
    assert wide.picked == ("12 minutes were asked for. An epoch of all 8 runs took 60 s by what a few steps took, so there are 12 epochs.")
    narrow = fitted(plan, 5, 50, lambda p: at[p.width])
    assert (narrow.settings.epochs, narrow.width) == (12, 8)
    assert "with 16 channels in the first stage there would be 5, so there are 8" in narrow.picked
    few = fitted(plan, 3, 50, lambda p: at[p.width])
    assert (few.settings.epochs, few.width) == (7, 8), "4 channels have 9 epochs, which is less than twice as many"
    assert fitted(plan, 4, 50, lambda p: 30.0).width == 16, "what gains nothing is left alone"
    late = fitted(plan, 0.1, 50, lambda p: at[p.width])
    assert (late.settings.epochs, late.width, late.settings.warmup_epochs) == (1, 8, 0.25)
    assert "that is 25 s, longer than was asked for" in late.picked
    long = fitted(plan, 10_000, 400, lambda p: at[p.width])
    assert long.settings.epochs == 160 and "so there are 160 epochs, the paper's 64,000 steps" in long.picked
    large = fitted(Plan(SETTINGS, (18, 34)), 3, 50, lambda p: at[p.width])
    assert (large.settings.epochs, large.width) == (3, 16), "these have one width"


def test_an_epoch_is_timed_by_its_steps(monkeypatch):
    """By a clock on which each step and each forward takes a second: two steps and an evaluation of one batch, of each of 4 networks."""
    monkeypatch.setattr(degradation, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    assert degradation.epoch_seconds(PLAN_OF_TWO, tiny_data(), CPU) == 4 * (2 + 1)
    assert degradation.epoch_seconds(replace(PLAN_OF_TWO, seeds=3), tiny_data(), CPU) == 3 * 4 * (2 + 1)
