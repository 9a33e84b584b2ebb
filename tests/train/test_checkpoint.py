"""Checkpoints: written whole, and taken over whole or not at all."""

import math
import os

import pytest
import torch
from support.trainings import CONFIG, CPU, lines, one_thread, resumed, same_states, small, tiny_data, trainer, undrawn

from fused_resnet.models import get_model
from fused_resnet.train import (
    CHECKPOINT,
    CheckpointError,
    TrainConfig,
    Trainer,
    checkpoint,
    load_checkpoint,
    resumable,
    run,
    save_checkpoint,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__, undrawn.__name__)


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
        ({"format": checkpoint.FORMAT, "version": 99}, "expected version 2 of the format; got 99"),
        ({"format": checkpoint.FORMAT, "version": 2, "config": {}, "epoch": 1}, "without data, partial, model, ema, optimizer"),
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
        ("partial", {}, "partial: expected batch, seconds, loss_sum, correct"),
        ("partial batch", 5, "partial: batch: expected 0 to 4; got 5"),
        ("partial batch", 1.0, "partial: batch: expected 0 to 4; got 1.0"),
        ("partial loss_sum", [], "partial: loss_sum and correct: expected a number for each process"),
        ("partial correct", [1.0, 2.0], "partial: loss_sum and correct: expected a number for each process"),
        ("partial correct", ["x"], "partial: expected numbers of at least 0; got 'x'"),
        ("partial seconds", math.nan, "partial: expected numbers of at least 0; got nan"),
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
        ("ema", {"n_averaged": 1}, "ema: expected nothing, since this run has no moving average"),
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
