"""Runs of an experiment: looked into, stopped at any moment, and gone on with."""

from dataclasses import replace

import pytest
import torch
from support.trainings import CPU, one_thread, tiny_data, undrawn, without_times

from fused_resnet.experiment import degradation
from fused_resnet.experiment.degradation import read_outcome, run_plan
from fused_resnet.experiment.findings import missing
from fused_resnet.experiment.plan import Plan
from fused_resnet.train import CHECKPOINT, FolderError, TrainConfig, Trainer, epochs

pytestmark = pytest.mark.usefixtures(one_thread.__name__, undrawn.__name__)
SETTINGS = TrainConfig(data="tiny", epochs=3, batch_size=16, lr=0.05, warmup_epochs=0.5)
PLAN_OF_TWO = Plan(SETTINGS, (20, 32), seeds=1, width=2)


def all_runs(folder, plan=PLAN_OF_TWO, said=None, commit="c0ffee"):
    return list(run_plan(plan, tiny_data(), folder, CPU, commit, False, [].append if said is None else said.append))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of an experiment that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    assert all(outcome.finished(PLAN_OF_TWO) for outcome in all_runs(folder))
    return folder


def test_a_run_is_looked_into_at_its_start_middle_and_end(straight):
    for run in PLAN_OF_TWO.runs:
        outcome = read_outcome(PLAN_OF_TWO, straight, run)
        assert sorted(outcome.probes) == [0, 1, 3] and len(outcome.records) == 3
        assert len(outcome.probes[0].layers) == (19 if run.network.endswith("20") else 31)
        assert outcome.probes[0].responses == pytest.approx([1.0] * len(outcome.probes[0].layers), abs=1e-2)
        assert outcome.probes[3].weights != outcome.probes[0].weights
    (machine,) = degradation.read_machines(straight)
    assert machine["commit"] == "c0ffee" and machine["torch"] == torch.__version__ and machine["threads"] == 1


class Killed(BaseException):
    """As abrupt as Ctrl-C."""


@pytest.mark.parametrize("place", ["in an epoch", "before a checkpoint", "before a metric", "before a probe"])
def test_an_experiment_goes_on_with_the_same_bits(tmp_path, monkeypatch, straight, place):
    """It is stopped at every chance of that kind, again and again, until nothing is left to do."""
    folder = epochs.__globals__
    owner, name = {
        "in an epoch": (Trainer, "train_epoch"), "before a checkpoint": (folder, "save_checkpoint"), "before a metric": (folder, "_line"),
        "before a probe": (degradation, "probe"),
    }[place]  # fmt: skip
    real = owner[name] if isinstance(owner, dict) else getattr(owner, name)

    def stops(*args, **kwargs):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return real(*args, **kwargs)

    monkeypatch.setitem(owner, name, stops) if isinstance(owner, dict) else monkeypatch.setattr(owner, name, stops)
    for stopped in range(100):  # noqa: B007
        left = 2 + (place == "before a metric")  # of which a resumed run writes some anew
        try:
            all_runs(tmp_path)
            break
        except Killed:
            torch.rand(3)  # another process has another past
    assert 2 < stopped < 99
    for run in PLAN_OF_TWO.runs:
        ours, theirs = (read_outcome(PLAN_OF_TWO, folder, run) for folder in (tmp_path, straight))
        assert without_times(ours.records) == without_times(theirs.records)
        assert ours.probes == theirs.probes
        a, b = (torch.load(folder / run.folder / CHECKPOINT, weights_only=True)["model"] for folder in (tmp_path, straight))
        assert all(torch.equal(a[key], b[key]) for key in b)


def test_what_is_done_is_not_done_again(straight):
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    assert all_runs(straight, commit="another") == []
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_a_run_that_diverges_is_kept_and_the_others_go_on(tmp_path):
    plan = replace(PLAN_OF_TWO, settings=replace(SETTINGS, lr=1e30))
    said = []
    outcomes = all_runs(tmp_path, plan, said)
    assert len(outcomes) == 4 and any(outcome.diverged for outcome in outcomes)
    assert all(outcome.finished(plan) for outcome in outcomes)
    assert any("ends here: the " in words for words in said)
    assert all_runs(tmp_path, plan) == []
    assert any("diverged and counts for nothing below" in words for words in missing(plan, outcomes))


def test_two_at_a_time_are_refused(tmp_path):
    first = run_plan(PLAN_OF_TWO, tiny_data(), tmp_path, CPU, "c0ffee", False, lambda text: None)
    next(first)
    with pytest.raises(FolderError, match="the experiment is being run there"):
        all_runs(tmp_path)
    first.close()


def test_a_run_of_other_settings_is_refused(straight):
    with pytest.raises(FolderError, match="expected a run of TrainConfig"):
        all_runs(straight, replace(PLAN_OF_TWO, settings=replace(SETTINGS, epochs=4)))


@pytest.mark.parametrize("content", ['{"layers": []', "[" * 100_000], ids=["cut off", "too deep"])
def test_a_damaged_file_is_named(tmp_path, content):
    run = PLAN_OF_TWO.runs[0]
    (tmp_path / run.folder).mkdir()
    (tmp_path / run.folder / "probe-0.json").write_text(content)
    with pytest.raises(FolderError, match=f"{tmp_path / run.folder}: a file of the run is damaged"):
        read_outcome(PLAN_OF_TWO, tmp_path, run)
    (tmp_path / degradation.MACHINES).write_text(content)
    with pytest.raises(FolderError, match=f"{tmp_path / degradation.MACHINES}: the file is damaged"):
        degradation.read_machines(tmp_path)
