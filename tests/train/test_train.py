"""Training: schedule, optimizer, exact resume, metrics, the picture."""

import json
import math
from itertools import pairwise

import pytest
import torch
from support.trainings import CONFIG, CPU, MEASURED, drawn, lines, one_thread, resumed, same_states, small, tiny_data, trainer, undrawn
from torch import distributed, nn

from fused_resnet import backends
from fused_resnet.models import get_model
from fused_resnet.train import (
    CHECKPOINT,
    CURVES,
    METRICS,
    SettingError,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    run,
    save_checkpoint,
)
from fused_resnet.train.optimizer import cosine, make_optimizer
from fused_resnet.train.processes import parallel
from fused_resnet.train.progress import EPOCH_HEADER, epoch_line

pytestmark = pytest.mark.usefixtures(one_thread.__name__, undrawn.__name__)

# ---- schedule and optimizer ------------------------------------------------------------------------------------------


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rates = [cosine(step, total=50, warmup=10, highest=0.4) for step in range(50)]
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert rates[10] == 0.4
    assert rates[30] == pytest.approx(0.2)
    assert all(a > b > 0 for a, b in pairwise(rates[10:]))
    assert cosine(50, 50, 10, 0.4) == pytest.approx(0, abs=1e-12)
    assert cosine(0, 5, 0, 0.4) == 0.4, "without a warm-up it starts at the top"


@pytest.mark.parametrize("decay_norms", [True, False])
def test_weight_decay_of_norms_and_biases_is_optional(decay_norms):
    model = get_model("resnet20")
    groups = make_optimizer(model, TrainConfig(weight_decay=0.01, decay_norms=decay_norms), CPU).param_groups
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
        for measured in MEASURED:
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
    for record in history:  # all of an epoch, over the time that they took
        assert record["images_per_second"] * record["train_seconds"] == pytest.approx(4 * 8)
    assert len(said) == 1 + 4, "a header, and a line an epoch"
    assert all(len(line) == len(said[0]) < 80 for line in said)
    assert set(history[0]) == {
        "epoch", "step", "lr", "train_loss", "train_accuracy", "images_per_second", "train_seconds", "eval_loss",
        "eval_accuracy", "eval_top5_accuracy", "eval_seconds", "peak_memory_bytes", "ended",
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
    assert found == [cosine(i, 16, 6, 0.4) for i in range(16)]


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
    again = trained.evaluate()
    del found["eval_seconds"], again["eval_seconds"]
    assert found == again, "no dropout"
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


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    run(trainer(), tmp_path, stop_after=1, progress=False)
    before = (tmp_path / CHECKPOINT).read_bytes()
    taken_up = resumed(tmp_path)
    torch.nn.init.constant_(taken_up.model.fc.weight, math.nan)
    with pytest.raises(TrainingDiverged, match="the loss of epoch 2 is nan"):
        run(taken_up, tmp_path, progress=False)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert len(lines(tmp_path)) == 1


@pytest.mark.usefixtures(drawn.__name__)
def test_the_picture_is_one(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    run(trainer(), tmp_path, progress=False)
    pixels = image.imread(tmp_path / CURVES)
    assert pixels.shape == (450, 1800, 4)
    for color in (0x4C, 0x72, 0xB0), (0xDD, 0x84, 0x52), (0x81, 0x72, 0xB3), (0x55, 0xA8, 0x68):  # training, evaluation, rate, speed
        drawn = (abs(pixels[..., :3] - [value / 255 for value in color]) < 0.01).all(-1)
        assert drawn.sum() > 50, color
