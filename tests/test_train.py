"""Training: schedule, optimizer, exact resume, checkpoints that survive, metrics, the picture."""

import json
import math
from itertools import pairwise

import pytest
import torch

from fused_resnet.data import DataSet, Split
from fused_resnet.models import get_model
from fused_resnet.train import (
    CHECKPOINT,
    CURVES,
    METRICS,
    CheckpointError,
    SettingError,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    checkpoint,
    load_checkpoint,
    resumable,
    run,
    save_checkpoint,
)
from fused_resnet.train.optimizer import learning_rate, sgd

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.05, weight_decay=5e-4, limit_train=32)


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


def resumed(folder) -> Trainer:
    """As another process takes up the run in `folder`."""
    config, state = resumable(folder)
    taken_up = trainer(config)
    taken_up.load_state(state)
    return taken_up


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
    run(trainer(config), tmp_path, stop_after=1, progress=False)
    taken_up = resumed(tmp_path)
    assert bool(taken_up.scaler.state_dict()) == (precision == "fp16"), "only fp16 scales its loss"
    history = run(taken_up, tmp_path, progress=False)
    assert len(history) == 2
    assert all(math.isfinite(record["train_loss"]) for record in history)
    assert all(p.dtype == torch.float32 for p in trainer(config).model.parameters())


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    run(trainer(), tmp_path, stop_after=1, progress=False)
    before = (tmp_path / CHECKPOINT).read_bytes()
    taken_up = resumed(tmp_path)
    torch.nn.init.constant_(taken_up.model.fc.weight, math.nan)
    with pytest.raises(TrainingDiverged, match="the loss of epoch 2 is nan"):
        run(taken_up, tmp_path, progress=False)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert len(lines(tmp_path)) == 1


def test_the_picture_is_one(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    run(trainer(), tmp_path, progress=False)
    pixels = image.imread(tmp_path / CURVES)
    assert pixels.shape == (450, 1500, 4)
    assert pixels[..., :3].std() > 0.05, "not an empty sheet"


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
    with pytest.raises(CheckpointError, match="the checkpoint does not fit resnet20: .*state_dict") as caught:
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
