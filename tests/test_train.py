"""Training: schedule, optimizer, exact resume, checkpoints that survive, metrics, the picture."""

import json
import math
import multiprocessing
import os
import random
import signal
import time
from itertools import pairwise

import pytest
import torch
from torch import distributed, nn

from fused_resnet import backends, files
from fused_resnet.data import DataSet, Split
from fused_resnet.models import get_model
from fused_resnet.train import (
    CHECKPOINT,
    CURVES,
    METRICS,
    CheckpointError,
    FolderError,
    SettingError,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    checkpoint,
    draw_curves,
    load_checkpoint,
    resumable,
    run,
    save_checkpoint,
)
from fused_resnet.train.optimizer import learning_rate, sgd
from fused_resnet.train.processes import parallel
from fused_resnet.train.progress import EPOCH_HEADER, epoch_line

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.05, weight_decay=5e-4, limit_train=32)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """A picture takes longer than these trainings; `drawn` has it."""
    monkeypatch.setitem(run.__globals__, "draw_curves", lambda *args: None)


@pytest.fixture
def drawn(undrawn, monkeypatch):
    monkeypatch.setitem(run.__globals__, "draw_curves", draw_curves)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The networks here are tiny: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_data() -> DataSet:
    """Four classes of 12×12 pictures that a network can tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 4
    images = torch.randint(0, 60, (48, 12, 12, 1), generator=generator, dtype=torch.uint8)
    images += (labels * 60).to(torch.uint8)[:, None, None, None]
    train, evaluation = Split(images[:32], labels[:32]), Split(images[32:], labels[32:])
    return DataSet("tiny", tuple("abcd"), train, evaluation, torch.tensor([0.45]), torch.tensor([0.3]), True, 2)


def trainer(config: TrainConfig = CONFIG) -> Trainer:
    torch.manual_seed(config.seed)
    return Trainer(get_model("resnet20", num_classes=4, in_channels=1), tiny_data(), config, CPU)


def small(config: TrainConfig = CONFIG) -> Trainer:
    """A network of a millisecond a step, which draws random numbers of its own."""
    torch.manual_seed(config.seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return Trainer(model, tiny_data(), config, CPU)


def resumed(folder, make=trainer) -> Trainer:
    """As another process takes up the run in `folder`."""
    config, state = resumable(folder)
    taken_up = make(config)
    taken_up.load_state(state)
    return taken_up


def without_times(history):
    return [{k: v for k, v in record.items() if k not in ("images_per_second", "train_seconds")} for record in history]


def same_states(a, b) -> bool:
    """Bit for bit, through containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_states(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_states, a, b))
    return a == b


def lines(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


# ---- schedule and optimizer ------------------------------------------------------------------------------------------


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rates = [learning_rate(step, total=50, warmup=10, highest=0.4) for step in range(50)]
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert rates[10] == 0.4
    assert rates[30] == pytest.approx(0.2)
    assert all(a > b > 0 for a, b in pairwise(rates[10:]))
    assert learning_rate(50, 50, 10, 0.4) == pytest.approx(0, abs=1e-12)
    assert learning_rate(0, 5, 0, 0.4) == 0.4, "without a warm-up it starts at the top"


@pytest.mark.parametrize("decay_norms", [True, False])
def test_weight_decay_of_norms_and_biases_is_optional(decay_norms):
    model = get_model("resnet20")
    groups = sgd(model, TrainConfig(weight_decay=0.01, decay_norms=decay_norms), CPU).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["weight_decay"] == 0.01
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert groups[1]["weight_decay"] == (0.01 if decay_norms else 0)
    assert all(p.dim() == 1 for p in groups[1]["params"])
    assert all(group["momentum"] == 0.9 for group in groups)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", 1.5), ("batch_size", -1), ("limit_train", 0), ("lr", 0.0), ("lr", math.nan), ("momentum", 1.0),
        ("weight_decay", -1.0), ("label_smoothing", 1.0), ("precision", "fp8"), ("seed", -1), ("warmup_epochs", -1.0),
        ("model", 3), ("seed", 1.5), ("lr", "high"), ("lr", True), ("epochs", True), ("decay_norms", 1), ("backend", "fastest"), ("backend", 1),
    ],
)  # fmt: skip
def test_setting_out_of_range_is_named(name, value):
    with pytest.raises(SettingError, match=f"{name}: expected") as caught:
        TrainConfig(**{name: value})
    assert caught.value.name == name


def test_batch_larger_than_the_split_is_named():
    with pytest.raises(SettingError, match="batch_size: expected at most 32"):
        trainer(TrainConfig(batch_size=33))


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    straight = trainer()
    run(straight, tmp_path / "straight", progress=False)
    run(trainer(), tmp_path / "parts", stop_after=1, progress=False)
    torch.rand(7)  # the resumed process has another past
    parts = resumed(tmp_path / "parts")
    assert (parts.config, parts.epoch) == (CONFIG, 1)
    run(parts, tmp_path / "parts", progress=False)
    a, b = straight.state(), parts.state()
    for record in a["history"] + b["history"]:
        for measured in ("images_per_second", "train_seconds"):
            del record[measured]
    assert parts.epoch == 2
    assert same_states(a, b)
    momentum = b["optimizer"]["state"][0]["momentum_buffer"]
    assert momentum.abs().sum() > 0


def test_it_learns_and_every_epoch_has_one_line(tmp_path):
    said = []
    config = TrainConfig(epochs=4, batch_size=8, lr=0.05)
    history = run(trainer(config), tmp_path, progress=False, say=said.append)
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    assert lines(tmp_path) == history
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert [record["step"] for record in history] == [4, 8, 12, 16]
    assert len(said) == 1 + 4, "a header, and a line an epoch"
    assert all(len(line) == len(said[0]) < 80 for line in said)
    assert set(history[0]) == {
        "epoch", "step", "lr", "train_loss", "train_accuracy", "images_per_second", "train_seconds", "eval_loss",
        "eval_accuracy",
    }  # fmt: skip


def test_no_line_is_written_twice_on_resume(tmp_path):
    run(trainer(), tmp_path, stop_after=1, progress=False)
    first = lines(tmp_path)
    # As an interruption between the line and the checkpoint leaves it, with half a line at the end.
    with (tmp_path / METRICS).open("a") as file:
        file.write(json.dumps({**first[0], "epoch": 2}) + '\n{"epoch": 3, "st')
    run(resumed(tmp_path), tmp_path, progress=False)
    assert [record["epoch"] for record in lines(tmp_path)] == [1, 2]
    assert lines(tmp_path)[0] == first[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(tmp_path, precision):
    config = TrainConfig(epochs=2, batch_size=8, lr=0.05, precision=precision, label_smoothing=0.1)
    run(small(config), tmp_path, stop_after=1, progress=False)
    taken_up = resumed(tmp_path, small)
    assert bool(taken_up.scaler.state_dict()) == (precision == "fp16"), "only fp16 scales its loss"
    history = run(taken_up, tmp_path, progress=False)
    assert len(history) == 2
    assert all(math.isfinite(record["train_loss"]) for record in history)
    assert all(p.dtype == torch.float32 for p in small(config).model.parameters())


def test_the_scaler_goes_on_where_it_was(tmp_path):
    config = TrainConfig(epochs=2, batch_size=8, precision="fp16")
    before = small(config)
    before.scaler.load_state_dict({**before.scaler.state_dict(), "scale": 8.0, "_growth_tracker": 3})
    save_checkpoint(tmp_path / CHECKPOINT, before.state())
    found = resumed(tmp_path, small).scaler.state_dict()
    assert (found["scale"], found["_growth_tracker"]) == (8.0, 3)


def test_the_schedule_goes_on_where_it_was(tmp_path):
    def rates(trainer, stop_after=None):
        step, asked = trainer.step, []
        trainer.step = lambda images, labels, lr: asked.append(lr) or step(images, labels, lr)
        run(trainer, tmp_path, stop_after, progress=False)
        return asked

    config = TrainConfig(epochs=4, batch_size=8, lr=0.4, warmup_epochs=1.5)
    first = rates(small(config), stop_after=1)
    found = first + rates(resumed(tmp_path, small), stop_after=3) + rates(resumed(tmp_path, small))
    assert found == [learning_rate(i, 16, 6, 0.4) for i in range(16)]


def test_random_numbers_go_on_where_they_were(tmp_path):
    """Dropout, which draws from PyTorch's own generator: the same bits as without an interruption."""
    straight = small()
    run(straight, tmp_path / "straight", progress=False)
    run(small(), tmp_path / "parts", stop_after=1, progress=False)
    taken_up = resumed(tmp_path / "parts", small)
    run(taken_up, tmp_path / "parts", progress=False)
    assert same_states(straight.model.state_dict(), taken_up.model.state_dict())
    assert torch.equal(straight.state()["rng"]["cpu"], taken_up.state()["rng"]["cpu"])


def test_label_smoothing_is_that_of_the_training_loss():
    trained = small(TrainConfig(batch_size=8, label_smoothing=0.3))
    nn.init.constant_(trained.model[-1].bias[0], 3.0)
    images, _ = next(trained.train_loader.batches(0))
    labels = torch.zeros(8, dtype=torch.long)  # of all classes alike it would change little
    loss, logits = trained.step(images, labels, 0.1)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits, labels, label_smoothing=0.3).item(), rel=1e-6)
    assert abs(loss.item() - nn.functional.cross_entropy(logits, labels).item()) > 1e-3


def test_evaluation_is_in_evaluation_mode_and_changes_nothing():
    trained = small(TrainConfig(batch_size=8, label_smoothing=0.3))
    trained.train_epoch(progress=False)
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    found = trained.evaluate()
    assert same_states(before, trained.model.state_dict())
    assert found == trained.evaluate(), "no dropout"
    images, labels = (torch.cat(parts) for parts in zip(*trained.eval_loader.batches(0), strict=True))
    with torch.no_grad():
        scores = trained.model.eval()(images)
    assert found["eval_loss"] == pytest.approx(nn.functional.cross_entropy(scores, labels).item(), rel=1e-5)
    assert found["eval_accuracy"] == (scores.argmax(1) == labels).double().mean().item()
    trained.train_epoch(progress=False)
    assert trained.model.training


@pytest.mark.parametrize("name", ["eager", "off"])
def test_the_backend_of_the_settings_is_taken(monkeypatch, name):
    asked = []
    trained = trainer(TrainConfig(batch_size=32, backend=name))
    monkeypatch.setattr(trained.model.fc, "forward", lambda x: asked.append(backends.resolve(CPU, x.dtype)) or x[:, :4])
    trained.train_epoch(progress=False)
    trained.evaluate()
    assert set(asked) == {name} and len(asked) == 2


def test_recompute_is_a_setting():
    assert trainer(TrainConfig(batch_size=32, recompute=True)).model.layer1[0].recompute
    assert not trainer(TrainConfig(batch_size=32)).model.layer1[0].recompute


def test_a_batch_of_which_a_norm_sees_one_value_is_named():
    torch.manual_seed(0)
    norm = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 4))
    with pytest.raises(SettingError, match="batch_size: expected at least 2, 2 for each process, .*; got 1"):
        Trainer(norm, tiny_data(), TrainConfig(batch_size=1), CPU).train_epoch(progress=False)


@pytest.mark.filterwarnings("error")
def test_processes_do_not_send_running_statistics_in_training(monkeypatch):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setitem(parallel.__globals__, "world", lambda: 2)
        assert not parallel(get_model("resnet20"), CPU, False).will_sync_module_buffers()
    finally:
        distributed.destroy_process_group()


def test_lines_keep_their_columns():
    record = {"epoch": 3, "train_loss": 1.23456, "train_accuracy": 0.5, "eval_loss": 2.5, "eval_accuracy": 1.0, "images_per_second": 739.2}
    assert epoch_line(record, 10) == "     3/10          1.2346     50.00%            2.5000    100.00%         739"
    for change in ({"train_loss": 3.4e38, "eval_loss": 1e300}, {"epoch": 10**9}, {"images_per_second": 1e8}):
        line = epoch_line(record | change, 10**9 if "epoch" in change else 10)
        assert len(line) - len(EPOCH_HEADER) == (12 if "epoch" in change else 0)
    assert "3.4000e+38" in epoch_line(record | {"train_loss": 3.4e38}, 10)


# ---- a folder is one run's -------------------------------------------------------------------------------------------

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


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    run(trainer(), tmp_path, stop_after=1, progress=False)
    before = (tmp_path / CHECKPOINT).read_bytes()
    taken_up = resumed(tmp_path)
    torch.nn.init.constant_(taken_up.model.fc.weight, math.nan)
    with pytest.raises(TrainingDiverged, match="the loss of epoch 2 is nan"):
        run(taken_up, tmp_path, progress=False)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert len(lines(tmp_path)) == 1


def test_the_picture_is_one(tmp_path, drawn):
    image = pytest.importorskip("matplotlib.image")
    run(trainer(), tmp_path, progress=False)
    pixels = image.imread(tmp_path / CURVES)
    assert pixels.shape == (450, 1800, 4)
    for color in (0x4C, 0x72, 0xB0), (0xDD, 0x84, 0x52), (0x81, 0x72, 0xB3), (0x55, 0xA8, 0x68):  # training, evaluation, rate, speed
        drawn = (abs(pixels[..., :3] - [value / 255 for value in color]) < 0.01).all(-1)
        assert drawn.sum() > 50, color


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run(trainer(), folder, stop_after=1, progress=False)
    return (folder / CHECKPOINT).read_bytes()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
def test_truncated_checkpoint_is_named(tmp_path, saved, fraction):
    path = tmp_path / CHECKPOINT
    path.write_bytes(saved[: int(fraction * len(saved))])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert f"{path}: truncated, or not a checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)


class Foreign:
    """Not among what weights_only may load."""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"state_dict": {}}, "not a checkpoint of `fused-resnet train`"),
        (torch.zeros(3), "not a checkpoint of `fused-resnet train`"),
        (Foreign(), "not a checkpoint of `fused-resnet train`"),
        ({"format": checkpoint.FORMAT, "version": 99}, "expected version 1 of the format; got 99"),
        ({"format": checkpoint.FORMAT, "version": 1, "config": {}, "epoch": 1}, "without model, optimizer"),
    ],
)
def test_foreign_checkpoint_is_named(tmp_path, content, expected):
    path = tmp_path / CHECKPOINT
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_missing_checkpoint_and_damaged_settings_are_named(tmp_path, saved):
    with pytest.raises(CheckpointError, match="no such file"):
        resumable(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(saved)
    state = load_checkpoint(tmp_path / CHECKPOINT)
    state["config"]["epochs"] = -3
    save_checkpoint(tmp_path / CHECKPOINT, {key: state[key] for key in checkpoint.KEYS})
    with pytest.raises(CheckpointError, match="its settings can't be used .*epochs"):
        resumable(tmp_path)


def test_checkpoint_of_another_network_is_named(tmp_path, saved):
    (tmp_path / CHECKPOINT).write_bytes(saved)
    _, state = resumable(tmp_path)
    other = Trainer(get_model("resnet32", num_classes=4, in_channels=1), tiny_data(), CONFIG, CPU)
    expected = r"the checkpoint does not fit resnet20: model: missing in its state_dict: layer1\.3\.bn1\.bias and \d+ more"
    with pytest.raises(CheckpointError, match=expected) as caught:
        other.load_state(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed")])
def test_old_checkpoint_is_kept_when_a_write_fails_midway(tmp_path, saved, monkeypatch, error):
    path = tmp_path / CHECKPOINT
    path.write_bytes(saved)

    def half(content, file):
        file.write(saved[:1000])
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match="could not be written: .*; the one that was there is kept"):
        save_checkpoint(path, trainer().state())
    assert path.read_bytes() == saved
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 1


def test_a_part_that_a_killed_process_left_is_no_obstacle(tmp_path, saved):
    (tmp_path / f"{CHECKPOINT}.part").write_bytes(saved[:1000])
    save_checkpoint(tmp_path / CHECKPOINT, trainer().state())
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.fixture(scope="module")
def small_state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    run(small(), folder, stop_after=1, progress=False)
    return folder / CHECKPOINT


def changed(state, path, value):
    """A copy of nested dicts and lists with another value at `path`; without it where `value` is None."""
    key, *rest = path
    copy = state.copy()
    if rest:
        copy[key] = changed(state[key], rest, value)
    elif value is None:
        del copy[key]
    else:
        copy[key] = value(state[key]) if callable(value) else value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("model", [1], "model: expected dict; got list"),
        ("optimizer", 3, "optimizer: expected dict; got int"),
        ("scaler", "x", "scaler: expected dict; got str"),
        ("rng", torch.zeros(3), "rng: expected dict; got Tensor"),
        ("history", {}, "history: expected list; got dict"),
        ("config", [], "config: expected dict; got list"),
        ("epoch", 1.0, "epoch: expected int; got float"),
        ("epoch", True, "epoch: expected int; got bool"),
        ("epoch", 7, "epoch: expected 0 to 2; got 7"),
        ("model 0.weight", None, "model: missing in its state_dict: 0.weight"),
        ("model 9.weight", torch.zeros(1), "model: unexpected in its state_dict: 9.weight"),
        ("model 0.weight", 3, "model: 0.weight: expected float32 [8, 1, 3, 3]; got int"),
        ("model 0.weight", torch.zeros(8, 1, 3, 1), "got float32 [8, 1, 3, 1]"),
        ("model 0.weight", torch.Tensor.half, "model: 0.weight: expected float32 [8, 1, 3, 3]; got float16"),
        ("model 0.weight", torch.Tensor.int, "got int32"),
        ("model 0.weight", torch.Tensor.to_sparse, "model: 0.weight: expected float32"),
        ("model 1.running_mean", torch.Tensor.double, "model: 1.running_mean: expected float32 [8]; got float64"),
        ("model 1.num_batches_tracked", torch.Tensor.float, "model: 1.num_batches_tracked: expected int64 []; got float32"),
        ("model 1.running_var", {}, "model: 1.running_var: expected float32 [8]; got dict"),
        ("optimizer state", None, "optimizer: expected a state for each parameter"),
        ("optimizer state", {}, "optimizer: parameter 0: expected a momentum buffer; got none"),
        ("optimizer state 3", None, "optimizer: parameter 3: expected a momentum buffer; got none"),
        ("optimizer state 3", {}, "optimizer: parameter 3: expected a momentum buffer; got none"),
        ("optimizer state 3 momentum_buffer", 1.5, "optimizer: momentum buffer 3: expected float32 [8]; got float"),
        ("optimizer state 3 momentum_buffer", torch.Tensor.half, "optimizer: momentum buffer 3: expected float32 [8]; got float16"),
        ("optimizer state 3 momentum_buffer", torch.zeros(4), "optimizer: momentum buffer 3: expected float32 [8]; got float32 [4]"),
        ("optimizer param_groups", [], "optimizer: expected 2 groups of parameters"),
        ("optimizer param_groups", [1, 2], "optimizer: expected 2 groups of parameters"),
        ("optimizer param_groups 0 momentum", 0.5, "optimizer: momentum: expected 0.9; got 0.5"),
        ("optimizer param_groups 0 momentum", torch.ones(2), "optimizer: momentum: expected 0.9; got tensor"),
        ("optimizer param_groups 1 nesterov", True, "optimizer: nesterov: expected False; got True"),
        ("optimizer param_groups 1 weight_decay", None, "optimizer: weight_decay: expected 0.0005; got None"),
        ("optimizer param_groups 1 params", [5], "optimizer: expected 4 parameters in a group, in their order"),
        ("scaler", {"scale": 2.0}, "scaler: expected nothing, since only fp16 scales its loss"),
        ("rng cpu", 3, "rng: cpu: expected a generator's state"),
        ("rng cpu", torch.zeros(3, dtype=torch.uint8), "rng: expected the state of PyTorch's generator on the CPU"),
        ("rng cpu", torch.Tensor.float, "rng: cpu: expected a generator's state"),
        ("rng cpu", None, "rng: expected the state of PyTorch's generator on the CPU"),
        ("history", [], "history: expected a record for each of 1 epochs; got 0"),
        ("history", [3], "history: epoch 1: expected a record with epoch, step"),
        ("history 0 lr", None, "history: epoch 1: expected a record with epoch, step"),
        ("history 0 eval_loss", math.nan, "history: epoch 1: eval_loss: expected a finite number; got nan"),
        ("history 0 eval_loss", "low", "history: epoch 1: eval_loss: expected a finite number; got 'low'"),
        ("history 0 epoch", 5, "history: epoch 1: expected a record"),
        ("config lr", "high", "its settings can't be used (lr: expected a number; got 'high')"),
        ("config colour", "red", "its settings can't be used ("),
        ("config seed", 0.5, "its settings can't be used (seed: expected a whole number; got 0.5)"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_named_and_nothing_of_it_is_taken(tmp_path, small_state, path, value, expected):
    path = [int(key) if key.isdecimal() else key for key in path.split()]
    torch.save(changed(torch.load(small_state, weights_only=True), path, value), tmp_path / CHECKPOINT)
    taken_up = small()
    before = {name: tensor.clone() for name, tensor in taken_up.model.state_dict().items()}
    rng = torch.get_rng_state()
    with pytest.raises(CheckpointError) as caught:
        _, state = resumable(tmp_path)
        taken_up.load_state(state)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert same_states(before, taken_up.model.state_dict()) and torch.equal(rng, torch.get_rng_state())
    assert (taken_up.epoch, taken_up.history, taken_up.optimizer.state_dict()["state"]) == (0, [], {})


@pytest.mark.parametrize("change", [{"scale": 0.0}, {"scale": math.inf}, {"scale": "x"}, {"growth_factor": 3.0}, {"_growth_tracker": -1}])
def test_a_scaler_that_can_not_be_one_is_named(change):
    config = TrainConfig(batch_size=8, precision="fp16")
    state = small(config).state()
    state["scaler"] |= change
    with pytest.raises(CheckpointError, match=f"scaler: {next(iter(change))}: expected"):
        small(config).load_state(state)


def test_a_parameter_without_a_gradient_needs_no_buffer(tmp_path):
    def partly(config=CONFIG):
        made = small(config)
        made.model[0].weight.requires_grad_(False)
        return made

    run(partly(), tmp_path, stop_after=1, progress=False)
    run(resumed(tmp_path, partly), tmp_path, progress=False)
    assert len(lines(tmp_path)) == 2


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "model": Harmful(tmp_path / "marker")}, tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError, match="truncated, or not a checkpoint") as caught:
        resumable(tmp_path)
    assert "mkdir" in str(caught.value) and "weights_only" not in str(caught.value), "no advice to run it"
    assert not (tmp_path / "marker").exists()


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
