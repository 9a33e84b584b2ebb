"""A run's folder is one run's: what is refused, locks, kills."""

import multiprocessing
import os
import random
import signal
import time

import pytest
from support.trainings import lines, one_thread, resumed, same_states, small, undrawn, without_times

from fused_resnet import files
from fused_resnet.train import CHECKPOINT, METRICS, CheckpointError, FolderError, TrainConfig, resumable, run
from fused_resnet.train.optimizer import learning_rate

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


def until_killed(folder, config, events):
    """Trains on in `folder`, and dies at the so-manieth step, or before or after a file is on the disk or has its name."""

    def counted(function):
        def call(*args):
            nonlocal events
            for part in (lambda: None, lambda: function(*args)):
                found = part()
                events -= 1
                if events == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    taken_up = resumed(folder, small) if (folder / CHECKPOINT).exists() else small(config)
    taken_up.step = counted(taken_up.step)
    files.os.fsync, files.os.replace = counted(os.fsync), counted(os.replace)
    run(taken_up, folder, progress=False, say=lambda text: None)


def test_28_kills_do_not_change_a_bit(tmp_path):
    config, draws = TrainConfig(epochs=40, batch_size=8, lr=0.05), random.Random(0)
    straight = small(config)
    run(straight, tmp_path / "straight", progress=False, say=lambda text: None)
    parts, reached = tmp_path / "parts", []
    parts.mkdir()
    for _ in range(28):
        process = FORK.Process(target=until_killed, args=(parts, config, draws.randint(1, 24)))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        reached.append(resumable(parts)[1]["epoch"] if (parts / CHECKPOINT).exists() else 0)
    assert reached == sorted(reached) and reached[-1] > 10
    taken_up = resumed(parts, small)
    run(taken_up, parts, progress=False, say=lambda text: None)
    assert same_states(straight.model.state_dict(), taken_up.model.state_dict())
    assert without_times(lines(parts)) == without_times(lines(tmp_path / "straight"))
    assert sorted(path.name for path in parts.iterdir()) == sorted((CHECKPOINT, METRICS))


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
    assert lines(tmp_path)[-1]["lr"] == learning_rate(11, 12, 4, 0.05)
    assert resumable(tmp_path)[0].epochs == 3
