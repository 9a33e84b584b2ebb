"""Networks in eval mode: folded, exported, traced, turned into ONNX; what comes out runs without this package."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chains import RUNNABLE
from small import SIZE, network
from torch import nn

import fused_resnet
from fused_resnet import models

#: Runs exported programs in a process that can't import this package: a file of (path, input, expected output).
FOREIGN = """
import sys
sys.modules["fused_resnet"] = None
import torch
for path, x, expected in torch.load(sys.argv[1]):
    if path.endswith(".onnx"):
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    elif path.endswith(".pt"):
        out = torch.jit.load(path)(x)
    else:
        out = torch.export.load(path).module()(x)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4, msg=lambda text: path + ": " + text)
    print(path)
"""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_folded_networks_agree(dtype):
    """In float64 to rounding; in others the error is that of the norms' own, or a few roundings."""
    model = network().eval()
    folded, x = fused_resnet.fold(copy.deepcopy(model).to(dtype)), torch.randn(SIZE, dtype=torch.float64)
    expected = model(x)
    plain = (copy.deepcopy(model).to(dtype)(x.to(dtype)).double() - expected).norm() / expected.norm()
    error = (folded(x.to(dtype)).double() - expected).norm() / expected.norm()
    assert error <= 2 * plain + 4 * torch.finfo(dtype).eps
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert {p.dtype for p in folded.parameters()} == {dtype} and not any(p.requires_grad for p in folded.parameters())
    assert all(isinstance(m, nn.BatchNorm2d) for m in model.modules() if type(m).__name__.startswith("Batch"))
    assert not any(isinstance(m, nn.Identity) for m in model.modules())


@pytest.mark.parametrize("backend", RUNNABLE)
def test_folded_networks_need_no_operator(backend, device, monkeypatch):
    from fused_resnet.backends import BACKENDS

    model = fused_resnet.fold(network(dtype=torch.float32).eval().to(device))
    x = torch.randn(SIZE, device=device)
    expected = model(x)
    for name in ("convolve", "norm_add_act", "norm_act_max_pool", "norm_add_act_avg_pool"):
        monkeypatch.setattr(BACKENDS[backend], name, lambda *a: pytest.fail("an operator ran"))
    with fused_resnet.backend(backend):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [lambda c: nn.BatchNorm2d(c, affine=False), lambda c: nn.BatchNorm2d(c, eps=0.2), nn.SyncBatchNorm, lambda c: nn.BatchNorm2d(c, track_running_stats=False)],
    ids=["not affine", "eps", "synchronised", "no running statistics"],
)
def test_other_norms_are_folded_or_left(norm):
    model = network(norm).eval()
    folded, x = fused_resnet.fold(model), torch.randn(SIZE, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x))
    left = sum(hasattr(m, "running_mean") for m in folded.modules())
    assert left == (0 if model.bn1.running_mean is not None else sum(hasattr(m, "running_mean") for m in model.modules()))


@pytest.mark.parametrize("build", [lambda: models.CifarResNet(8), lambda: models.CifarResNet(8, shortcut=None), lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())])
def test_other_networks_are_folded(build):
    model = build().double()
    model(torch.randn(SIZE, dtype=torch.float64))
    folded, x = fused_resnet.fold(model.eval()), torch.randn(SIZE, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


@pytest.mark.parametrize("fused", [False, True], ids=["as it is", "fused"])
@pytest.mark.parametrize("name", ["torchvision", "timm", "timm's deep stem"])
def test_networks_of_others_are_folded(name, fused, torchvision_models):
    """Their stems and blocks too; what comes out is a module of theirs."""
    import timm

    build = {
        "torchvision": lambda: torchvision_models.ResNet(torchvision_models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5),
        "timm": lambda: timm.create_model("resnet18", num_classes=5),
        "timm's deep stem": lambda: timm.create_model("resnet14t", num_classes=5),
    }
    model, x = build[name]().double(), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    model(x)
    model.eval()
    folded = fused_resnet.fold(fused_resnet.fuse(copy.deepcopy(model)) if fused else model)
    assert type(folded) is type(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x))


def test_what_is_watched_is_left():
    model, seen = network().eval(), []
    model.layer1[0].bn1.register_forward_hook(lambda m, args, out: seen.append(out))
    model.layer2[0].conv1.register_forward_hook(lambda m, args, out: seen.append(out))
    folded, x = fused_resnet.fold(model), torch.randn(SIZE, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x))
    assert len(seen) == 4
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 2


def test_training_mode_is_refused():
    model = network().eval()
    model.layer2.train()
    with pytest.raises(ValueError, match=r"model: expected a network in eval mode, by model.eval\(\); layer2 is in training mode"):
        fused_resnet.fold(model)


def export(model: nn.Module, how: str, folder: Path) -> str:
    """The path of the exported network, which takes any batch size."""
    x, sizes = torch.randn(SIZE), ({0: torch.export.Dim("batch", min=2)},)
    path = folder / f"{how} {type(model.bn1).__name__}.{'onnx' if how == 'onnx' else 'pt' if how == 'trace' else 'pt2'}"
    if how == "trace":
        torch.jit.save(torch.jit.trace(model, x), path)
    elif how == "onnx":
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    else:
        program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=how == "strict export")
        assert not [n for n in program.graph.nodes if "fused_resnet" in str(n.target)]
        torch.export.save(program, path)
    return str(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_exported_networks_run_without_this_package(tmp_path):
    """Plain operators, even where a backend is forced: exported, traced and as ONNX, as they are and folded."""
    programs, x = [], torch.randn(6, *SIZE[1:])
    model = network(dtype=torch.float32).eval()
    folded = fused_resnet.fold(model)
    ways = {"export": [model, folded], "strict export": [model], "trace": [model], "onnx": [model, folded]}
    with torch.no_grad():
        expected = model(x)
    with fused_resnet.backend("eager"):
        for how, networks in ways.items():
            programs += [(export(given, how, tmp_path), x, expected) for given in networks]
    torch.save(programs, tmp_path / "programs")
    result = subprocess.run([sys.executable, "-c", FOREIGN, str(tmp_path / "programs")], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.splitlines()) == len(programs)


def test_an_operator_of_this_package_would_be_seen(monkeypatch, tmp_path):
    monkeypatch.setattr("fused_resnet.nn.network.runs_modules", lambda x, dtype: False)
    with fused_resnet.backend("eager"), pytest.raises(AssertionError):
        export(network(dtype=torch.float32).eval(), "export", tmp_path)
