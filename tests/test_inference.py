"""Networks in eval mode: folded, exported, traced, turned into ONNX; what comes out runs without this package."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.chains import RUNNABLE
from support.small import SIZE, network
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.backends import BACKENDS
from fused_resnet.reference import Reference

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


class Calls(list):
    """What a backend's `conv_affine_act`, also in place, was called for in the meantime: (x, residual, relu, result) of each call."""

    def __init__(self, monkeypatch, backend: str = "eager"):
        super().__init__()
        original = BACKENDS[backend].conv_affine_act
        in_place = type(BACKENDS[backend]).conv_add_act_

        def call(x, weight, geometry, scale, bias, residual, relu):
            act = original(x, weight, geometry, scale, bias, residual, relu)
            self.append((x, residual, relu, act))
            return act

        def call_in_place(x, weight, geometry, bias, residual, relu):
            if in_place is Reference.conv_add_act_:  # the same
                return call(x, weight, geometry, None, bias, residual, relu)
            act = in_place(BACKENDS[backend], x, weight, geometry, bias, residual, relu)
            self.append((x, residual, relu, act))
            return act

        monkeypatch.setattr(BACKENDS[backend], "conv_affine_act", call)
        monkeypatch.setattr(BACKENDS[backend], "conv_add_act_", call_in_place)

    def taken(self) -> list[tuple[bool, bool]]:
        """(whether there was a residual, whether there was a ReLU) of each call; then forgotten."""
        calls = [(residual is not None, relu) for _, residual, relu, _ in self]
        self.clear()
        return calls


#: The convolutions of `small.network`: stem, two bottlenecks of which one projects, one that strides and projects, a basic block.
INNER, PROJECTION, LAST = (False, True), (False, False), (True, True)
SMALL = [INNER, *(INNER, INNER, PROJECTION, LAST), *(INNER, INNER, LAST), *(INNER, INNER, PROJECTION, LAST), *(INNER, LAST)]


@pytest.mark.parametrize("backend", RUNNABLE)
def test_a_folded_network_is_a_call_a_convolution(backend, device, monkeypatch):
    """With bias, residual and ReLU in it, by every backend, in any order of layouts; nothing else of the backend runs."""
    folded = fused_resnet.fold(network(dtype=torch.float32).eval().to(device))
    x = torch.randn(SIZE, device=device)
    with fused_resnet.backend("off"):
        expected = folded(x)
    calls = Calls(monkeypatch, backend)
    for name in ("convolve", "norm_act_max_pool", "norm_add_act_avg_pool", "batch_stats"):
        monkeypatch.setattr(BACKENDS[backend], name, lambda *a: pytest.fail("an operator ran"))
    with fused_resnet.backend(backend):
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
        assert calls.taken() == SMALL
        torch.testing.assert_close(folded.layer2(torch.randn(2, 16, 5, 4, device=device)).isnan().any(), torch.tensor(False, device=device))
        assert calls.taken() == SMALL[8:12]


def test_a_folded_network_converts_its_layout_once(monkeypatch):
    """From the stem on, what a convolution reads is what another, or the stem's pool, has written: that very tensor."""
    folded, calls = fused_resnet.fold(network().eval()), Calls(monkeypatch)
    pooled = []
    folded.maxpool.register_forward_hook(lambda module, args, out: pooled.append(out))
    with fused_resnet.backend("eager"):
        folded(torch.randn(SIZE, dtype=torch.float64))
    written = [*pooled, *(act for *_, act in calls)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, *_ in calls)
    assert all(any(x is t for t in written) for x, *_ in calls[1:])
    assert all(any(residual is t for t in written) for _, residual, *_ in calls if residual is not None)


@pytest.mark.parametrize("fault", ["no residual", "no ReLU", "always a ReLU"])
def test_a_planted_fault_is_seen(fault, monkeypatch):
    original = BACKENDS["eager"].conv_affine_act

    def faulty(x, weight, geometry, scale, bias, residual, relu):
        relu = {"no ReLU": False, "always a ReLU": True}.get(fault, relu)
        return original(x, weight, geometry, scale, bias, None if fault == "no residual" else residual, relu)

    model, x = network().eval(), torch.randn(SIZE, dtype=torch.float64)
    folded, expected = fused_resnet.fold(model), model(x)
    with fused_resnet.backend("eager"):
        torch.testing.assert_close(folded(x), expected)
        monkeypatch.setattr(BACKENDS["eager"], "conv_affine_act", faulty)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(folded(x), expected)


def test_where_a_gradient_may_flow_modules_run(monkeypatch):
    """To the input, or to a parameter that somebody trains again: in that block alone. The gradients are the modules' own."""
    folded, calls = fused_resnet.fold(network().eval()), Calls(monkeypatch)
    x = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
    with fused_resnet.backend("off"):
        (expected,) = torch.autograd.grad(folded(x).square().sum(), x)
    with fused_resnet.backend("eager"):
        (gradient,) = torch.autograd.grad(folded(x).square().sum(), x)
        torch.testing.assert_close(gradient, expected)
        assert calls.taken() == []
        weight = folded.layer2[0].downsample[0].weight.requires_grad_()
        (gradient,) = torch.autograd.grad(folded(x.detach()).square().sum(), weight)
        assert gradient.abs().sum() > 0 and calls.taken() == SMALL[:8]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                folded(x)
                assert calls.taken() == SMALL
        folded.train()
        with torch.no_grad():
            folded(x)
        assert calls.taken() == []


WATCHED = {
    "layer1.1.conv2": [*SMALL[:5], *SMALL[8:]], "layer1.1.bn2": [*SMALL[:5], *SMALL[8:]], "layer2.0.relu": [*SMALL[:8], PROJECTION, *SMALL[12:]],
    "layer2.0.downsample": [*SMALL[:8], PROJECTION, *SMALL[12:]], "layer2.0.downsample.0": [*SMALL[:8], *SMALL[12:]], "bn1": SMALL[1:],
    "layer3.0": SMALL, "layer1": SMALL, "maxpool": SMALL,
}  # fmt: skip


@pytest.mark.parametrize("path", WATCHED)
def test_hooks_on_modules_of_a_folded_network_are_called(path, monkeypatch):
    """A block with one inside runs its modules (a projection is a row of its own); a block, stage or pool that is watched is called with tensors."""
    folded, calls, seen = fused_resnet.fold(network().eval()), Calls(monkeypatch), []
    x = torch.randn(SIZE, dtype=torch.float64)
    expected = folded(x)
    handle = folded.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append((*args, out)))
    with fused_resnet.backend("eager"):
        torch.testing.assert_close(folded(x), expected)
        assert calls.taken() == WATCHED[path]
        assert len(seen) == (3 if path.endswith("relu") else 1) and all(torch.is_tensor(t) for call in seen for t in call)
        handle.remove()
        folded(x)
    assert calls.taken() == SMALL


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_of_a_folded_network_are_folded(way, monkeypatch, torchvision_models):
    for model in (network().eval(), torchvision_models.resnet18(num_classes=5).double().eval()):
        folded, x = fused_resnet.fold(model), torch.randn(2, 3, 40, 40, dtype=torch.float64)
        if way == "deepcopy":
            twin = copy.deepcopy(folded)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(folded))
        elif way == "torch.save":
            buffer = io.BytesIO()
            torch.save(folded, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        else:
            other = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
            twin = fused_resnet.fold(other)
            twin.load_state_dict(folded.state_dict())
        with fused_resnet.backend("eager"):
            expected = folded(x)
            calls = Calls(monkeypatch)
            torch.testing.assert_close(twin(x), expected)
        assert len(calls) == sum(isinstance(m, nn.Conv2d) for m in twin.modules())
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_runs_a_folded_network_in_its_dtype(dtype, monkeypatch):
    model, x = network(dtype=torch.float32).eval(), torch.randn(SIZE)
    folded, calls = fused_resnet.fold(model), Calls(monkeypatch)
    expected = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", dtype):
        with fused_resnet.backend("off"):
            plain = folded(x)
        with fused_resnet.backend("eager"):
            out = folded(x)
    assert out.dtype == plain.dtype == dtype and {act.dtype for *_, act in calls} == {dtype}
    assert calls.taken() == SMALL
    allowed = 2 * (plain.double() - expected).norm() + 4 * torch.finfo(dtype).eps * expected.norm()
    assert (out.double() - expected).norm() <= allowed


def test_compilers_see_the_modules_of_a_folded_network(monkeypatch):
    """One graph, of PyTorch's operators alone, though a backend is forced."""
    folded, calls, graphs = fused_resnet.fold(network().eval()), Calls(monkeypatch), []
    x = torch.randn(SIZE, dtype=torch.float64)
    compiled = torch.compile(folded, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    with fused_resnet.backend("eager"), torch.no_grad():
        torch.testing.assert_close(compiled(x), folded(x))
    assert calls.taken() == SMALL and len(graphs) == 1
    assert len([n for n in graphs[0].graph.nodes if "conv2d" in str(n.target)]) == len(SMALL)
    assert not [n for n in graphs[0].graph.nodes if "fused_resnet" in str(n.target)]


def test_an_empty_batch_runs_the_modules():
    folded = fused_resnet.fold(network().eval())
    with fused_resnet.backend("eager"):
        assert folded(torch.empty(0, *SIZE[1:], dtype=torch.float64)).shape == (0, 5)


def test_the_report_speaks_of_folded_blocks(torchvision_models):
    for model in (network(dtype=torch.float32), torchvision_models.resnet18()):
        folded = fused_resnet.fold(model.eval())
        with fused_resnet.backend("eager"):
            rows = fused_resnet.report(folded).rows
            assert len(rows) > 4 and all(row.fused and row.implementation == "eager" for row in rows)
            folded.layer1[0].relu.register_forward_hook(lambda *_: None)
            reasons = {row.name: row.reason for row in fused_resnet.report(folded).rows}
        assert "relu has a hook" in reasons.pop("layer1.0") and not any(reasons.values())
        folded.layer2[0].conv1.bias = None
        with fused_resnet.backend("eager"):
            assert "conv1 is Conv2d, not an nn.Conv2d with the bias" in str(fused_resnet.report(folded))


def test_tracers_look_into_folded_blocks(torchvision_models):
    """A graph of PyTorch's modules, which tools of torch.fx take: quantisation, for one. So too what `unfuse` leaves, for TorchScript."""
    model, x = torchvision_models.resnet18(num_classes=5).double().eval(), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    folded = fused_resnet.fold(model)
    traced = torch.fx.symbolic_trace(folded)
    called = [traced.get_submodule(n.target) for n in traced.graph.nodes if n.op == "call_module"]
    assert sum(isinstance(m, nn.Conv2d) for m in called) == 20 and all(type(m).__module__.startswith("torch.nn") for m in called)
    torch.testing.assert_close(traced(x), model(x))
    plain = fused_resnet.unfuse(folded)
    assert all(type(m).__module__.startswith(("torch.nn", "torchvision")) for m in plain.modules())
    torch.testing.assert_close(torch.jit.script(plain)(x), model(x))


@pytest.mark.parametrize(
    "norm",
    [
        lambda c: nn.BatchNorm2d(c, affine=False),
        lambda c: nn.BatchNorm2d(c, eps=0.2),
        nn.SyncBatchNorm,
        lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    ],
    ids=["not affine", "eps", "synchronised", "no running statistics"],
)
def test_other_norms_are_folded_or_left(norm):
    model = network(norm).eval()
    folded, x = fused_resnet.fold(model), torch.randn(SIZE, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x))
    left = sum(hasattr(m, "running_mean") for m in folded.modules())
    assert left == (0 if model.bn1.running_mean is not None else sum(hasattr(m, "running_mean") for m in model.modules()))


@pytest.mark.parametrize(
    "build, calls",
    [
        (lambda: models.CifarResNet(8), 7),  # its shortcuts have no convolution
        (lambda: models.CifarResNet(8, shortcut=None), 7),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)), 2),
        (lambda: nn.Sequential(fused_resnet.ConvBNAct2d(3, 6, stride=2), fused_resnet.BasicBlock(6, 6)), 3),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding="same"), nn.BatchNorm2d(5), nn.ReLU()), 0),  # PyTorch's modules
    ],
)
def test_other_networks_are_folded(build, calls, monkeypatch):
    model = build().double()
    model(torch.randn(SIZE, dtype=torch.float64))
    folded, x = fused_resnet.fold(model.eval()), torch.randn(SIZE, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    seen = Calls(monkeypatch)
    with fused_resnet.backend("eager"):
        torch.testing.assert_close(folded(x), model(x).detach())
    assert len(seen) == calls


def test_a_backbone_with_frozen_norms_is_folded(torchvision_models, monkeypatch):
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=None).double().eval()
    folded, x = fused_resnet.fold(backbone), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    calls = Calls(monkeypatch)
    with fused_resnet.backend("eager"):
        out, expected = folded(x), backbone(x)
    assert len(calls) == 28 and list(out)  # 20 of the network, 8 of the pyramid, which have biases of their own
    assert list(out) == list(expected)
    for name, value in out.items():
        torch.testing.assert_close(value, expected[name].detach())


@pytest.mark.parametrize("fused", [False, True], ids=["as it is", "fused"])
@pytest.mark.parametrize("name", ["torchvision", "timm", "timm's deep stem"])
def test_networks_of_others_are_folded(name, fused, torchvision_models, monkeypatch):
    """Their stems and blocks too, a call a convolution; what comes out is a module of theirs."""
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
    assert isinstance(folded, type(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x))
    calls = Calls(monkeypatch)
    with fused_resnet.backend("eager"):
        torch.testing.assert_close(folded(x), model(x))
    assert len(calls) == sum(isinstance(m, nn.Conv2d) for m in folded.modules())
    assert calls.taken().count(LAST) == sum(hasattr(m, "conv2") for m in folded.modules())
    assert type(fused_resnet.unfuse(folded)) is type(model)
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
    ways = {way: [model, folded] for way in ("export", "strict export", "trace", "onnx")}
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
