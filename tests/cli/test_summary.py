"""`fused-resnet summary`: what it counts is what the networks have, and stands beside the paper's figures."""

import csv
import io
import json

import pytest
import torch
from support.commands import refused
from torch import nn

from fused_resnet import models
from fused_resnet.bench.trace import trace
from fused_resnet.cli import main
from fused_resnet.cli.summary import TABLE_1, TABLE_6
from fused_resnet.roofline import resnet


def told(capsys, *args) -> list[dict]:
    """The tables as JSON."""
    assert main(["summary", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_layers_are_those_that_roofline_counts(capsys, name):
    """Names, sizes, parameters with the norm's, multiply-adds: by the trace, and by the description of the network."""
    network = resnet(name, 1)
    rows = {row["layer"]: row for row in told(capsys, name)[0]["rows"]}
    for layer in network.layers:
        row, conv = rows[layer.name], layer.conv
        assert row["output"] == f"{conv.k}x{conv.p}x{conv.q}"
        assert row["parameters"] == conv.weight_elements + 2 * conv.k
        assert row["multiply-adds, millions"] == pytest.approx(conv.flops / 2e6, abs=0.006)
    assert rows.keys() == {layer.name for layer in network.layers} | {"maxpool", "avgpool", "fc"}
    assert list(rows)[:2] == ["conv1", "maxpool"] and list(rows)[-1] == "fc"
    assert rows["maxpool"]["output"] == "64x56x56" and rows["fc"]["output"] == "1000"
    assert sum(row["parameters"] for row in rows.values()) == network.parameters


def test_the_papers_table_stands_beside_the_counts(capsys):
    (_, beside) = told(capsys, "resnet50")
    assert beside["title"] == "billions of multiply-adds at 224 x 224, beside table 1 of He et al. 2015"
    found = {row["network"]: list(row.values())[1:] for row in beside["rows"]}
    assert found == {
        "resnet18": [1.81, 1.81, 1.79, 1.8],
        "resnet34": [3.66, 3.66, 3.64, 3.6],
        "resnet50": [4.09, 3.86, 3.5, 3.8],
        "resnet101": [7.8, 7.57, 7.21, 7.6],
        "resnet152": [11.51, 11.28, 10.92, 11.3],
    }
    assert found.keys() == TABLE_1.keys()


def test_what_no_count_rounds_to_is_named(capsys):
    assert main(["summary", "resnet50"]) == 0
    out = " ".join(capsys.readouterr().out.split())  # however wide the lines are
    assert "25,557,032 parameters; an image 4.089 billion multiply-adds, 8.178 billion FLOPs" in out
    assert "Each figure of the paper is one of these counts, rounded, but resnet50's 3.8 (by the paper's strides 3.86)." in out


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_networks_for_small_images_have_their_size_and_the_papers_parameters(capsys, name):
    layers, beside = told(capsys, name)
    assert layers["title"] == f"{name}, images of 32 x 32"
    assert beside["rows"] == [{"network": name, "counted": pytest.approx(TABLE_6[name], rel=0.02), "the paper says": TABLE_6[name]}]


def test_plain_networks_stand_alone_and_a_size_can_be_chosen(capsys):
    (layers,) = told(capsys, "plain20", "--size", "16")
    assert layers["title"] == "plain20, images of 16 x 16" and layers["rows"][0]["output"] == "16x16x16"


def test_csv_is_for_programs(capsys):
    assert main(["summary", "resnet18", "--csv"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    first = next(csv.DictReader(io.StringIO("\n".join(lines))))
    assert title == "# resnet18, images of 224 x 224"
    assert first == {"layer": "conv1", "output": "64x112x112", "parameters": "9536", "multiply-adds, millions": "118.01", "of all": "6.5%"}


def test_a_network_of_ones_own(capsys, tmp_path, monkeypatch):
    (tmp_path / "summarised.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(144, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (layers,) = told(capsys, "summarised:net", "--size", "8")
    assert [(row["layer"], row["output"], row["parameters"]) for row in layers["rows"]] == [("0", "4x6x6", 108), ("2", "2", 290)]
    assert "can't be traced on [2, 3, 9, 9]: RuntimeError" in refused(capsys, "summary", "summarised:net", "--size", "9")


def test_an_unknown_network_is_refused(capsys):
    assert "argument MODEL: expected one of" in refused(capsys, "summary", "resnet51")
    assert "no function 'nothing'" in refused(capsys, "summary", "json:nothing")


def test_shared_and_frozen_parameters_count_once_or_not_at_all():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.second.weight = self.first.weight
            self.second.bias.requires_grad_(False)

        def forward(self, x):
            return self.second(self.first(x)).flatten(1)

    step = trace(Twice, (2, 3, 4, 4), torch.float32)
    assert step.layer_parameters == {"first": 12, "second": 0} and step.parameters == 12


def test_a_networks_parameters_are_pytorchs():
    step = trace(models.resnet56, (2, 3, 32, 32), torch.float32)
    assert step.parameters == sum(p.numel() for p in models.resnet56().parameters())
