"""Autocast with and without a gradient scaler, parameters of mixed dtypes, TF32, deterministic algorithms."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.chains import LANGUAGES, calm
from support.small import SIZE, network
from torch import nn

import fused_resnet
from fused_resnet.backends import BACKENDS, convolutions
from fused_resnet.cudnn import work
from fused_resnet.reference import ConvGeometry


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).float() if x.dtype != torch.float64 else model(x), torch.arange(len(x)) % 5)


def calm_network(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = network(dtype=dtype)
    calm(model)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_exact_as_pytorchs(dtype):
    """Parameters, their gradients and running statistics stay float32; the error against float64 is at most twice PyTorch's."""
    template, x = calm_network(), torch.randn(16, *SIZE[1:])
    truth = copy.deepcopy(template).double()
    loss_of(truth, x.double()).backward()
    errors = {}
    for backend in ("off", "eager"):
        model, seen = copy.deepcopy(template), []
        handle = model.fc.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0].dtype, out.dtype)))
        with torch.autocast("cpu", dtype), fused_resnet.backend(backend):
            loss = loss_of(model, x)
        loss.backward()
        assert seen == [(dtype, dtype)]
        assert {p.grad.dtype for p in model.parameters()} == {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
        errors[backend] = (gradients(model) - gradients(truth)).norm() / gradients(truth).norm()
        for (name, a), b in zip(model.named_buffers(), truth.buffers(), strict=True):
            assert (a.double() - b).norm() <= 0.02 * b.double().norm(), name
    assert errors["eager"] <= 2 * errors["off"] < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_behind_frozen_norms_have_autocasts_dtype(dtype, torchvision_models):
    """PyTorch's are float32 there (findings/frozen_norm_under_autocast.sh). Outputs and gradients are as exact as these, by a factor of two."""
    from torchvision.ops import FrozenBatchNorm2d

    template, x = network(FrozenBatchNorm2d, dtype=torch.float32), torch.randn(16, *SIZE[1:])
    for norm in (m for m in template.modules() if isinstance(m, FrozenBatchNorm2d)):
        norm.bias[0::2], norm.bias[1::2] = 4.0, -4.0  # as `calm`
    truth = copy.deepcopy(template).double()
    exact = truth(x.double())
    exact.square().sum().backward()
    errors, seen = {}, {}
    for backend in ("off", "eager"):
        model = copy.deepcopy(template)
        for stage in model.stages():
            stage.register_forward_hook(
                lambda m, args, out, backend=backend: seen.setdefault(backend, set()).add((args[0].dtype, out.dtype))
            )
        with torch.autocast("cpu", dtype), fused_resnet.backend(backend):
            out = model(x)
        out.float().square().sum().backward()
        assert out.dtype == dtype and {p.grad.dtype for p in model.parameters()} == {torch.float32}
        found = {"output": (out.double(), exact), "gradients": (gradients(model), gradients(truth))}
        errors[backend] = {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in found.items()}
    assert seen == {"off": {(torch.float32, torch.float32)}, "eager": {(dtype, dtype)}}
    assert all(errors["eager"][name] <= 2 * error < 0.2 for name, error in errors["off"].items()), errors


def test_a_gradient_scaler_skips_what_overflows_and_unscales_the_rest():
    """Step by step as PyTorch's modules under the same scaler, which starts so high that its first steps overflow."""
    template = calm_network()
    batches = [torch.randn(16, *SIZE[1:]) for _ in range(6)]
    records = {}
    for backend in ("off", "eager"):
        model, record = copy.deepcopy(template), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, backoff_factor=2.0**-6)  # scales with room on both sides
        for x in batches:
            before = model.conv1.weight.clone()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16), fused_resnet.backend(backend):
                loss = loss_of(model, x)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            record.append((loss.item(), scaler.get_scale(), not torch.equal(before, model.conv1.weight)))
        records[backend] = record
    ours, theirs = records["eager"], records["off"]
    assert theirs[0][2] is False and theirs[-1][2] is True  # both happen
    for a, b in zip(ours, theirs, strict=True):
        assert a[1:] == b[1:], (ours, theirs)
        assert abs(a[0] - b[0]) < 0.01


def test_an_overflow_reaches_the_scaler():
    """The planted fault of the test above: an infinite gradient is not turned into a number on its way through any operator."""
    model = calm_network()
    with torch.autocast("cpu", torch.float16), fused_resnet.backend("eager"):
        loss = loss_of(model, torch.randn(SIZE))
    (loss * float("inf")).backward()
    assert not any(p.grad.isfinite().all() for name, p in model.named_parameters() if name != "fc.bias")


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float16 with float32 norms"])
def test_parameters_of_other_dtypes(kind):
    """A network cast as a whole, or all but its norms: outputs, gradients and running statistics have PyTorch's dtypes."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float16
    ours = calm_network().to(dtype)
    if kind.endswith("norms"):
        for module in ours.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
    plain, x = copy.deepcopy(ours), torch.randn(16, *SIZE[1:]).to(dtype)
    with fused_resnet.backend("eager"):
        out = ours(x)
    expected = plain(x)
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.1, atol=0.1)
    out.float().square().sum().backward(), expected.float().square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert p.grad.dtype == q[1].grad.dtype == p.dtype, name
    error = (gradients(ours) - gradients(plain)).norm() / gradients(plain).norm()
    assert error < 0.1
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a.double(), b.double(), rtol=0.05, atol=0.05, msg=name)


def test_dtypes_that_do_not_go_together_are_refused():
    with fused_resnet.backend("eager"), pytest.raises(TypeError, match=r"x: expected torch.float32.*got torch.float16"):
        network(dtype=torch.float32)(torch.randn(SIZE).half())


def test_autocast_may_be_switched_off_inside():
    model, x = network(dtype=torch.float32), torch.randn(SIZE)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False), fused_resnet.backend("eager"):
        assert model(x).dtype == torch.float32


@pytest.fixture
def tf32_settings():
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before  # in the old way, which undoes the new one: PyTorch refuses a mix from then on


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("interface", ["allow_tf32", "fp32_precision"])
def test_tf32_of_convolutions_is_honoured(interface, allowed, tf32_settings, monkeypatch):
    """Every convolution kernel, forward and backward, is told what `torch.backends.cudnn` says at its call, in either way of saying it."""
    from fused_resnet.kernels import dgrad, fprop, wgrad

    told = []
    for module, name in ((fprop, "fprop"), (dgrad, "dgrad"), (wgrad, "wgrad")):
        right = getattr(module, name)

        def noted(*args, right=right, name=name, **options):
            told.append((name, inspect.signature(right).bind(*args, **options).arguments["allow_tf32"]))
            return right(*args, **options)

        monkeypatch.setattr(module, name, noted)
    if interface == "allow_tf32":
        torch.backends.cudnn.allow_tf32 = allowed
    else:
        torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    block = network(dtype=torch.float32).layer3
    with fused_resnet.backend("triton"):
        block(torch.randn(1, 32, 2, 2)).sum().backward()
    assert {name for name, _ in told} == {"fprop", "dgrad", "wgrad"}
    assert {value for _, value in told} == {allowed}
    assert convolutions.allow_tf32() is allowed
    asked = []
    monkeypatch.setattr(work, "plans_of", lambda device: SimpleNamespace(get=lambda problem: asked.append(problem) or "no plan"))
    x, weight = torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last), torch.zeros(8, 8, 1, 1)
    work.conv_affine_act(x, weight, ConvGeometry([1, 1], [0, 0], [1, 1], 1), None, torch.zeros(8), None, tried=True)
    assert [problem.tf32 for problem in asked] == [allowed]  # of the graph that cuDNN is asked for


@pytest.mark.parametrize("backend", ["eager", *LANGUAGES, "triton"])
def test_deterministic_algorithms(backend, device):
    """The same bits each time, with the flag and without; the flag also fills what is allocated with NaN, which shows in no result."""
    block, x = network(dtype=torch.float32).layer3.to(device), torch.randn(2, 32, 4, 3, device=device)
    results = []
    for deterministic in (False, True, True):
        model = copy.deepcopy(block)
        torch.use_deterministic_algorithms(deterministic)
        try:
            with fused_resnet.backend(backend):
                out = model(x)
            out.square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append([out.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for again in results[1:] if device.type == "cpu" else results[2:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[1], strict=True))
    assert all(t.isfinite().all() for t in results[1])


def test_the_eager_backend_is_where_the_networks_are_compared():
    """What the tests above force is no name for PyTorch's own modules."""
    assert BACKENDS["eager"].why_not(torch.device("cpu"), torch.float16) is None
