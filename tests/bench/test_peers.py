"""Other makers' batch norms in the networks of the benchmarks. Where they can't be had, ATen stands for their kernels."""

import copy
import dataclasses
import importlib.machinery
import sys
import types

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.bench import peers
from fused_resnet.bench.networks import subjects
from fused_resnet.bench.peers import NORMS, install
from fused_resnet.bench.schema import read_results
from fused_resnet.bench.steps import IMPLEMENTATIONS, TrainingStep
from fused_resnet.cli import main
from fused_resnet.cli.bench import _by_default

CPU = torch.device("cpu")


class CudnnByATen:
    """cuDNN's operator, with its arguments and results in cuDNN's order."""

    def cudnn_batch_norm(self, x, gamma, beta, mean, var, training, momentum, eps):
        return *torch.native_batch_norm(x, gamma, beta, mean, var, training, momentum, eps), torch.empty(0)


class ApexByATen(nn.BatchNorm2d):
    """apex.contrib.groupbn.batch_norm.BatchNorm2d_NHWC, here for any dtype."""

    def __init__(self, num_features, fuse_relu=False):
        super().__init__(num_features)
        self.fuse_relu = fuse_relu

    def forward(self, x, z=None):
        assert x.is_contiguous() and x.shape[3] == self.num_features, "it takes NHWC, in that order"
        assert z is None or (self.fuse_relu and z.shape == x.shape), "it adds only where it has a ReLU as well"
        out = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = out if z is None else out + z
        return (out.relu() if self.fuse_relu else out).contiguous()


class InPlaceByATen(nn.BatchNorm2d):
    """inplace_abn.InPlaceABN."""

    def __init__(self, num_features, eps, momentum, activation, activation_param):
        super().__init__(num_features, eps, momentum)
        self.activation, self.slope = activation, activation_param

    def forward(self, x):
        out = super().forward(x)
        return {"leaky_relu": lambda: nn.functional.leaky_relu(out, self.slope), "identity": lambda: out}[self.activation]()


@pytest.fixture
def stand_ins(monkeypatch):
    """The three, by ATen, on a CPU."""
    found = {"apex.contrib.groupbn.batch_norm": {"BatchNorm2d_NHWC": ApexByATen}, "inplace_abn": {"InPlaceABN": InPlaceByATen}}
    for name, content in found.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = types.ModuleType(path := ".".join(parts[:end]))
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(path, None), []
            monkeypatch.setitem(sys.modules, path, module)
        vars(module).update(content)
    monkeypatch.setattr(peers, "ATEN", CudnnByATen())
    monkeypatch.setattr(peers, "APEX_DTYPES", (torch.float16, torch.float32, torch.float64))
    for name, norms in NORMS.items():
        how = dataclasses.replace(IMPLEMENTATIONS[name], norms=dataclasses.replace(norms, on_cpu=True))
        monkeypatch.setitem(IMPLEMENTATIONS, name, how)


def distance(found, expected):
    """‖found − expected‖ / ‖expected‖ over all tensors."""
    return (
        torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)]).norm()
        / torch.cat([b.flatten() for b in expected]).norm()
    ).item()


def gradients(module, norms, x, training):
    """Of the output's weighted sum, by the input and every parameter, with `norms` in the place of PyTorch's."""
    module = copy.deepcopy(module)
    if norms is not None:
        install(module, norms)
    module.train(training)
    x = x.clone().requires_grad_()
    with fused_resnet.backend("off"):
        out = module(x)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("make", [fused_resnet.models.resnet20, fused_resnet.models.plain20, fused_resnet.models.resnet50])
@pytest.mark.parametrize("name", NORMS)
def test_a_peer_computes_what_it_is_compared_with(name, make, training, stand_ins):
    module, x = make(), torch.randn(4, 3, 16, 16)
    if make is fused_resnet.models.resnet50:  # of which a block with a projection is enough
        module, x = module.layer2[0], torch.randn(2, 256, 8, 8)
    module = module.double()
    norms = IMPLEMENTATIONS[name].norms
    expected = gradients(module, norms.like, x.double(), training)
    assert distance(gradients(module, norms, x.double(), training), expected) < 1e-9
    if norms.like is not None:  # another function than with ReLU
        assert distance(gradients(module, None, x.double(), training), expected) > 1e-3


@pytest.mark.parametrize("name", NORMS)
def test_parameters_and_running_statistics_are_those_of_the_network(name, stand_ins):
    subject = subjects("train", ["resnet20"], 16)[0]
    made = subject.make()
    state = made.state_dict()
    step = TrainingStep(subject.of(made), name, torch.float32, 4, CPU)
    assert [p.shape for p in step.module.parameters()] == [p.shape for p in subject.make().parameters()]
    step()
    assert all(p.grad is not None for p in step.module.parameters())
    found = {key.replace(".norm.", "."): value for key, value in step.module.state_dict().items()}
    assert set(state) <= set(found)
    assert not torch.equal(found["layer3.2.bn2.running_mean"], state["layer3.2.bn2.running_mean"])


def test_what_can_not_be_had_says_why(stand_ins, monkeypatch):
    network = fused_resnet.models.resnet20()
    with pytest.raises(RuntimeError, match=r"^these batch norms run on CUDA GPUs, not on 'cpu'$"):
        install(network, NORMS["cudnn"])
    with pytest.raises(RuntimeError, match=r"^nowhere is not installed$"):
        install(network, dataclasses.replace(NORMS["inplace_abn"], package="nowhere"))
    with pytest.raises(RuntimeError, match=r"^expected a network of fused_resnet.models, whose norms are known; got Linear$"):
        install(nn.Linear(2, 2), NORMS["inplace_abn"])
    monkeypatch.setattr(peers, "APEX_DTYPES", (torch.float16,))
    step = TrainingStep(subjects("train", ["resnet20"], 16)[0], "apex", torch.float32, 2, CPU)
    with pytest.raises(RuntimeError, match=r"^apex's batch norm takes float16, not torch.float32$"):
        step()


def test_the_command_checks_a_peer_against_its_own_activation(stand_ins, tmp_path):
    """inplace_abn's network is another function, and nevertheless right."""
    command = [
        *[
            "bench",
            "train",
            "--device",
            "cpu",
            "--model",
            "resnet20",
            "--batch",
            "16",
            "--size",
            "32",
            "--repeats",
            "3",
            "--commit",
            "c0ffee",
            "--out",
        ],
        str(tmp_path),
    ]
    assert main([*command, "--impl", "eager", "inplace_abn", "cudnn"]) == 0
    (path,) = tmp_path.rglob("*.json")
    rows = {row.impl: row for row in read_results(path).rows if row.case == "resnet20"}
    assert {impl: row.status for impl, row in rows.items()} == {"eager": "ok", "inplace_abn": "ok", "cudnn": "ok"}
    assert all(row.median_ms > 0 for row in rows.values())


# ---- peers in inference -----------------------------------------------------------------------------------------------------


def inference(tmp_path, *options):
    """The rows of a small run, by implementation."""
    assert main(["bench", "inference", "--device", "cpu", "--model", "resnet20", "--batch", "2", "--size", "32", "--repeats", "1",
                 "--out", str(tmp_path), "--no-progress", *options]) == 0  # fmt: skip
    (path,) = tmp_path.rglob("*.json")
    return {row.impl: row for row in read_results(path).rows if ":" not in row.case}


def test_peers_that_compile_or_export_run_where_they_are_named():
    assert not any(_by_default("inference", impl, on_gpu) for impl in ("compile_frozen", "onnxruntime") for on_gpu in (False, True))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="freezing is for oneDNN here")
@pytest.mark.timeout(600)
def test_a_frozen_network_is_compared_and_timed(tmp_path):
    row = inference(tmp_path, "--impl", "compile_frozen", "--limit", "500")["compile_frozen"]
    assert row.status == "ok" and row.median_ms > 0 and row.max_rel_error < 1e-5


def test_onnx_runtime_is_compared_and_timed_or_says_why_not(tmp_path):
    row = inference(tmp_path, "--impl", "onnxruntime", "--dtype", "fp32")["onnxruntime"]
    if IMPLEMENTATIONS["onnxruntime"].installed:
        assert row.status == "ok" and row.median_ms > 0 and row.max_rel_error < 1e-5
    else:
        assert row.status.startswith("unsupported: ") and row.status.endswith(" is not installed")


def test_onnx_runtime_takes_float32_alone(tmp_path):
    row = inference(tmp_path, "--impl", "onnxruntime", "--dtype", "bf16")["onnxruntime"]
    assert row.status.startswith("unsupported: ") and "in float32 on a CPU, not in torch.bfloat16 on 'cpu'" in row.status
