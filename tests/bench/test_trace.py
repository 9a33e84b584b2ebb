"""A module's step as it is traced, against the designs that are counted by hand and against PyTorch's own counter of FLOPs."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet
from fused_resnet import roofline
from fused_resnet.bench import fusion, load, trace
from fused_resnet.cli import main
from fused_resnet.devices import DEVICES
from fused_resnet.roofline import DESIGNS, resnet, saved_bytes, total_bytes, total_flops, training_step

BATCH = 64
SHAPE = (BATCH, 3, 224, 224)


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def both(request):
    """(the step traced, the network counted by hand)"""
    make = getattr(fused_resnet.models, request.param)
    return trace.trace(make, SHAPE, torch.bfloat16), resnet(request.param, BATCH)


def test_flops_are_those_counted_by_hand(both):
    step, network = both
    assert step.forward_flops == network.forward_flops
    assert step.parameters == network.parameters
    expected = total_flops(training_step(network, DESIGNS["eager"]))
    assert {total_flops(step.kernels(ops)) for ops in fusion.designs(step).values()} == {expected}


#: Relative. `fused`: a graph's max pool writes its input's gradient, which the hand's design recomputes twice instead, 3.9 MB an image.
@pytest.mark.parametrize("name, design, bound", [("eager", "eager", 0.002), ("passes", "passes", 0.03), ("fused", "+fold", 0.03)])
def test_bytes_are_near_those_counted_by_hand(both, name, design, bound):
    step, network = both
    stem = 3.9e6 * BATCH if name == "fused" else 0
    counted = training_step(network, DESIGNS[design])
    ops = fusion.designs(step)[name]
    assert total_bytes(step.kernels(ops)) - stem == pytest.approx(total_bytes(counted), rel=bound)
    assert step.saved_bytes(ops) == pytest.approx(saved_bytes(network, DESIGNS[design]), rel=0.03)


@pytest.mark.parametrize("work, design", [("relu", "eager"), ("backward apply", "passes"), ("dgrad", "fused")])
def test_a_kernel_that_is_forgotten_is_seen(both, work, design):
    step, network = both
    ops = fusion.designs(step)[design]
    name = "+fold" if design == "fused" else design
    left = [op for op in ops if work not in op.work]
    assert total_bytes(step.kernels(left)) < 0.97 * total_bytes(training_step(network, DESIGNS[name]))


def test_resnet50_is_within_three_percent_as_it_is():
    step, network = trace.trace(fused_resnet.models.resnet50, SHAPE, torch.float16), resnet("resnet50", BATCH)
    for name, design in (("eager", "eager"), ("passes", "passes"), ("fused", "+fold")):
        counted = total_bytes(training_step(network, DESIGNS[design]))
        assert total_bytes(step.kernels(fusion.designs(step)[name])) == pytest.approx(counted, rel=0.03)


def test_layers_are_those_of_the_modules():
    step = trace.trace(fused_resnet.models.resnet18, (2, 3, 64, 64), torch.float32)
    found = {(op.layer, op.work) for op in step.ops}
    for layer in resnet("resnet18", 2, 64).layers:
        assert {(layer.name, "fprop"), (layer.name, "wgrad")} <= found
        assert ((layer.name, "dgrad") in found) == (layer.name != "conv1")
    # A norm, an activation and an addition belong to the convolution before them.
    assert {("layer1.0.conv1", "statistics"), ("layer1.0.conv1", "relu"), ("layer1.0.conv1", "backward apply")} <= found
    assert {("layer1.0.conv2", "add"), ("maxpool", "max_pool2d_with_indices_backward"), ("fc", "addmm")} <= found
    assert {op.layer for op in step.ops} - {layer.name for layer in resnet("resnet18", 2, 64).layers} == {
        "maxpool",
        "avgpool",
        "fc",
        "loss",
    }


class Transformer(nn.Module):
    """No convolution of two dimensions, no batch norm."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("make", [Transformer, fused_resnet.models.resnext50_32x4d, fused_resnet.models.resnet20])
def test_flops_of_any_module_are_those_that_pytorch_counts(make):
    step = trace.trace(make, (2, 3, 64, 64), torch.float32)
    with FakeTensorMode(), fused_resnet.backend("off"):
        model = make()
        with FlopCounterMode(display=False) as forward:
            loss = trace.scalar(model(torch.empty(2, 3, 64, 64)), torch.zeros(2, dtype=torch.long))
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert step.forward_flops == forward.get_total_flops()
    if make is not fused_resnet.models.resnext50_32x4d:  # PyTorch counts a grouped wgrad as if it were not grouped
        assert sum(op.flops for op in step.ops if op.backward) == backward.get_total_flops()
    eager, passes, fused = (total_bytes(step.kernels(ops)) for ops in fusion.designs(step).values())
    assert eager > passes > fused


def test_a_chain_of_elementwise_operators_is_one_pass():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1, bias=False)

        def forward(self, x):
            y = self.conv(x)
            return (torch.relu(y) * 2 + x).abs()

    step = trace.trace(Chain, (2, 4, 8, 8), torch.float32)
    ways = fusion.designs(step)
    tensor = 2 * 4 * 8 * 8 * 4
    (chain,) = [op for op in ways["passes"] if op.work.startswith("relu") and not op.backward]
    assert chain.work == "relu, mul, add, abs, mean"
    assert sum(chain.reads.values()) == 2 * tensor
    forward = [op for op in ways["fused"] if not op.backward]
    assert [op.work for op in forward] == ["fprop"]


def test_tracing_leaves_nothing_behind():
    call, dtype = nn.Module.__call__, torch.get_default_dtype()
    with pytest.raises(RuntimeError):
        trace.trace(lambda: nn.Linear(7, 3), (2, 3, 8, 8), torch.float16)
    assert nn.Module.__call__ is call
    assert torch.get_default_dtype() == dtype


# ---- names of networks ------------------------------------------------------------------------------------------------------


def test_builders(torchvision_models, tmp_path, monkeypatch):
    assert isinstance(load.builder("resnet20")(), nn.Module)
    assert isinstance(load.builder("torchvision:resnet18")(), torchvision_models.ResNet)
    (tmp_path / "mine.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(2, 2)\nnumber = 3\ndef wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(load.builder("mine:make")(), nn.Linear)
    with pytest.raises(load.LoadError, match="returned int"):
        load.builder("mine:wrong")()
    for name, words in (
        ("resnet51", "got 'resnet51'"), ("nowhere:make", "nowhere does not import"), ("mine:number", "no function 'number'"),
    ):  # fmt: skip
        with pytest.raises(load.LoadError, match=words):
            load.builder(name)


# ---- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal on which no table is parted."""
    monkeypatch.setenv("COLUMNS", "200")


def cells(line):
    return [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]


def test_the_command_prints_every_design_and_layer(capsys):
    assert main(["roofline", "--model", "resnet50", "--tflops", "800", "--tbytes", "3.0", "--layers"]) == 0
    out = capsys.readouterr().out
    rows = {row[0]: row for line in out.splitlines() if len(row := cells(line)) > 5}
    assert set(DESIGNS) <= set(rows)
    assert rows["onepass"][2:5] == ["332.4", "73", "365"]
    assert rows["+fold"][8] == "12,359"
    assert {layer.name for layer in resnet("resnet50", 1).layers} <= set(rows)
    explained = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and len(line) <= 80]
    assert {part for name in (*DESIGNS, *roofline.INFERENCE) for part in name.split(", ")} == set(explained)
    assert "  +stemf    the stem's norm, ReLU and pool in one pass, both ways" in out and "floor: the time that no" in out
    assert "4.09 billion multiply-adds" in out and "3.86 with the paper's stride" in out


def test_the_command_names_its_peaks(capsys):
    assert main(["roofline", "--model", "resnet18", "--device", "h200"]) == 0
    assert "H200 SXM, published peaks (NVIDIA H200 Tensor Core GPU data sheet): 989.4 TFLOP/s, 4.800 TB/s" in capsys.readouterr().out


def test_the_command_takes_any_network_and_measures_ceilings(capsys):
    assert main(["roofline", "--model", "resnet20", "--batch", "8", "--size", "32", "--device", "measured", "--layers"]) == 0
    out = capsys.readouterr().out
    rows = {row[0]: row for line in out.splitlines() if len(row := cells(line)) > 5}
    assert set(rows) >= {"eager", "passes", "fused", "layer1.0.conv1"}
    assert "  fused     such passes inside convolutions" in out
    # FLOPs; bytes, intensity, floor and what is saved, of eager, passes and fused.
    figures = [float(cell) for cell in rows["layer1.0.conv1"][1:]]
    assert len(figures) == 1 + 3 * 4
    assert figures[1] > figures[5] > figures[9] > 0 and figures[4] >= figures[8] > 0
    if not torch.cuda.is_available():
        assert "this CPU, not a GPU, measured: a large copy and a large matrix product" in out


def test_the_command_finds_the_same_of_torchvisions_network(torchvision_models, capsys):
    given = ["--batch", "64", "--tflops", "800", "--tbytes", "3.0"]
    rows = []
    for model in ("resnet50", "torchvision:resnet50"):
        assert main(["roofline", "--model", model, *given]) == 0
        rows.append({row[0]: row for line in capsys.readouterr().out.splitlines() if len(row := cells(line)) > 5})
    for name, design in (("eager", "eager"), ("passes", "passes"), ("fused", "+fold")):
        traced, counted = (float(row[2]) for row in (rows[1][name], rows[0][design]))
        assert traced == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "resnet51"], "argument --model: expected one of resnet18, resnet34, "),
        (["--batch", "0"], "argument --batch: expected a whole number of at least 1; got '0'"),
        (["--tbytes", "nan"], "argument --tbytes: expected a number above 0; got 'nan'"),
        (["--device", "h300"], "argument --device: expected one of a100-40gb, a100"),
        (["--model", "torch.nn:Identity"], "argument --model: torch.nn:Identity can't be traced on"),
    ],
)
def test_the_command_refuses_by_name(arguments, words, capsys):
    try:
        status = main(["roofline", *arguments])
    except SystemExit as ended:  # by the parser of arguments
        status = ended.code
    assert status == 2
    assert words in capsys.readouterr().err


def test_peaks_are_plausible():
    """A digit too many or a rate with sparsity would show: no GPU here has a ridge above 500 FLOP/byte or below 100."""
    for device in DEVICES.values():
        assert 100 < device.flops_per_s(2) / device.bytes_per_s < 500, device
        assert device.tflops_tf32 <= device.tflops_16 / 1.9, device


def test_the_optimizer_is_a_kernel_of_every_step():
    step = trace.trace(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (4, 3, 2, 2), torch.float32)
    assert step.kernels([])[-1] == roofline.optimizer_step(12 * 5 + 5, 4)
