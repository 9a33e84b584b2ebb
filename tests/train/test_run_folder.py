"""A run's folder is one run's: what is refused, locks, kills."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
from support.checkout import ROOT, TESTS
from support.trainings import lines, one_thread, resumed, same_states, small, undrawn, without_times

from fused_resnet.train import BEST, CHECKPOINT, CURVES, METRICS, SUMMARY, CheckpointError, FolderError, TrainConfig, resumable, run
from fused_resnet.train.optimizer import cosine

pytestmark = pytest.mark.usefixtures(one_thread.__name__, undrawn.__name__)

FORK = multiprocessing.get_context("fork")


def test_a_finished_run_is_not_written_over(tmp_path):
    finished = small()
    history = run(finished, tmp_path, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FolderError, match=rf"{tmp_path}: expected a folder without a run, .*--resume.*; it has 2 epochs of a run"):
        run(small(), tmp_path, progress=False)
    assert run(finished, tmp_path, progress=False) == history, "there is nothing left to do"
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(FolderError, match=f"it has a {METRICS} without a {CHECKPOINT}"):
        run(small(), tmp_path, progress=False)
    assert (tmp_path / METRICS).read_bytes() == before[METRICS]
    (tmp_path / CHECKPOINT).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="truncated"):
        run(small(), tmp_path, progress=False)


def test_a_run_that_went_on_meanwhile_is_not_written_over(tmp_path):
    run(small(), tmp_path, stop_after=1, progress=False)
    one, other = resumed(tmp_path, small), resumed(tmp_path, small)
    run(one, tmp_path, progress=False)
    with pytest.raises(FolderError, match="it has 2 epochs of a run"):
        run(other, tmp_path, progress=False)
    assert [record["epoch"] for record in lines(tmp_path)] == [1, 2]


def test_two_trainings_in_one_folder(tmp_path):
    """The second is refused while the first lives; what a killed one leaves is no obstacle."""

    def slowly():
        trained = small(TrainConfig(epochs=1000, batch_size=8))
        step = trained.step
        trained.step = lambda *args: time.sleep(0.01) or step(*args)
        run(trained, tmp_path, progress=False, say=lambda text: None)

    first = FORK.Process(target=slowly, daemon=True)
    first.start()
    ends = time.monotonic() + 60
    while not (tmp_path / CHECKPOINT).exists():
        assert time.monotonic() < ends and first.is_alive()
        time.sleep(0.01)
    for second in (small(), resumed(tmp_path, small)):
        with pytest.raises(FolderError, match=rf"{tmp_path}: a run is being trained there .*process {first.pid} holds this lock"):
            run(second, tmp_path, progress=False)
    first.kill()
    first.join()
    assert (tmp_path / "lock").exists()
    taken_up = resumed(tmp_path, small)
    run(taken_up, tmp_path, stop_after=taken_up.epoch + 1, progress=False)
    assert [record["epoch"] for record in lines(tmp_path)] == list(range(1, taken_up.epoch + 1))
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize(("processes", "kills"), [(1, 20), (2, 10)])
def test_30_kills_do_not_change_a_bit(tmp_path, processes, kills):
    """At moments that are drawn: within epochs, within what writes a checkpoint, and of two processes one or the other."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, TESTS / "support" / "kills.py", tmp_path, str(processes), str(kills), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    reached = json.loads(done.stdout)
    assert len(reached) == kills and reached == sorted(reached) and reached[-1][0] > 3
    assert any(step for _, step in reached), "some went on within an epoch"
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    for name in (CHECKPOINT, BEST, "checkpoint-23.pt", "checkpoint-24.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (straight, parts))
        for key in ("epoch", "model", "ema", "optimizer", "rng"):
            assert same_states(a[key], b[key]), (name, key)
        assert without_times(a["history"]) == without_times(b["history"])
    assert without_times(lines(parts)) == without_times(lines(straight))
    assert [record["epoch"] for record in lines(parts)] == list(range(1, 25))
    kept = {CHECKPOINT, BEST, "checkpoint-23.pt", "checkpoint-24.pt", METRICS, SUMMARY, CURVES}
    assert {path.name for path in parts.iterdir()} <= kept


@pytest.mark.parametrize("name", ["x" * 300, "file/deep", "file", "a\0b", "/proc/absent"])
def test_a_folder_that_can_not_be_one_is_named(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FolderError, match="it can't be written: "):
        run(small(), tmp_path / name, progress=False)


def test_more_epochs_than_the_run_was_started_with(tmp_path):
    run(small(), tmp_path, progress=False)
    config, state = resumable(tmp_path)
    longer = small(TrainConfig(**{**state["config"], "epochs": 3}))
    longer.load_state(state)
    run(longer, tmp_path, progress=False)
    assert [record["epoch"] for record in lines(tmp_path)] == [1, 2, 3]
    assert lines(tmp_path)[-1]["lr"] == cosine(11, 12, 4, 0.05)
    assert resumable(tmp_path)[0].epochs == 3
