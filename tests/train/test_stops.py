"""Signals save and leave; checkpoints within an epoch; which checkpoints are kept; what a run says of itself at its end."""

import json
import math
import signal
import threading
from dataclasses import replace

import pytest
import torch
from support.commands import TINY, refused
from support.trainings import CONFIG, CPU, lines, one_thread, resumed, same_states, small, undrawn, without_times

from fused_resnet import data, files
from fused_resnet.cli import main
from fused_resnet.train import (
    BEST,
    CHECKPOINT,
    SUMMARY,
    FolderError,
    SettingError,
    Stopped,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    evaluation,
    resumable,
    run,
    stop,
    summarised,
    summary_text,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__, undrawn.__name__)
STEPS = 4  # an epoch


def signalled(trainer: Trainer, after: int, *signals: int) -> Trainer:
    """`trainer`, to which these signals come in its so-manieth step from now; in the evaluation behind the last one for 0."""
    step, forward = trainer.step, trainer.model.forward

    def raised(*args):
        nonlocal after
        after -= 1
        if after == 0:
            for number in signals:
                signal.raise_signal(number)
        return step(*args)

    def called(*args):
        if not trainer.model.training:
            signal.raise_signal(signals[0])
        return forward(*args)

    if after:
        trainer.step = raised
    else:
        trainer.model.forward = called
    return trainer


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("after", "epoch", "batch"), [(1, 0, 1), (3, 0, 3), (4, 0, 4), (6, 1, 2), (0, 0, 4)])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_with_the_same_bits(tmp_path, number, after, epoch, batch):
    straight = small()
    run(straight, tmp_path / "straight", progress=False)
    parts = tmp_path / "parts"
    handlers = [signal.getsignal(each) for each in stop.SIGNALS]
    with pytest.raises(Stopped) as caught:
        run(signalled(small(), after, number), parts, progress=False)
    assert caught.value.signal == number and [signal.getsignal(each) for each in stop.SIGNALS] == handlers
    taken_up = resumed(parts, small)
    assert (taken_up.epoch, taken_up.batch, len(lines(parts))) == (epoch, batch, epoch)
    run(taken_up, parts, progress=False)
    a, b = straight.state(), taken_up.state()
    assert without_times(a.pop("history")) == without_times(b.pop("history")) == without_times(lines(parts))
    assert same_states({**a, "partial": 0}, {**b, "partial": 0})


def test_a_second_signal_leaves_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="SIGTERM, for the second time") as caught:
        run(signalled(small(), 2, signal.SIGINT, signal.SIGTERM), tmp_path, progress=False)
    assert not isinstance(caught.value, Stopped) and not (tmp_path / CHECKPOINT).exists()


def test_a_signal_between_epochs_leaves_there(tmp_path):
    with pytest.raises(Stopped):
        run(small(), tmp_path, progress=False, say=lambda text: text.split()[0] == "1/2" and signal.raise_signal(signal.SIGTERM))
    assert (resumed(tmp_path, small).epoch, resumed(tmp_path, small).batch) == (1, 0)


def test_a_run_in_another_thread_takes_no_handlers(tmp_path):
    thread = threading.Thread(target=run, args=(small(), tmp_path), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert len(lines(tmp_path)) == 2


def test_the_command_says_how_it_goes_on(capsys, monkeypatch, tmp_path):
    real = Trainer.step

    def step(self, *args):
        signal.raise_signal(signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(Trainer, "step", step)
    assert main(["train", *TINY, "--limit-train", "4", "--out", str(tmp_path)]) == 128 + signal.SIGTERM
    told = f"SIGTERM: the run was saved, 0 of 2 epochs and 1 of 2 steps are done; go on with: fused-resnet train --resume {tmp_path}"
    assert told in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path), "--device", "cpu", "--no-progress", "--target-accuracy", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 epochs are done" in out and "images/s, the median epoch's" in out and "target     0.10% " in out


# ---- checkpoints within an epoch -------------------------------------------------------------------------------------


def positions(monkeypatch) -> list[tuple[int, int]]:
    """(epoch, batch) of each checkpoint that is written from now on."""
    written, real = [], run.__globals__["save_checkpoint"]

    def save(path, state):
        written.append((state["epoch"], state["partial"]["batch"]))
        real(path, state)

    monkeypatch.setitem(run.__globals__, "save_checkpoint", save)
    return written


@pytest.mark.parametrize(
    ("minutes", "expected"), [(0, [1, 2, 3, 4, 0]), (1, [3, 0]), (2.5, [0]), (math.inf, [0])], ids=["each", "one", "late", "none"]
)
def test_checkpoints_within_an_epoch_come_by_the_clock(monkeypatch, tmp_path, minutes, expected):
    written, clock = positions(monkeypatch), iter(range(0, 1000, 20))
    monkeypatch.setattr(stop.time, "monotonic", lambda: next(clock))  # seconds: 20 a question
    run(small(replace(CONFIG, epochs=1, checkpoint_minutes=minutes)), tmp_path, progress=False)
    assert [batch for _, batch in written] == expected


def test_seconds_of_an_epoch_go_on(tmp_path):
    with pytest.raises(Stopped):
        run(signalled(small(), 2, signal.SIGINT), tmp_path, progress=False)
    state = resumable(tmp_path)[1]
    state["partial"]["seconds"] = 1000.0
    taken_up = small()
    taken_up.load_state(state)
    record = taken_up.run_epoch(progress=False)
    assert record["train_seconds"] > 1000 and record["images_per_second"] < 32 / 1000


def test_a_loss_that_is_no_number_replaces_no_checkpoint(tmp_path):
    config = replace(CONFIG, checkpoint_minutes=0)
    run(small(config), tmp_path, stop_after=1, progress=False)
    before = (tmp_path / CHECKPOINT).read_bytes()
    taken_up = resumed(tmp_path, small)
    torch.nn.init.constant_(taken_up.model[-1].weight, math.nan)
    with pytest.raises(TrainingDiverged, match="the loss of epoch 2 is no number"):
        run(taken_up, tmp_path, progress=False)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_run_within_an_epoch_is_not_written_over(tmp_path):
    with pytest.raises(Stopped):
        run(signalled(small(), 2, signal.SIGINT), tmp_path, progress=False)
    with pytest.raises(FolderError, match="it has 0 epochs and 2 steps of a run"):
        run(small(), tmp_path, progress=False)


def test_sums_of_several_processes_are_taken_up_by_one(tmp_path):
    with pytest.raises(Stopped):
        run(signalled(small(), 3, signal.SIGINT), tmp_path, progress=False)
    state, parts = resumable(tmp_path)[1], small()
    (loss,), (correct,) = (state["partial"][name] for name in ("loss_sum", "correct"))
    state["partial"] |= {"loss_sum": [loss - 1, 1.0], "correct": [correct, 0.0]}
    a = resumed(tmp_path, small).run_epoch(progress=False)
    parts.load_state(state)
    b = parts.run_epoch(progress=False)
    assert a["train_loss"] == pytest.approx(b["train_loss"]) and a["train_accuracy"] == b["train_accuracy"]


@pytest.mark.parametrize("augment", [True, False])
def test_a_loader_begins_at_any_batch(augment):
    images = data.load("fashion-mnist-mini", limit_train=20, limit_eval=20)
    loader = data.make_loader(images, images.train if augment else images.eval, 6, CPU, augment, seed=2)
    whole, part = list(loader.batches(1)), list(loader.batches(1, first=2))
    assert len(whole) == (3 if augment else 4) and same_states(whole[2:], part)


# ---- which checkpoints are kept --------------------------------------------------------------------------------------


@pytest.fixture
def accuracies(monkeypatch):
    """Of each evaluation."""
    values = iter([0.3, 0.5, 0.4, 0.5, 0.2])
    scores = lambda *args: evaluation.Scores(16, 1.0, next(values), 1.0, 0.1)  # noqa: E731
    monkeypatch.setitem(Trainer.evaluate.__globals__, "evaluate", scores)


@pytest.mark.parametrize("links", [True, False])
def test_the_best_and_the_last_are_kept(monkeypatch, tmp_path, accuracies, links):
    def refuses(*args):
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(files.os, "link", refuses)
    run(small(replace(CONFIG, epochs=5, keep=2)), tmp_path, progress=False)
    found = {path.name: resumable(path)[1]["epoch"] for path in tmp_path.glob("*.pt")}
    assert found == {CHECKPOINT: 5, BEST: 2, "checkpoint-4.pt": 4, "checkpoint-5.pt": 5}
    assert not list(tmp_path.glob("*part"))
    assert ((tmp_path / CHECKPOINT).stat().st_nlink == 2) == links


def test_what_a_kill_left_out_is_made_good(tmp_path):
    """A kill between the checkpoint and its further names."""
    config = replace(CONFIG, keep=1)
    run(small(config), tmp_path, stop_after=1, progress=False)
    for name in (BEST, "checkpoint-1.pt"):
        (tmp_path / name).unlink()
    taken_up = resumed(tmp_path, small)
    run(taken_up, tmp_path, stop_after=1, progress=False)
    assert all(resumable(tmp_path / name)[1]["epoch"] == 1 for name in (BEST, "checkpoint-1.pt"))


def test_a_best_one_can_be_gone_on_with(tmp_path, accuracies):
    run(small(replace(CONFIG, epochs=3)), tmp_path / "a", progress=False)
    taken_up = resumed(tmp_path / "a" / BEST, small)
    assert taken_up.epoch == 2
    run(taken_up, tmp_path / "b", progress=False)
    assert [record["epoch"] for record in lines(tmp_path / "b")] == [1, 2, 3]


@pytest.mark.parametrize(("name", "value"), [("keep", -1), ("checkpoint_minutes", -1), ("checkpoint_minutes", math.nan), ("target_accuracy", 0), ("target_accuracy", 1.5), ("tensorboard", 1)])  # fmt: skip
def test_settings_that_can_not_be_are_named(name, value):
    with pytest.raises(SettingError, match=f"{name}: expected"):
        TrainConfig(**{name: value})


# ---- what a run says of itself ---------------------------------------------------------------------------------------


def records(*accuracies: float) -> list[dict]:
    return [
        {
            "epoch": i, "eval_accuracy": accuracy, "eval_top5_accuracy": 0.9, "train_seconds": 50.0, "eval_seconds": 10.0,
            "images_per_second": 100.0 * i, "peak_memory_bytes": 10**9 * i,
        }
        for i, accuracy in enumerate(accuracies, start=1)
    ]  # fmt: skip


def test_a_summary_follows_from_the_records():
    found = summarised(records(0.3, 0.5, 0.6, 0.6, 0.4), target=0.5)
    assert (found["best_epoch"], found["best_accuracy"], found["seconds_to_best"]) == (3, 0.6, 180)
    assert (found["target_epoch"], found["target_seconds"], found["seconds"]) == (2, 120, 300)
    assert (found["images_per_second"], found["peak_memory_bytes"], found["accuracy"]) == (350, 5 * 10**9, 0.4)
    text = summary_text(found, "cuda")
    assert "best       60.00% after epoch 3, 3:00 min" in text and "target     50.00% after epoch 2, 2:00 min" in text
    assert "350 images/s" in text and "5.00 GB at most, of tensors" in text and max(map(len, text.splitlines())) <= 80
    assert "not reached" in summary_text(summarised(records(0.3), target=0.5), "cpu")
    assert "target" not in summary_text(summarised(records(0.3)), "cpu")
    assert summarised(records(0.3))["images_per_second"] == 100, "of one epoch it is that one's"


def test_a_run_leaves_its_summary(tmp_path):
    history = run(small(replace(CONFIG, target_accuracy=0.01)), tmp_path, progress=False)
    assert json.loads((tmp_path / SUMMARY).read_text()) == summarised(history, 0.01)
    assert all(record["peak_memory_bytes"] > 1e7 for record in history)


def test_events_hold_each_record_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(CONFIG, tensorboard=True)
    run(small(config), tmp_path, stop_after=1, progress=False)
    history = run(resumed(tmp_path, small), tmp_path, progress=False)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    events = found.Scalars("loss/eval")
    assert [event.step for event in events] == [1, 2]
    assert [event.value for event in events] == pytest.approx([record["eval_loss"] for record in history])
    assert [event.wall_time for event in events] == pytest.approx([record["ended"] for record in history])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_without_tensorboard_it_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    line = refused(capsys, "train", *TINY, "--tensorboard", "--out", tmp_path / "run")
    assert "argument --tensorboard: " in line and "pip install 'fused-resnet[tensorboard]'" in line
