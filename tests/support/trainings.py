"""What the tests of training share: tiny images, a trainer of resnet20 and one of a millisecond a step, and what a run leaves."""

import json

import pytest
import torch
from torch import nn

from fused_resnet.data import DataSet, Split
from fused_resnet.models import get_model
from fused_resnet.train import METRICS, TrainConfig, Trainer, draw_curves, resumable, run

CPU = torch.device("cpu")
MEASURED = (
    "images_per_second",
    "train_seconds",
    "eval_seconds",
    "peak_memory_bytes",
    "ended",
)  # fields of a record that differ from run to run
CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.05, weight_decay=5e-4, limit_train=32)


@pytest.fixture
def undrawn(monkeypatch):
    """A picture takes longer than these trainings; `drawn` has it."""
    monkeypatch.setitem(run.__globals__, "draw_curves", lambda *args: None)


@pytest.fixture
def drawn(undrawn, monkeypatch):
    monkeypatch.setitem(run.__globals__, "draw_curves", draw_curves)


@pytest.fixture(scope="module")
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
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in history]


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
