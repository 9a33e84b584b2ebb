"""The backend `cudnn`: what it puts together, by cuDNN's arithmetic on the CPU; on a GPU, its results."""

from dataclasses import replace

import pytest
import torch
from support.chains import CHAINS, DEVICE, Shape
from support.cudnn_arithmetic import Arithmetic, Mixed, OnlyForward, fprop, pending, put_in_place, why_not_task
from support.cudnn_problems import CONV
from support.rule import refused_of_draws

import fused_resnet
from fused_resnet import backends
from fused_resnet.backends import BACKENDS
from fused_resnet.cudnn import probe, work
from fused_resnet.cudnn.graphs import GraphProblem
from fused_resnet.problem import ConvProblem
from fused_resnet.reference import Reference
from fused_resnet.tuning import CUDNN, Entry, Table, Task
from fused_resnet.values import Conv, ConvGeometry, ConvOutput, Norm, Source, nhwc

# ---- graphs ----------------------------------------------------------------------------------------------------------


# ---- the package and the library -------------------------------------------------------------------------------------


# ---- plans -----------------------------------------------------------------------------------------------------------


# ---- precision -------------------------------------------------------------------------------------------------------


# ---- the backend's work, by cuDNN's arithmetic on the CPU ------------------------------------------------------------

SHAPES = [Shape(2, 16, 6, 5, 24, size=3), Shape(3, 8, 7, 7, 16, size=3, stride=2), Shape(2, 32, 4, 4, 32)]


@pytest.fixture
def arithmetic(monkeypatch):
    """Backends that do cuDNN's tasks by its arithmetic. Yields the names of the functions that stood for a graph, once for each call."""
    called = put_in_place(monkeypatch)
    for kind in (Arithmetic, Mixed, OnlyForward):
        monkeypatch.setitem(BACKENDS, kind.name, kind())
    yield called
    backends._remembered.cache_clear()


@pytest.mark.cpu  # on a GPU cuDNN itself is tested
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", [Arithmetic.name, Mixed.name, OnlyForward.name])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.__name__)
def test_error_is_at_most_twice_eagers_by_cudnns_arithmetic(chain, backend, dtype, arithmetic, device):
    for shape in SHAPES[:1] if backend != Arithmetic.name else SHAPES:
        with fused_resnet.backend(backend):
            assert not refused_of_draws(chain, shape, dtype, True, device), shape
    if backend == Arithmetic.name:
        convolves_twice = chain.__name__.startswith("norm_") and "conv" in chain.__name__
        assert "fprop act" in arithmetic
        # Every second convolution's gradient of its input is fused; norm's own prologue is for float16 alone.
        assert not convolves_twice or any(call.startswith("dgrad norm") for call in arithmetic)
        assert ("wgrad norm" in arithmetic) == ("fprop norm" in arithmetic)
        assert ("fprop norm" in arithmetic) == (chain.__name__ == "norm_act_conv" and dtype == torch.float16)


@pytest.mark.cpu  # on a GPU cuDNN itself is tested
def test_a_backward_that_did_not_know_of_the_rounding_is_seen(arithmetic, monkeypatch):
    """The planted fault: only forward rounds. Its mask and backward's then differ."""
    torch.manual_seed(0)
    source, _ = pending(6.0)
    backend = BACKENDS[OnlyForward.name]
    conv = Conv(nhwc(torch.randn(16, 64, 1, 1).half()), Norm(None, None, None, None, True, 1e-5), ConvGeometry([1, 1], [0, 0], [1, 1], 1))
    forward = backend.as_read(source, [conv], kept=False)
    assert not torch.equal(forward.scale, source.scale)
    assert backend.as_read(source, [conv], kept=True) is source
    assert Reference().as_read(source, [conv], kept=False) is source
    seen = {}

    def record(self, read, *rest):
        seen["scale"] = read.scale
        return (None,) * 4, [None]

    monkeypatch.setattr(OnlyForward, "_input_gradients", record)
    y, *_ = fprop(source, conv.weight, conv.geometry)
    output = ConvOutput(
        torch.randn_like(y),
        torch.zeros(16),
        torch.zeros(16),
        y,
        torch.zeros(16),
        torch.ones(16),
        conv.weight,
        None,
        True,
        conv.geometry,
        False,
    )
    backend.convolve_backward(source, None, None, [output], None, True)
    assert torch.equal(seen["scale"], forward.scale)


@pytest.mark.parametrize("relu, refuses", [(True, False), (True, True), (False, False)])
def test_inference_is_one_graph_where_there_is_a_relu(relu, refuses, monkeypatch):
    """By the forced backend, whatever it has for training. What cuDNN refuses, and what has no ReLU, is a convolution and a pass."""
    ran = []

    def graph(x, weight, geometry, scale, bias, residual):
        ran.append(residual is not None)
        return None if refuses else torch.full_like(residual, 7.0)

    monkeypatch.setattr(backends.convolutions.cudnn, "conv_affine_act", graph)
    x, weight, residual = (nhwc(torch.randn(shape, device=DEVICE)) for shape in ((2, 8, 4, 4), (8, 4, 1, 1), (2, 8, 4, 4)))
    arguments = x, weight, ConvGeometry([1, 1], [0, 0], [1, 1], 2), None, torch.randn(8, device=DEVICE), residual, relu
    act, expected = BACKENDS["cudnn"].conv_affine_act(*arguments), Reference().conv_affine_act(*arguments)
    assert ran == [True] * relu
    torch.testing.assert_close(act, torch.full_like(residual, 7.0) if relu and not refuses else expected)


@pytest.mark.cpu  # on a GPU cuDNN itself is tested
def test_a_folded_convolution_has_a_scale_of_one_in_cudnns_graph(monkeypatch):
    """The graph multiplies; float32 vectors go in, whatever the network's dtype."""
    given = {}

    class Plan:
        def run(self, tensors):
            given.update(tensors)

    options = {"tf32": torch.backends.cudnn.allow_tf32, "deterministic": work.deterministic()}
    asked = GraphProblem("conv_scale_bias_add_relu", ConvProblem(2, 8, 4, 4, 8, 1, 1), "float16", "norm", **options)
    monkeypatch.setattr(work, "plans_of", lambda device: {asked: Plan()})
    x, weight, bias = nhwc(torch.randn(2, 8, 4, 4).half()), torch.randn(8, 8, 1, 1).half(), torch.randn(8).half()
    act = work.conv_affine_act(x, weight, ConvGeometry([1, 1], [0, 0], [1, 1], 1), None, bias, None, tried=True)
    assert given["act"] is act and torch.equal(given["scale"], torch.ones(8)) and torch.equal(given["bias"], bias.float())


def test_inference_of_a_layer_is_one_call_of_the_backend(monkeypatch, device):
    from fused_resnet.functional import conv_bn_act

    seen = []

    def one_kernel(self, x, weight, geometry, scale, bias, residual, relu):
        seen.append((relu, residual is not None))
        return torch.full((2, 8, 4, 4), 7.0, device=device)

    monkeypatch.setattr(Reference, "conv_affine_act", one_kernel)
    x, weight = torch.randn(2, 8, 4, 4, device=device), torch.randn(8, 8, 1, 1, device=device)
    vectors = [torch.rand(8, device=device) + 0.5 for _ in range(4)]
    residual = torch.randn(2, 8, 4, 4, device=device)
    with fused_resnet.backend("eager"):
        assert (conv_bn_act(x, weight, *vectors, residual, training=False) == 7).all() and seen == [(True, True)]
        assert (conv_bn_act(x, weight, *vectors, training=False, relu=False) == 7).all() and seen.pop() == (False, False)
        assert not (conv_bn_act(x, weight, *vectors, training=True) == 7).all()
        assert conv_bn_act(x.requires_grad_(), weight, *vectors, training=False).requires_grad
        with torch.no_grad():
            assert (conv_bn_act(x, weight, *vectors, training=False) == 7).all()
        with pytest.raises((ValueError, RuntimeError)):
            conv_bn_act(x, weight, *vectors, residual[:1], training=False)
    assert len(seen) == 2


def test_a_choice_of_cudnn_that_is_not_here_runs_as_passes(monkeypatch):
    from fused_resnet.backends import tuned

    task = Task("fprop", CONV, "float16", "act")
    monkeypatch.setattr(tuned, "measured", lambda device: Table([Entry(task, CUDNN, 1.0, 2.0)]))
    assert BACKENDS["tuned_triton"].choose(task, torch.device("cpu")) is None
    monkeypatch.setattr(tuned.cudnn, "why_not_task", lambda task, device: None)
    assert BACKENDS["tuned_triton"].choose(task, torch.device("cpu")) == CUDNN


def test_the_forced_triton_backend_has_tiles_where_cudnn_was_faster(monkeypatch):
    from fused_resnet.backends import triton
    from fused_resnet.tuning import Configuration

    task = Task("fprop", CONV, "float16", "act")
    monkeypatch.setattr(triton, "measured", lambda device: Table([Entry(task, CUDNN, 1.0, 2.0)]))
    assert isinstance(BACKENDS["triton"].choose(task, torch.device("cpu")), Configuration)


@pytest.mark.cpu  # on a GPU cuDNN itself is tested
def test_the_tuner_tries_cudnn_and_checks_it_first(monkeypatch):
    from fused_resnet.bench import tune

    put_in_place(monkeypatch)
    monkeypatch.setattr(tune, "why_not_task", lambda task, device: why_not_task(task))
    cpu, conv = torch.device("cpu"), ConvProblem(2, 16, 5, 5, 16, 1, 1)
    fprops = Task("fprop", conv, "float16", "norm")
    assert tune.Trial(fprops, Table(), cpu).why_not_cudnn() is None
    trial = tune.Trial(replace(fprops, kind="wgrad"), Table(), cpu)
    assert "alone rounds the coefficients" in trial.why_not_cudnn()
    table = Table([Entry(fprops, CUDNN, 1.0, 2.0)])
    assert tune.Trial(replace(fprops, kind="wgrad"), table, cpu).why_not_cudnn() is None
    outcome = tune.tune(replace(fprops, kind="wgrad"), table, cpu, most=1, repeats=2, limit_s=60)
    assert CUDNN not in outcome.failed
    trial = tune.Trial(fprops, Table(), cpu)
    assert trial.error(*(tuple(trial.call(choice)()) for choice in (CUDNN, None)))[1] is None

    def wrong(source, weight, geometry):
        y, *sums = fprop(source, weight, geometry)
        return 2 * y, *sums

    monkeypatch.setattr(tune.FusedConvolutions.convolve.__globals__["cudnn"], "fprop", wrong)
    outcome = tune.tune(fprops, Table(), cpu, most=1, repeats=2, limit_s=60)
    assert outcome.failed[CUDNN].startswith("wrong") and outcome.entry.configuration != CUDNN


# ---- the page, and the script that makes its tables ------------------------------------------------------------------


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_cuda_graph_replays_a_plan():
    x = nhwc(torch.randn(4, 64, 14, 14, device=DEVICE).half())
    weight, geometry = nhwc(torch.randn(32, 64, 3, 3, device=DEVICE).half()), ConvGeometry([1, 1], [1, 1], [1, 1], 1)
    work.fprop(Source(x), weight, geometry)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, total, _ = work.fprop(Source(x), weight, geometry)
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected, sums, _ = work.fprop(Source(x), weight, geometry)
    assert torch.equal(y, expected) and torch.allclose(total, sums)


@pytest.mark.gpu
def test_another_stream_is_the_one_that_runs():
    x = nhwc(torch.randn(4, 64, 14, 14, device=DEVICE).half())
    weight, geometry = nhwc(torch.randn(32, 64, 3, 3, device=DEVICE).half()), ConvGeometry([1, 1], [1, 1], [1, 1], 1)
    expected = work.fprop(Source(x), weight, geometry)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x.clone()
        y = work.fprop(Source(late), weight, geometry)[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_nan_passes_forward_and_backward():
    trial = probe.Trial("float16", DEVICE, "norm_add")
    trial.x[0, 0, 0, 0] = float("nan")
    s = trial.source
    act, mask = work.norm_add_act(s)
    assert act[0, 0, 0, 0].isnan() and mask[0, 0, 0, 0].item() & 1
