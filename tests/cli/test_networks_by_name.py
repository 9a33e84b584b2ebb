"""Networks by their names: this package's, those of libraries, a user's function; and training them."""

import importlib
from pathlib import Path

import pytest
import torch
from support.commands import TINY, refused
from support.trainings import one_thread

from fused_resnet import backends
from fused_resnet.bench import load
from fused_resnet.cli import main

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

NETWORKS = """
import torch
from torch import nn

def grey(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def colour():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

def many():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 11))

existing = grey(10, 1)

def held():
    return existing

def a_list():
    return [1]
"""


@pytest.fixture
def networks(monkeypatch, tmp_path):
    """A module of networks in the folder at hand."""
    name = f"networks_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_network_of_ones_own_is_trained_fused(capsys, monkeypatch, networks):
    taken = []
    convolve = backends.BACKENDS["eager"].convolve
    monkeypatch.setattr(backends.BACKENDS["eager"], "convolve", lambda *args: taken.append(1) or convolve(*args))
    assert main(["train", *TINY, "--model", f"{networks}:grey", "--backend", "eager", "--stop-after", "1"]) == 0
    folder = Path("runs") / f"{networks}-grey-fashion-mnist-mini"
    assert len(taken) == 2, "forward in training and in evaluation"
    assert f"--resume {folder} --model {networks}:grey" in capsys.readouterr().out
    line = refused(capsys, "train", "--resume", folder)
    assert f"argument --model: expected {networks}:grey beside --resume: a checkpoint alone does not say which code is run" in line
    assert main(["train", "--resume", str(folder), "--model", f"{networks}:grey", "--device", "cpu"]) == 0


def test_a_network_that_exists_is_trained_as_a_copy(networks):
    existing = importlib.import_module(networks).existing
    before, classes = {name: t.clone() for name, t in existing.state_dict().items()}, [type(m) for m in existing.modules()]
    assert main(["train", *TINY, "--model", f"{networks}:held", "--backend", "eager", "--stop-after", "1"]) == 0
    assert [type(m) for m in existing.modules()] == classes and existing.training
    assert all(torch.equal(t, before[name]) for name, t in existing.state_dict().items())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("colour", "colour can't take images of shape [2, 1, 28, 28]: "),
        ("many", "expected scores of shape [2, 10] of 2 images of fashion-mnist-mini; "),
        ("a_list", "a_list returned list"),
        ("gray", "has no function 'gray'; did you mean grey?"),
    ],
)
def test_a_network_that_does_not_fit_is_named(capsys, networks, function, expected):
    line = refused(capsys, "train", *TINY, "--model", f"{networks}:{function}")
    assert "argument --model: " in line and expected in line


@pytest.mark.parametrize(("name", "channels"), [("torchvision:resnet18", 3), ("timm:test_resnet", 1), ("resnet20", 1), ("resnet18", 3)])
def test_networks_of_libraries_take_classes_and_channels(name, channels, torchvision_models):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = load.builder(name, num_classes=7, in_channels=channels)()
    assert model.train()(torch.randn(2, channels, 64, 64)).shape == (2, 7)
    assert load.builder(name)()(torch.randn(2, 3, 64, 64)).shape[0] == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision:resnet19", "torchvision.models has no function 'resnet19'; did you mean resnet1"),
        ("timm:resnet5O", "timm has no 'resnet5O'; did you mean resnet5"),
        ("absent_module:f", "absent_module does not import: No module named"),
        (":f", "no module does not import"),
        ("math:sqr", "math has no function 'sqr'; did you mean sqrt?"),
    ],
)
def test_a_network_that_is_not_there_is_named(name, expected, torchvision_models):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(load.LoadError) as caught:
        load.builder(name)
    assert expected in str(caught.value)
