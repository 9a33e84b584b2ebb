"""The operators as citizens of autograd: gradcheck, odd gradients, threads, double backward. For opcheck see test_opcheck.py."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from support.chains import CHAINS, RUNNABLE, Shape
from support.rule import inputs, loss_weight, refused

import fused_resnet
from fused_resnet import ops
from fused_resnet.backends import BACKENDS
from fused_resnet.functional import conv_bn_act
from fused_resnet.reference import Reference
from fused_resnet.values import Source

SHAPE = Shape(2, 6, 5, 4, 10, size=3)


def layer(k=5, c=3, size=3, dtype=torch.float64):
    """weight, gamma, beta, with gradients; running mean and variance."""
    leaves = [torch.randn(k, c, size, size, dtype=dtype), torch.rand(k, dtype=dtype) + 0.5, torch.randn(k, dtype=dtype)]
    return [t.requires_grad_() for t in leaves], [torch.randn(k, dtype=dtype), torch.rand(k, dtype=dtype) + 0.5]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck_of_one_layer(training, relu, residual):
    (weight, gamma, beta), running = layer()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    r = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True) if residual else None

    def f(x, weight, gamma, beta, r=None):
        statistics = [t.clone() for t in running]
        return conv_bn_act(x, weight, gamma, beta, *statistics, r, training=training, stride=2, padding=1, relu=relu)

    with fused_resnet.backend("eager"):
        assert torch.autograd.gradcheck(f, [x, weight, gamma, beta, *([r] if residual else [])])


@pytest.mark.parametrize("backend", ["eager", "off"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_conv_bn_act_is_pytorchs_three_calls(affine, running, backend):
    """Output and running statistics, with and without the optional vectors, any layout of x and residual."""
    (weight, gamma, beta), statistics = layer(k=6, c=4, dtype=torch.float32)
    gamma, beta = (gamma, beta) if affine else (None, None)
    ours, theirs = ([t.clone() for t in statistics] if running else [None, None] for _ in range(2))
    x, r = torch.randn(3, 4, 6, 7), torch.randn(3, 6, 7, 6).transpose(2, 3)
    with fused_resnet.backend(backend):
        out = conv_bn_act(x, weight, gamma, beta, *ours, r, momentum=0.3, padding=1)
    expected = F.relu(F.batch_norm(F.conv2d(x, weight, None, 1, 1), *theirs, gamma, beta, True, 0.3) + r)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(ours, theirs, strict=True) if running else ():
        torch.testing.assert_close(a, b)


def strided_gradients():
    """Functions that make a gradient with strides that no kernel may assume: (name, tensor -> tensor)."""
    return {
        "expanded": lambda t: t.sum((2, 3)),
        "nchw": lambda t: (t.flatten(1) * torch.arange(1, t[0].numel() + 1, dtype=t.dtype)).sum(),
        "transposed": lambda t: t.transpose(2, 3).contiguous().square(),
        "sliced": lambda t: t[:, 1::2, ::2] * 3,
        "cat": lambda t: torch.cat([t, t * 2], 1).cumsum(1),
    }


@pytest.mark.parametrize("name", strided_gradients())
@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("last", ["norm_add_act", "max_pool", "avg_pool"])
def test_gradients_of_odd_strides(name, backend, last, device):
    (weight, gamma, beta), _ = layer(k=8, c=4, dtype=torch.float32)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    leaves = [x, weight, gamma, beta]

    def eager(x, weight, gamma, beta):
        out = F.relu(F.batch_norm(F.conv2d(x, weight, None, 1, 1), None, None, gamma, beta, True))
        pools = {"norm_add_act": lambda t: t, "max_pool": lambda t: F.max_pool2d(t, 3, 2, 1), "avg_pool": lambda t: t.mean((2, 3), True)}
        return pools[last](out)

    def ours(x, weight, gamma, beta):
        conv = ops.Conv(weight, ops.Norm(gamma, beta, None, None, True, 1e-5), ops.ConvGeometry([1, 1], [1, 1], [1, 1], 1))
        out = ops.conv_stats(x.contiguous(memory_format=torch.channels_last), conv)
        finish = {"norm_add_act": ops.norm_add_act, "max_pool": ops.norm_act_max_pool, "avg_pool": ops.norm_add_act_avg_pool}
        return finish[last](out)

    make = strided_gradients()[name]
    doubles = [t.detach().double().to(device).requires_grad_() for t in leaves]
    floats = [t.detach().to(device).requires_grad_() for t in leaves]
    truth = torch.autograd.grad(make(eager(*doubles).cpu()).sum(), doubles)
    with fused_resnet.backend(backend):
        found = torch.autograd.grad(make(ours(*floats).cpu()).sum(), floats)
    for a, b in zip(found, truth, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_backward_keeps_the_backend_of_its_forward(monkeypatch):
    """Backward runs outside the `with` block, and on a GPU in another thread."""
    calls = []
    original = Reference.convolve_backward
    eager = BACKENDS["eager"]
    monkeypatch.setattr(eager, "convolve_backward", lambda *a: calls.append("eager") or original(eager, *a))
    model = fused_resnet.models.resnet20()
    with fused_resnet.backend("eager"):
        loss = model(torch.randn(2, 3, 8, 8)).sum()
    with fused_resnet.backend("off"):
        loss.backward()
    assert len(calls) == 19


def test_double_backward_is_an_error_and_never_a_wrong_number():
    (weight, gamma, beta), _ = layer()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    with fused_resnet.backend("eager"):
        out = conv_bn_act(x, weight, gamma, beta, None, None)
    (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        g.square().sum().backward()


def test_an_unused_activation_costs_no_gradient():
    """A pending that nobody consumed gets no gradient, and its weight none."""
    (weight, gamma, beta), _ = layer()
    (weight2, *_), _ = layer(size=1)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True).contiguous(memory_format=torch.channels_last)
    geometry = ops.ConvGeometry([1, 1], [0, 0], [1, 1], 1)
    norm = ops.Norm(gamma, beta, None, None, True, 1e-5)
    used, _ = ops.conv_stats_pair(x, ops.Conv(weight, norm, geometry), ops.Conv(weight2, norm, geometry))
    ops.norm_add_act(used).sum().backward()
    assert weight.grad is not None and weight2.grad is None


def test_hooks_of_saved_tensors_see_all_that_outlives_a_forward():
    """A hook that puts tensors elsewhere, or a checkpoint that drops them, frees a pending activation: no node holds it by other means."""
    (weight, gamma, beta), _ = layer(k=4, c=4, size=1)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    conv = ops.Conv(weight, ops.Norm(gamma, beta, None, None, True, 1e-5), ops.ConvGeometry([1, 1], [0, 0], [1, 1], 1))

    def forward():
        first = ops.conv_stats(x, conv)
        second, _ = ops.norm_add_act_conv(first, x, conv)
        return ops.norm_act_conv(second, conv), [weakref.ref(t) for pending in (first, second) for t in pending]

    out, held = forward()
    assert all(ref() is not None for ref in held[:3])  # the graph holds them, and this test sees it
    with torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda _: None):
        out, held = forward()
    assert out.y.grad_fn is not None and [ref() for ref in held] == [None] * len(held)


@pytest.mark.parametrize("strides", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [1, 3])
def test_weight_gradients_have_the_weights_strides(strides, size):
    (weight, gamma, beta), _ = layer(size=size, k=4, c=4, dtype=torch.float32)
    weight = weight.detach()
    weight = (weight.contiguous(memory_format=torch.channels_last) if strides == "channels_last" else weight).requires_grad_()
    with fused_resnet.backend("eager"):
        conv_bn_act(torch.randn(2, 4, 5, 5), weight, gamma, beta, None, None).sum().backward()
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("backend", RUNNABLE)
def test_nan_is_kept(backend, device):
    """The gradient scaler looks for it: neither ReLU nor a pool may turn NaN into a number."""
    (weight, gamma, beta), (mean, var) = layer(k=8, c=4, size=1, dtype=torch.float32)
    x = torch.randn(2, 4, 6, 6)
    x[0, 0, 2, 2] = float("nan")
    args = [t.detach().to(device) for t in (weight, gamma, beta, mean, var)]
    conv = ops.Conv(args[0], ops.Norm(*args[1:], False, 1e-5), ops.ConvGeometry([1, 1], [0, 0], [1, 1], 1))
    with fused_resnet.backend(backend):
        out = ops.conv_stats(x.to(device).contiguous(memory_format=torch.channels_last), conv)
        act, pooled, mean = ops.norm_add_act(out), ops.norm_act_max_pool(out), ops.norm_add_act_avg_pool(out)
    assert act[0, :, 2, 2].isnan().all() and act.isnan().sum() == 8
    assert pooled[0, :, 1, 1].isnan().all() and not pooled[1].isnan().any()
    assert mean[0].isnan().all() and not mean[1].isnan().any()


def test_max_pool_takes_the_first_of_equals_as_pytorch_does():
    x = torch.randint(-2, 2, (2, 5, 9, 8)).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    one, zero = torch.ones(5), torch.zeros(5)
    out, index = Reference().norm_act_max_pool(Source(x.detach(), scale=one, bias=zero), 3, 2, 1)
    expected, where = F.max_pool2d(x.relu(), 3, 2, 1, return_indices=True)
    assert torch.equal(out, expected)
    rows, columns = torch.arange(5)[:, None] * 2 - 1 + index // 3, torch.arange(4) * 2 - 1 + index % 3
    assert torch.equal(rows * 8 + columns, where)


FAULTS = {
    "no x̂ correction": ("norm_backward_apply", lambda f: lambda dz, y, m, i, g, s1, s2: f(dz, y, m, i, g, s1, torch.zeros_like(s2))),
    "no mean correction": ("norm_backward_apply", lambda f: lambda dz, y, m, i, g, s1, s2: f(dz, y, m, i, g, torch.zeros_like(s1), s2)),
    "sums swapped": ("norm_backward_reduce", lambda f: lambda *a, **k: (lambda r: (r[0], r[2], r[1], r[3]))(f(*a, **k))),
    "biased by an ulp": ("norm_add_act", lambda f: lambda *a, **k: (lambda r: (r[0] * (1 + 2e-6), r[1]))(f(*a, **k))),
    "residual's sum forgotten": (
        "norm_backward_reduce",
        lambda f: lambda *a, **k: (lambda r: (*r[:3], None if r[3] is None else r[3] * 0))(f(*a, **k)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_catches_planted_faults(fault, monkeypatch, device):
    """The rule of test_operators refuses each of these, in float32, in some chain."""
    method, spoil = FAULTS[fault]
    eager = BACKENDS["eager"]
    monkeypatch.setattr(eager, method, spoil(getattr(eager, method)))
    caught = []
    for chain in CHAINS:
        layers, x, r = inputs(SHAPE, device)
        with fused_resnet.backend("eager"):
            caught += refused(chain, layers, x, r, loss_weight(chain, layers, x, r), torch.float32)
    assert caught
