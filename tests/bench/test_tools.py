"""What bench, profile, roofline and tune share: any model, left as it was; the package's own commit; tables that fit; ceilings."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkout import ROOT
from torch import nn

import fused_resnet
from fused_resnet.bench import machine, table
from fused_resnet.bench.fusion import designs
from fused_resnet.bench.machine import Ceilings, current_commit, measure_ceilings
from fused_resnet.bench.schema import Row, read_results
from fused_resnet.bench.timing import Times
from fused_resnet.bench.trace import trace
from fused_resnet.cli import main
from fused_resnet.profile.analysis import read_profile

CPU = torch.device("cpu")


# ---- FLOPs -------------------------------------------------------------------------------------------------------------------


def ending(layer: nn.Module, *shape: int):
    """A module of one layer, which reads the images as `shape`, [C, …]."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, shape[0], 1, bias=False)
            self.layer = layer

        def forward(self, x):
            return self.layer(self.first(x).reshape(len(x), *shape))

    return One


#: (what makes a layer, [C, …] of its input, multiply-adds of an image: pixels · weights).
LAYERS = {
    "Conv1d, 4 groups": (lambda: nn.Conv1d(8, 16, 3, padding=1, groups=4, bias=False), (8, 64), 64 * 16 * 2 * 3),
    "depthwise Conv2d": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), (32, 8, 8), 64 * 32 * 9),
    "depthwise Conv3d": (lambda: nn.Conv3d(32, 32, 3, padding=1, groups=32, bias=False), (32, 4, 4, 4), 64 * 32 * 27),
    "depthwise ConvTranspose2d": (lambda: nn.ConvTranspose2d(32, 32, 2, stride=2, groups=32, bias=False), (32, 8, 8), 64 * 32 * 4),
    "ConvTranspose2d, 4 groups": (
        lambda: nn.ConvTranspose2d(8, 16, 4, stride=2, padding=1, groups=4, bias=False),
        (8, 8, 8),
        64 * 8 * 4 * 16,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_backward_of_a_grouped_convolution_costs_twice_its_forward(name):
    """Counted by hand. PyTorch's own formula forgets the groups of a gradient."""
    make, shape, products = LAYERS[name]
    step = trace(lambda: ending(make(), *shape)(), (2, 3, 8, 8), torch.float32)
    own = [op for op in step.ops if op.layer == "layer"]
    forward, backward = (sum(op.flops for op in own if op.backward is b) for b in (False, True))
    assert (forward, backward) == (2 * 2 * products, 2 * 2 * 2 * products)
    assert all(sum(op.flops for op in ops if op.layer == "layer") == forward + backward for ops in designs(step).values())


# ---- any model, left as it was -----------------------------------------------------------------------------------------------

MINE = """
import torch, fused_resnet
from torch import nn
from fused_resnet.models import BasicBlock
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = BasicBlock(16, 16)
        self.head = nn.Linear(16, 4)
    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))
existing = Net().eval()
def net():
    return existing
def fused():
    conv = nn.Conv2d(3, 8, 3, bias=False)
    return fused_resnet.fuse(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of a user's, with a function that returns a model that exists; imported anew for each test."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("mine", None)
    import mine

    yield mine
    sys.modules.pop("mine", None)


COMMANDS = {
    "train": [
        "bench",
        "train",
        "--impl",
        "eager",
        "ours",
        "--repeats",
        "3",
        "--batch",
        "16",
        "--size",
        "8",
        "--out",
        "out",
        "--device",
        "cpu",
    ],
    "inference": [
        "bench",
        "inference",
        "--impl",
        "eager",
        "ours",
        "--repeats",
        "3",
        "--batch",
        "16",
        "--size",
        "8",
        "--out",
        "out",
        "--device",
        "cpu",
    ],
    "blocks": [
        "bench",
        "blocks",
        "--impl",
        "eager",
        "ours",
        "--repeats",
        "3",
        "--batch",
        "16",
        "--size",
        "8",
        "--out",
        "out",
        "--device",
        "cpu",
    ],
    "profile": ["profile", "--batch", "4", "--size", "8", "--out", "out", "--device", "cpu"],
    "roofline": ["roofline", "--batch", "4", "--size", "8", "--device", "h100"],
    "tune": [
        "tune",
        "--batch",
        "2",
        "--size",
        "8",
        "--out",
        "out",
        "--device",
        "cpu",
        "--kind",
        "fprop",
        "--candidates",
        "1",
        "--repeats",
        "3",
    ],
}


# The tuner launches Triton's kernels where the model is.
@pytest.mark.parametrize("command", [pytest.param(name, marks=[pytest.mark.cpu] if name == "tune" else []) for name in COMMANDS])
def test_a_model_that_exists_is_measured_and_left_as_it_was(command, mine, capsys):
    before = {name: t.clone() for name, t in mine.existing.state_dict().items()}
    modes = [(type(m), m.training) for m in mine.existing.modules()]
    assert main([*COMMANDS[command], "--model", "mine:net"]) == 0, capsys.readouterr().err
    assert [(type(m), m.training) for m in mine.existing.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in mine.existing.state_dict().items())
    assert all(p.grad is None and p.requires_grad and p.device.type == "cpu" for p in mine.existing.parameters())
    if command in ("train", "inference", "blocks"):
        (path,) = Path("out").rglob("*.json")
        rows = [row for row in read_results(path).rows if ":first_step" not in row.case]
        assert {(row.impl, row.status) for row in rows} == {("eager", "ok"), ("ours", "ok")}
        assert {row.case for row in rows} == {"mine:net.block" if command == "blocks" else "mine:net"}


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_a_network_of_another_package_runs_fused_by_ours(name, tmp_path, torchvision_models, monkeypatch):
    """By the operators on ATen, which stand in for a GPU's."""
    from fused_resnet.bench import steps

    monkeypatch.setitem(steps.IMPLEMENTATIONS, "ours", steps.Implementation("eager", True))
    if name.startswith("timm"):
        pytest.importorskip("timm")
    command = ["profile", "--model", name, "--size", "32", "--batch", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 0
    found = read_profile(tmp_path / "profile.json")
    assert (found.impl, found.design) == ("ours", "passes")
    # A projection is a part of the operator of its block's first convolution.
    assert not any("downsample" in part.layer for part in found.parts)


@pytest.mark.parametrize("given", [[], ["--impl", "ours"]])
def test_a_network_that_is_fused_runs_fused_by_ours(given, mine, monkeypatch, tmp_path):
    from fused_resnet.bench import steps

    monkeypatch.setitem(steps.IMPLEMENTATIONS, "ours", steps.Implementation("eager", True))
    assert main(["profile", "--model", "mine:fused", *given, "--size", "8", "--batch", "4", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = read_profile(tmp_path / "profile.json")
    assert (found.impl, found.design) == ("ours", "passes") and any("fused_resnet::" in kernel for kernel, *_ in found.kernels)


def test_what_can_not_be_fused_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "plain_net.py").write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))\n")
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "--model", "plain_net:make", "--size", "8", "--batch", "2", "--device", "cpu", "--impl", "ours"]) == 1
    assert "nothing of Sequential can be fused" in capsys.readouterr().err
    assert main(["profile", "--model", "plain_net:make", "--size", "8", "--batch", "2", "--device", "cpu", "--impl", "eager"]) == 0


@pytest.mark.parametrize("arguments, words", [
    (["bench", "train", "--model", "resnet51"], "did you mean resnet5"),
    (["bench", "train", "--model", "torchvision:resnet51"], "torchvision.models has no function 'resnet51'"),
    (["bench", "kernels", "--shape", "64x56"], "argument --shape: expected CxHxW, or CxHxW:KxRxS with /STRIDE behind it"),
    (["bench", "kernels", "--shape", "64x4x4:8x9x9/0"], "argument --shape: "),
    (["bench", "train", "--shape", "64x56x56"], "argument --shape: expected the suite kernels; got train"),
])  # fmt: skip
def test_a_wrong_model_or_shape_is_named(arguments, words, capsys, torchvision_models):
    try:
        status = main([*arguments, "--device", "cpu"])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and words in capsys.readouterr().err


def test_kernels_of_own_shapes(tmp_path, capsys):
    command = [
        *["bench", "kernels", "--device", "cpu", "--dtype", "fp32", "--impl", "eager_nhwc", "--repeats", "3", "--batch", "4", "--out"],
        str(tmp_path),
    ]
    assert main([*command, "--shape", "8x6x6", "8x6x6:16x3x3/2", "--case", "norm_act", "norm_act_conv"]) == 0
    (path,) = tmp_path.rglob("*.json")
    rows = {row.case: row for row in read_results(path).rows if row.impl == "eager_nhwc"}
    assert {case: (row.batch, row.shape, row.status) for case, row in rows.items()} == {
        "norm_act": (4, [8, 6, 6], "ok"), "norm_act_conv 3x3/2 16": (4, [8, 6, 6], "ok"),
    }  # fmt: skip


# ---- whose commit ------------------------------------------------------------------------------------------------------------


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(["git", "-C", str(folder), *identity, *command], check=True, capture_output=True, text=True).stdout.strip()


def test_an_installed_package_tells_its_version_and_no_other_projects_commit(tmp_path, monkeypatch):
    """A copy in an environment inside another project's checkout, as `pip install` in `.venv` leaves it."""
    installed = tmp_path / "project" / ".venv" / "lib" / "site-packages" / "fused_resnet" / "bench" / "machine.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert current_commit() == f"v{fused_resnet.__version__}"  # no checkout at all
    git(tmp_path, "init", "project")
    (tmp_path / "project" / "train.py").touch()
    git(tmp_path / "project", "add", "train.py")
    git(tmp_path / "project", "commit", "-m", "another project's")
    assert current_commit() == f"v{fused_resnet.__version__}"
    flat = tmp_path / "project" / "fused_resnet" / "bench" / "machine.py"  # pip install --target .
    flat.parent.mkdir(parents=True)
    flat.touch()
    monkeypatch.setattr(machine, "__file__", str(flat))
    assert current_commit() == f"v{fused_resnet.__version__}"


def test_a_checkout_of_the_package_tells_its_own_commit(tmp_path, monkeypatch):
    file = tmp_path / "fused_resnet" / "bench" / "machine.py"
    file.parent.mkdir(parents=True)
    shutil.copy(ROOT / "fused_resnet" / "_version.py", tmp_path / "fused_resnet" / "_version.py")
    file.touch()
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "the package")
    monkeypatch.setattr(machine, "__file__", str(file))
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert current_commit() == commit
    file.write_text("changed")
    assert current_commit() == f"{commit}-dirty"


# ---- tables ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--layers"], ["--model", "resnet18", "--layers"]])
def test_a_table_at_80_columns_keeps_its_figures(arguments, capsys, monkeypatch):
    command = ["roofline", *arguments, "--device", "h100"]
    monkeypatch.setenv("COLUMNS", "300")
    assert main(command) == 0
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    assert main(command) == 0
    narrow = capsys.readouterr().out
    assert "…" not in narrow and max(map(len, narrow.splitlines())) <= 80
    figures = {word for line in wide.splitlines() if line.startswith("│") for word in line.strip("│").replace("│", " ").split()}
    assert figures <= set(narrow.replace("│", " ").split())


def test_rows_at_80_columns_keep_their_figures(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    case = "norm_add_act_conv_pair_backward 1x1/2 128 + 1x1/2 512"
    rows = [Row("kernels", case, impl, "bfloat16", 256, [256, 56, 56], 1.2345, 1.2, 1.3, None, 123.4, 1234.5, None, 0.6543, None, 1e-3)
            for impl in ("eager_nhwc", "ours", "ours:passes_cuda", "ours:passes_triton", "ours:triton", "ours:cudnn")]  # fmt: skip
    for made in (table.columns, table.by_shape):
        table.show([("kernels", made(rows))])
        text = capsys.readouterr().out
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        assert "0.65" in text and text.count("1.23") >= 6
    assert any("123.4" in values for _, values, _ in table.columns(rows))


@pytest.mark.parametrize("form", ["csv", "json"])
def test_tables_for_programs(form, capsys):
    assert main(["roofline", "--model", "resnet18", "--device", "h100", f"--{form}"]) == 0
    text = capsys.readouterr().out
    if form == "json":
        training, inference = json.loads(text)
        assert training["title"] == "a training step, by design" and inference["rows"]
        eager = training["rows"][0]
        assert eager["design"] == "eager" and eager["launches"] > 100 and isinstance(eager["MB/image"], float)
    else:
        first = text.partition("# inference")[0].splitlines()
        assert first[0] == "# a training step, by design"
        eager = next(csv.DictReader(io.StringIO("\n".join(first[1:]))))
        assert eager["design"] == "eager" and float(eager["floor, images/s"]) > 1000


def row(case, impl, ms=None, status="ok"):
    return Row("train", case, impl, "float32", 8, [3, 8, 8], ms, ms, ms, status=status)


def test_speed_ups_are_over_eager_and_their_mean_is_geometric():
    rows = [row("a", "eager_nhwc", 4.0), row("a", "ours", 2.0), row("b", "eager_nhwc", 8.0), row("b", "ours", 1.0), row("c", "ours", 1.0)]
    found = {head: texts for head, texts, _ in table.columns(rows)}
    assert found["speed-up"] == ["", "2.00", "", "8.00", ""]
    assert table.mean_speed_ups(rows) == ["ours: 4.00 times as fast as PyTorch's eager mode, geometric mean of 2 cases"]


def test_what_can_not_be_had_at_all_is_said_once():
    never = [row(case, "ours:triton", status="unsupported: no GPU") for case in "abc"]
    rows = [row("a", "eager", 1.0), row("b", "eager", 1.0), row("c", "eager", status="oom: no room"), *never]
    (found,), notes = table.tables(rows)
    assert [texts for head, texts, _ in found if head == "impl"] == [["eager"] * 3]
    assert notes == ["ours:triton: unsupported: no GPU"]
    (found,), _ = table.tables(never)  # nothing else is there to be shown
    assert len(found[0][1]) == 3


# ---- ceilings ----------------------------------------------------------------------------------------------------------------


def test_a_ceiling_is_the_best_of_many():
    """A machine that was busy half of the time has the rates of the other half."""
    slow, fast = Times(4.0, 1.0, 8.0), Times(2.0, 2.0, 2.0)
    first = Ceilings(slow, 10**6, slow, 10**9)
    assert first.bytes_per_s == pytest.approx(1e9) and first.flops_per_s == pytest.approx(1e12)
    best = first.best(Ceilings(fast, 10**6, fast, 10**10))
    assert (best.copy, best.matmul) == (slow, fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ceilings_are_the_fastest_of_several_sizes(dtype, monkeypatch):
    monkeypatch.setattr(machine, "SIZES", {"cpu": ((1, 2), (64, 128))})
    monkeypatch.setattr(machine, "CACHED", (0.5, 0.25))
    asked = {}

    def measure(calls, device, repeats, limit_s):
        asked.update(calls)
        return {name: Times(*3 * (1.0 if name in ("copy of 1 MiB", "product of 128") else 1e5,)) for name in calls}

    monkeypatch.setattr(machine, "measure", measure)
    found = measure_ceilings(CPU, dtype, 3)
    convolutions = ["product of a convolution of 128", "product of a convolution of 256"]
    assert list(asked) == ["copy of 1 MiB", "copy of 2 MiB", "product of 64", "product of 128", *convolutions]
    assert (found.copy_bytes, found.matmul_flops) == (2 * 2**20, 2 * 128**3)
    assert asked["product of 64"]().dtype == asked[convolutions[1]]().dtype == dtype
    asked.clear()
    measure_ceilings(CPU, dtype, 3, cached=True)
    assert [name for name in asked if name.startswith("copy")][2:] == ["copy of 0.5 MiB", "copy of 0.25 MiB"]
    assert [t.nbytes for t in asked["copy of 0.25 MiB"]()] == [2**18] * 64, "the caches hold it from the second time on"
