"""cuDNN's graphs: their construction by the real package, the plans' cache and refusals, precision, and, on a GPU, their results.

Without a GPU the package builds nodes and prints them; it proposes no plan.
"""

import importlib.metadata
import importlib.util
import json
import types
from dataclasses import replace

import pytest
import torch
from support.chains import CHAINS, DEVICE, Shape
from support.checkout import ROOT, script
from support.cudnn_arithmetic import Arithmetic, Mixed, OnlyForward, fprop, put_in_place, refusal
from support.rule import refused_of_draws

import fused_resnet
from fused_resnet import backends, ops
from fused_resnet.backends import BACKENDS
from fused_resnet.cudnn import library, plans, probe, work
from fused_resnet.cudnn.graphs import GRAPHS, ROLES, GraphProblem, build
from fused_resnet.problem import ConvProblem
from fused_resnet.reference import Reference, affine, passes_gradient
from fused_resnet.tuning import CUDNN, Entry, Table, Task
from fused_resnet.values import Conv, ConvGeometry, ConvOutput, Norm, Source, nhwc

if reason := library.missing_package():
    pytest.skip(reason, allow_module_level=True)
import cudnn as package  # noqa: E402

CONV = ConvProblem(4, 64, 14, 12, 32, 3, 3, (2, 2), (1, 1))
CASES = [(name, source) for name, graph in GRAPHS.items() for source in graph.sources]
NO_CUDA = pytest.mark.skipif(DEVICE.type == "cuda", reason="says what happens where no GPU is")


def problem(name: str, source: str, dtype: str = "float16", **changes) -> GraphProblem:
    return replace(GraphProblem(name, CONV, dtype, source, dact=name == "dgrad"), **changes)


def printed(asked: GraphProblem) -> dict:
    """The graph as the package prints it."""
    return json.loads(str(build(asked)))


# ---- graphs ----------------------------------------------------------------------------------------------------------

#: Each graph's nodes in order, by the package's own names.
NODES = {
    ("conv_genstats", "act"): "conv_fprop genstats",
    ("conv_sums", "act"): "conv_fprop reduction mul reduction",
    ("scale_bias_relu_conv_genstats", "norm"): "mul add relu conv_fprop genstats",
    ("scale_bias_relu_wgrad", "norm"): "mul add relu conv_wgrad",
    ("dgrad", "act"): "conv_dgrad add",
    ("dgrad", "norm"): "conv_dgrad add mul add relu_backward reduction sub mul mul reduction",
    ("dgrad", "norm_add"): "conv_dgrad add mul reduction sub mul mul reduction",
    ("dgrad", "norm_add_raw"): "conv_dgrad add mul reduction sub mul mul reduction sub mul mul reduction",
    ("scale_bias_add_relu", "norm_add"): "mul add add relu cmp_neq",
    ("scale_bias_add_relu", "norm_add_raw"): "mul add mul add add relu cmp_neq",
    ("dbn_apply", "norm"): "mul add mul add",
    ("conv_scale_bias_add_relu", "norm"): "conv_fprop mul add relu",
    ("conv_scale_bias_add_relu", "norm_add"): "conv_fprop mul add add relu",
}
WRITTEN = {
    "conv_genstats": {"y", "sum", "square_sum"}, "conv_sums": {"y", "sum", "square_sum"}, "scale_bias_relu_wgrad": {"dw"},
    "scale_bias_relu_conv_genstats": {"y", "sum", "square_sum"}, "scale_bias_add_relu": {"act", "mask"}, "dbn_apply": {"dy"},
    "conv_scale_bias_add_relu": {"act"}, ("dgrad", "act"): {"dz"}, ("dgrad", "norm"): {"dz", "s1", "s2"},
    ("dgrad", "norm_add"): {"dz", "s1", "s2"}, ("dgrad", "norm_add_raw"): {"dz", "s1", "s2", "residual_s2"},
}  # fmt: skip


@pytest.mark.parametrize("name, source", CASES)
def test_a_graph_has_its_nodes_and_its_tensors(name, source):
    content = printed(problem(name, source))
    assert " ".join(node["name"].partition(".")[0] for node in content["nodes"]) == NODES[name, source]
    tensors = {key: t for key, t in content["tensors"].items() if not t["is_virtual"]}
    assert set(tensors) <= set(ROLES)
    assert {key: t["uid"] for key, t in tensors.items()} == {key: ROLES.index(key) + 1 for key in tensors}
    written = {t.get_name() for t in build(problem(name, source)).get_outputs()}
    assert written == (WRITTEN[name, source] if name == "dgrad" else WRITTEN[name])


@pytest.mark.parametrize("dtype, word", [("float16", "HALF"), ("bfloat16", "BFLOAT16"), ("float32", "FLOAT")])
def test_tensors_are_nhwc_and_vectors_float32_but_for_the_prologues(dtype, word):
    half, full = f"data_type.{word}", "data_type.FLOAT"
    tensors = printed(problem("scale_bias_relu_conv_genstats", "norm", dtype))["tensors"]
    layouts = {key: (t["dim"], t["stride"], t["dtype"]) for key, t in tensors.items() if key in ROLES}
    assert layouts == {
        "x": ([4, 64, 14, 12], [64 * 14 * 12, 1, 64 * 12, 64], half),
        "scale": ([1, 64, 1, 1], [64, 1, 64, 64], half),
        "bias": ([1, 64, 1, 1], [64, 1, 64, 64], half),
        "weight": ([32, 64, 3, 3], [64 * 9, 1, 64 * 3, 64], half),
        "y": ([4, 32, 7, 6], [32 * 7 * 6, 1, 32 * 6, 32], half),
        "sum": ([1, 32, 1, 1], [32, 1, 32, 32], full),
        "square_sum": ([1, 32, 1, 1], [32, 1, 32, 32], full),
    }
    tensors = printed(problem("dgrad", "norm_add_raw", dtype))["tensors"]
    assert tensors["mask"]["dtype"] == "data_type.BOOLEAN" and tensors["mask"]["stride"] == [64 * 14 * 12, 1, 64 * 12, 64]
    assert {tensors[key]["dtype"] for key in ("mean", "invstd", "residual_mean", "s1", "s2", "residual_s2")} == {full}
    assert tensors["dy"]["dim"] == [4, 32, 7, 6] and tensors["dz"]["dim"] == [4, 64, 14, 12]


def test_a_convolution_moves_as_the_problem_says():
    (node,) = (n for n in printed(problem("dgrad", "norm"))["nodes"] if n["name"].startswith("conv_dgrad"))
    assert node["params"] == {"padding": [1, 1], "stride": [2, 2], "dilation": [1, 1]}


def test_arithmetic_between_nodes_is_in_float32():
    graph = build(problem("scale_bias_relu_wgrad", "norm"))
    assert graph.context.compute_data_type == graph.context.intermediate_data_type == package.data_type.FLOAT


@pytest.mark.parametrize(
    "values, words",
    [
        ({"graph": "gemm"}, "graph: expected one of conv_genstats, "),
        ({"dtype": "float64"}, "dtype: expected one of float32, float16, bfloat16; got 'float64'"),
        ({"source": "norm"}, "source: conv_genstats expected one of act; got 'norm'"),
        ({"dact": True}, "dact: expected nothing to be added in conv_genstats"),
    ],
)
def test_a_problem_that_there_is_no_graph_for_is_refused(values, words):
    with pytest.raises(ValueError) as error:
        replace(problem("conv_genstats", "act"), **values)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    "asked, words",
    [
        (problem("conv_genstats", "act", conv=replace(CONV, c=3)), "channels in multiples of 8; the convolution has 3 and 32"),
        (problem("conv_genstats", "act", conv=replace(CONV, groups=2)), "takes no grouped convolution"),
        (problem("scale_bias_relu_wgrad", "norm", "float32"), "written for 2-byte ones"),
        (problem("dgrad", "act", dact=False), "the framework's convolution"),
    ],
)
def test_some_problems_are_ruled_out_before_cudnn_is_asked(asked, words):
    assert words in asked.refusal()


def test_each_task_has_its_graph_or_a_reason():
    def of(kind, source, dtype="float16", **more):
        found = work.problem_of_task(Task(kind, CONV, dtype, source, **more))
        return found if isinstance(found, str) else (found.graph, found.source, found.dact)

    assert of("fprop", "act") == ("conv_genstats", "act", False)
    assert of("fprop", "act", "bfloat16") == ("conv_sums", "act", False)
    assert of("fprop", "norm") == ("scale_bias_relu_conv_genstats", "norm", False)
    assert "hands out no mask" in of("fprop", "norm_add") and "hands out no mask" in of("fprop", "norm_add_raw")
    assert of("wgrad", "norm") == ("scale_bias_relu_wgrad", "norm", False)
    assert "the framework's convolution" in of("wgrad", "act")
    assert of("dgrad", "norm_add") == ("dgrad", "norm_add", False)
    assert of("dgrad", "norm_add_raw", compact=2, compact_k=64) == ("dgrad", "norm_add_raw", True)


# ---- the package and the library -------------------------------------------------------------------------------------


@pytest.fixture
def forgotten():
    """What the package's presence was found to be is asked again, and forgotten afterwards."""

    def forget():
        library.missing_package.cache_clear()
        library.declines.cache_clear()
        backends._declines.cache_clear()

    forget()
    yield
    forget()


def _absent(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    "version, words",
    [
        (_absent, "nvidia-cudnn-frontend is not installed (pip install 'fused_resnet[cudnn]')"),
        (lambda name: "1.18.0", "nvidia-cudnn-frontend is 1.18.0; 1.27 is the least"),
    ],
)
def test_a_missing_or_an_old_package_declines_with_a_sentence(version, words, forgotten, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert library.declines() == words


def test_a_package_that_does_not_load_declines_with_its_reason(forgotten, monkeypatch):
    def broken():
        raise ImportError("libstdc++.so.6: version too old")

    monkeypatch.setattr(library, "frontend", broken)
    assert library.declines() == "nvidia-cudnn-frontend does not load: libstdc++.so.6: version too old"


def test_an_old_library_declines_with_a_sentence(forgotten, monkeypatch):
    monkeypatch.setattr(library, "library_version", lambda: (9, 7, 1))
    assert library.declines() == "cuDNN is 9.7.1; 9.8 is the least"
    library.declines.cache_clear()
    monkeypatch.setattr(library, "library_version", lambda: None)
    assert "finds no cuDNN library" in library.declines()


@NO_CUDA
def test_the_backend_says_why_it_does_not_run_on_a_cpu():
    words = "cuDNN runs on CUDA GPUs, not on 'cpu'"
    assert BACKENDS["cudnn"].declines(torch.device("cpu"), torch.float16) == words
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    conv = Conv(torch.randn(8, 8, 1, 1), Norm(None, None, None, None, True, 1e-5), ConvGeometry([1, 1], [0, 0], [1, 1], 1))
    with fused_resnet.backend("cudnn"), pytest.raises(RuntimeError, match=f"backend 'cudnn' was asked for and can't run here: {words}"):
        ops.conv_stats(x, conv)


def test_the_package_is_imported_only_when_it_is_asked_for():
    import subprocess
    import sys

    script = "import sys, fused_resnet; assert 'cudnn' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_no_gpu(tmp_path, monkeypatch):
    """Plans of a GPU that is not there: the package itself refuses, for want of a library."""
    monkeypatch.setattr(library, "handle", lambda device: None)
    return plans.Plans(torch.device("cuda", 0), "a GPU, cudnn 9.9.9", tmp_path)


@NO_CUDA
def test_a_refusal_is_remembered_with_its_reason(on_no_gpu, tmp_path, monkeypatch):
    asked = problem("conv_genstats", "act")
    reason = on_no_gpu.get(asked)
    assert isinstance(reason, str) and "cudnn" in reason.lower()
    (file,) = tmp_path.iterdir()
    assert file.suffix == plans.REFUSAL and json.loads(file.read_text())["reason"] == reason

    def asked_again(*args, **options):
        raise AssertionError("cuDNN is asked again")

    monkeypatch.setattr(plans, "compiled", asked_again)
    assert on_no_gpu.get(asked) == reason  # in the process
    assert plans.Plans(on_no_gpu.device, on_no_gpu.versions, tmp_path).get(asked) == reason  # in the next
    with pytest.raises(AssertionError):  # another cuDNN, or another GPU, is asked
        plans.Plans(on_no_gpu.device, "a GPU, cudnn 9.9.10", tmp_path).get(asked)
    with pytest.raises(AssertionError):
        on_no_gpu.get(replace(asked, dtype="bfloat16"))


@NO_CUDA
def test_a_broken_file_of_a_refusal_is_no_refusal(on_no_gpu, tmp_path, monkeypatch):
    asked = problem("conv_genstats", "act")
    for content in ("", "{}", "[1]", '{"reason": 3}'):
        on_no_gpu.path(asked, plans.REFUSAL).write_text(content)
        monkeypatch.setattr(plans, "compiled", lambda *args, **options: (_ for _ in ()).throw(plans.Refused("asked")))
        assert plans.Plans(on_no_gpu.device, on_no_gpu.versions, tmp_path).get(asked) == "asked"


def test_what_took_too_long_is_not_kept_for_the_next_process(on_no_gpu, tmp_path, monkeypatch):
    def slow(*args, **options):
        raise plans.Refused("no plan was built within 60 s", lasting=False)

    monkeypatch.setattr(plans, "compiled", slow)
    assert on_no_gpu.get(problem("conv_genstats", "act")) == "no plan was built within 60 s"
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(library, "handle", lambda device: None)
    monkeypatch.setattr(plans, "compiled", lambda *args, **options: (_ for _ in ()).throw(plans.Refused("no")))
    assert plans.Plans(torch.device("cuda", 0), "a GPU", tmp_path / "file" / "below").get(problem("conv_genstats", "act")) == "no"


def test_no_plan_is_built_while_a_cuda_graph_is_captured(on_no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="conv_genstats can't be built while a CUDA graph is captured; run the step once before"):
        on_no_gpu.get(problem("conv_genstats", "act"))


def test_cudnns_words_are_one_line_and_name_the_reason():
    said = RuntimeError(
        "No valid engine configs for __\nWarning: CUDNN_STATUS_NOT_SUPPORTED; Reason: a\tb Error: CUDNN_STATUS_X; Reason: c"
    )
    assert plans.words(said) == "CUDNN_STATUS_NOT_SUPPORTED: a b"
    assert plans.words(RuntimeError("x" * 1000)) == "x" * 200
    assert plans.words(RuntimeError()) == "RuntimeError"


# ---- precision -------------------------------------------------------------------------------------------------------


def raw(shape, ratio: float, dtype=torch.float16) -> torch.Tensor:
    """A raw output whose mean is `ratio` deviations away from zero, of either sign by channel."""
    sign = torch.where(torch.arange(shape[1]) % 2 == 0, 1.0, -1.0)[None, :, None, None]
    return nhwc((torch.randn(shape) + ratio * sign).to(dtype))


def statistics_error(found, truth) -> float:
    """The largest error of mean, in deviations, and of invstd, relative."""
    of_mean = (found[0].double() - truth[0]).abs() * truth[1]
    return torch.maximum(of_mean, (found[1].double() / truth[1] - 1).abs()).max().item()


@pytest.mark.parametrize("ratio", [0.0, 3.0, 7.0, 100.0, 1000.0])
def test_statistics_of_sums_are_as_good_as_eagers_at_any_mean(ratio, device):
    from fused_resnet.kernels.square_sums import moments_of_sums

    y = raw((16, 24, 13, 11), ratio).to(device)
    wide = y.double()
    truth = wide.mean((0, 2, 3)), (wide.var((0, 2, 3), correction=0) + 1e-5).rsqrt()
    sums = y.float().sum((0, 2, 3)), (y.float() ** 2).sum((0, 2, 3))
    gamma, beta = torch.rand(24, device=device) + 0.5, torch.randn(24, device=device)
    mean, invstd, var, scale, bias = moments_of_sums(y, *sums, gamma, beta, 1e-5)
    # Eager float16 normalises with float32 statistics and rounds to float16: what half a rounding of an activation costs.
    assert statistics_error((mean, invstd), truth) <= torch.finfo(torch.float16).eps / 4
    assert torch.equal(scale, invstd * gamma) and torch.allclose(bias, beta - mean * scale, rtol=1e-5, atol=1e-5)
    assert torch.allclose(var, wide.var((0, 2, 3), correction=0).float(), rtol=1e-3)


@pytest.mark.parametrize("ratio", [100.0, 1000.0])
def test_without_the_second_look_the_sums_are_wrong_there(ratio, device, monkeypatch):
    """The planted fault: sums of squares that are trusted whatever they are."""
    from fused_resnet.kernels import square_sums

    monkeypatch.setattr(square_sums, "LIMIT", float("inf"))
    y = raw((16, 24, 13, 11), ratio).to(device)
    truth = y.double().mean((0, 2, 3)), (y.double().var((0, 2, 3), correction=0) + 1e-5).rsqrt()
    # As a kernel adds them up that keeps one running sum: each of 2288 additions rounds.
    columns = y.float().permute(1, 0, 2, 3).flatten(1)
    sums = columns.cumsum(1)[:, -1].contiguous(), (columns**2).cumsum(1)[:, -1].contiguous()
    found = square_sums.moments_of_sums(y, *sums, None, None, 1e-5)
    error = statistics_error(found[:2], truth)
    assert not error <= torch.finfo(torch.float16).eps / 4


def test_statistics_of_sums_keep_nan_and_constant_channels(device):
    from fused_resnet.kernels.square_sums import moments_of_sums

    y = raw((4, 24, 5, 5), 0.0).to(device)
    y[0, 3, 0, 0], y[:, 5], y[:, 6] = float("nan"), 7.0, 0.0
    sums = y.float().sum((0, 2, 3)), (y.float() ** 2).sum((0, 2, 3))
    mean, invstd, var, _, _ = moments_of_sums(y, *sums, None, None, 1e-5)
    assert var.isnan().nonzero().flatten().tolist() == [3] and mean.isnan().nonzero().flatten().tolist() == [3]
    assert mean[5].item() == 7.0 and var[5].item() == var[6].item() == 0.0


def pending(ratio: float, channels: int = 64) -> tuple[Source, torch.Tensor]:
    """(a source with float32 coefficients, the float64 raw output that its x was rounded from)."""
    exact = raw((8, channels, 9, 9), ratio, torch.float64)
    x = exact.half()
    gamma, beta = torch.rand(channels) + 0.5, torch.randn(channels) * 0.3
    mean, invstd, _, scale, bias = Reference().batch_stats(x, gamma, beta, 1e-5)
    return Source(x, mean, invstd, scale, bias), exact


@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0, 100.0, 1000.0])
def test_rounded_coefficients_cost_less_than_eagers_rounding_of_the_raw_output(ratio):
    """z of the unrounded raw output in float64, against eager's float16 (x and z rounded) and against cuDNN's prologue."""
    source, exact = pending(ratio, channels=512)  # the quotient is 1.8; of 64 channels' draws one in a hundred is above 2
    truth = exact * source.scale.double()[:, None, None] + source.bias.double()[:, None, None]
    eager = affine(source.x, source.scale, source.bias).half().double()
    read = work.as_cudnn_reads(source)
    ours = affine(source.x, read.scale, read.bias).half().double()

    def error(z):
        return ((z - truth).square().mean() / truth.square().mean()).sqrt().item()

    assert error(ours) <= 2 * error(eager)


def test_scale_and_bias_rounded_apart_would_be_worse_than_that():
    """The planted fault: a bias that does not know what scale lost."""
    source, exact = pending(1000.0)
    truth = exact * source.scale.double()[:, None, None] + source.bias.double()[:, None, None]
    read = work.as_cudnn_reads(source)
    apart = affine(source.x, read.scale, source.bias.half().float()).double()
    kept = affine(source.x, read.scale, read.bias).double()
    assert (apart - truth).square().mean() > 1.3 * (kept - truth).square().mean()


def test_rounding_coefficients_twice_changes_nothing():
    read = work.as_cudnn_reads(pending(30.0)[0])
    again = work.as_cudnn_reads(read)
    assert torch.equal(read.scale, again.scale) and torch.equal(read.bias, again.bias)


def test_with_rounded_coefficients_every_kernel_sees_one_mask():
    """Two roundings, as cuDNN's two nodes may do, and one fma have the same sign: the product is exact in float32."""
    source, _ = pending(2.0, channels=512)
    source = source._replace(bias=source.bias.where(torch.arange(512) % 2 == 0, -source.mean * source.scale))

    def disagree(s: Source) -> int:
        nodes = s.x.float() * s.scale[:, None, None] + s.bias[:, None, None]
        return (passes_gradient(nodes) != passes_gradient(affine(s.x, s.scale, s.bias))).sum().item()

    assert disagree(work.as_cudnn_reads(source)) == 0
    rounded, plain = work.as_cudnn_reads(source), source
    flips = passes_gradient(affine(plain.x, plain.scale, plain.bias)) != passes_gradient(affine(rounded.x, rounded.scale, rounded.bias))
    assert flips.any()  # so a backward that did not know would have another mask


# ---- the backend's work, by cuDNN's arithmetic on the CPU ------------------------------------------------------------

SHAPES = [Shape(2, 16, 6, 5, 24, size=3), Shape(3, 8, 7, 7, 16, size=3, stride=2), Shape(2, 32, 4, 4, 32)]


@pytest.fixture
def arithmetic(monkeypatch):
    """Backends that do cuDNN's tasks by its arithmetic. Yields the names of the functions that stood for a graph, once for each call."""
    called = put_in_place(monkeypatch)
    for kind in (Arithmetic, Mixed, OnlyForward):
        monkeypatch.setitem(BACKENDS, kind.name, kind())
    yield called
    backends._declines.cache_clear()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU cuDNN itself is tested")
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


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU cuDNN itself is tested")
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


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU cuDNN itself is tested")
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
    monkeypatch.setattr(tuned.cudnn, "refusal", lambda task, device: None)
    assert BACKENDS["tuned_triton"].choose(task, torch.device("cpu")) == CUDNN


def test_the_forced_triton_backend_has_tiles_where_cudnn_was_faster(monkeypatch):
    from fused_resnet.backends import triton
    from fused_resnet.tuning import Configuration

    task = Task("fprop", CONV, "float16", "act")
    monkeypatch.setattr(triton, "measured", lambda device: Table([Entry(task, CUDNN, 1.0, 2.0)]))
    assert isinstance(BACKENDS["triton"].choose(task, torch.device("cpu")), Configuration)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU cuDNN itself is tested")
def test_the_tuner_tries_cudnn_and_checks_it_first(monkeypatch):
    from fused_resnet.bench import tune

    put_in_place(monkeypatch)
    monkeypatch.setattr(tune, "refusal", lambda task, device: refusal(task))
    cpu, conv = torch.device("cpu"), ConvProblem(2, 16, 5, 5, 16, 1, 1)
    fprops = Task("fprop", conv, "float16", "norm")
    assert tune.Trial(fprops, Table(), cpu).cudnn_refusal() is None
    trial = tune.Trial(replace(fprops, kind="wgrad"), Table(), cpu)
    assert "alone rounds the coefficients" in trial.cudnn_refusal()
    table = Table([Entry(fprops, CUDNN, 1.0, 2.0)])
    assert tune.Trial(replace(fprops, kind="wgrad"), table, cpu).cudnn_refusal() is None
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


def test_the_page_is_what_the_files_say():
    made = script("bench/cudnn_graphs.py")
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert made.page(text, made.FILES) == text, "docs/backends.md is not what `python bench/cudnn_graphs.py table` makes"


def test_a_table_tells_what_ran_from_what_was_proposed(tmp_path):
    made = script("bench/cudnn_graphs.py")
    assert "Not measured" in made.tables(tmp_path)
    found = {"conv_genstats act": None, "dgrad norm": "wrong: s2 differs", "dbn_apply norm": "CUDNN_STATUS_X: no"}
    content = {
        "device": "A GPU", "capability": [9, 0], "ran": False, "cudnn": "9.9.9", "frontend": "1.27.0", "torch": "2.13.0", "commit": "c0ffee",
        "date": "2026-01-31T23:59:59Z", "answers": dict.fromkeys(made.DTYPES, found),
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    text = made.tables(tmp_path)
    assert "Not measured" in text and "| `conv_genstats` | `act` | proposed | proposed | proposed |" in text and "no such GPU" in text
    (tmp_path / "b.json").write_text(json.dumps(content | {"ran": True}))
    text = made.tables(tmp_path)
    assert "Not measured" not in text and text.index("was checked") < text.index("no such GPU")
    assert (
        "| `conv_genstats` | `act` | yes | yes | yes |" in text and "| wrong | wrong | wrong |" in text and "| refused | refused |" in text
    )


def test_the_floor_counts_every_operand_once():
    made, c = script("bench/cudnn_graphs.py"), ConvProblem(2, 8, 4, 4, 16, 1, 1)
    x, y, w, mask = 2 * 8 * 16 * 2, 2 * 16 * 16 * 2, 16 * 8 * 2, 2 * 16
    expected = {
        ("fprop", "norm"): x + y + w, ("fprop", "norm_add"): 3 * x + mask + y + w, ("wgrad", "norm"): x + y + w,
        ("dgrad", "act"): 2 * y + w + x, ("dgrad", "norm"): 2 * y + w + 2 * x, ("dgrad", "norm_add_raw"): 2 * y + w + 3 * x + mask,
    }  # fmt: skip
    assert {(kind, source): made.floor_bytes(Task(kind, c, "float16", source)) for kind, source in expected} == expected
    assert made.floor_bytes(Task("dgrad", c, "float16", "norm", dact=True, compact=2, compact_k=16)) == 2 * y + w + 3 * x + x // 4


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tiny, by the interpreter")
def test_the_shapes_are_timed_with_every_peer(tmp_path):
    made = script("bench/cudnn_graphs.py")
    arguments = [
        "shapes",
        str(tmp_path),
        *["--device", "cpu", "--model", "resnet18", "--batch", "1", "--size", "8", "--most", "1", "--repeats", "1"],
    ]
    args = made.parser().parse_args([*arguments, "--commit", "c0ffee"])
    assert args.run(args) == 0
    (path,) = tmp_path.rglob("*.json")
    statuses = {row["impl"]: row["status"] for row in json.loads(path.read_text())["rows"]}
    assert statuses.pop("ours:cudnn").startswith("unsupported: cuDNN runs on CUDA GPUs")
    assert statuses == dict.fromkeys(("eager_nhwc", "ours:passes", "ours:triton"), "ok")


# ---- on a GPU --------------------------------------------------------------------------------------------------------

ON_GPU = pytest.mark.gpu


@ON_GPU
@pytest.mark.parametrize("name, source", CASES)
def test_float16_graphs_are_accepted_and_right(name, source):
    assert probe.fault(name, source, "float16", DEVICE) is None


@ON_GPU
def test_a_plan_comes_back_from_the_cache(tmp_path):
    asked = replace(problem("conv_genstats", "act"), conv=ConvProblem(4, 64, 14, 12, 32, 3, 3, (1, 1), (1, 1)))
    versions = plans.plans_of(DEVICE).versions
    first = plans.Plans(torch.device("cuda", 0), versions, tmp_path)
    assert isinstance(first.get(asked), plans.Plan) and first.get(asked) is first.get(asked)
    assert [path.suffix for path in tmp_path.iterdir()] == [plans.PLAN]
    again = plans.Plans(torch.device("cuda", 0), versions, tmp_path)._restored(asked)
    results = []
    for plan in (first.get(asked), again):
        torch.manual_seed(0)
        x = nhwc(torch.randn(4, 64, 14, 12, device=DEVICE).half())
        tensors = {
            "x": x,
            "weight": nhwc(torch.randn(32, 64, 3, 3, device=DEVICE).half()),
            "y": nhwc(torch.empty(4, 32, 14, 12, device=DEVICE).half()),
        }
        tensors |= {role: torch.zeros(32, device=DEVICE) for role in ("sum", "square_sum")}
        plan.run(tensors)
        results.append(tensors["y"])
    assert torch.equal(*results)


@ON_GPU
def test_the_time_limit_is_kept_between_plans(tmp_path):
    slow = plans.Plans(torch.device("cuda", 0), "versions", tmp_path, limit_s=0.0)
    assert slow.get(problem("conv_genstats", "act")).startswith("no plan was built within 0 s")


@ON_GPU
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


@ON_GPU
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


@ON_GPU
def test_nan_passes_forward_and_backward():
    trial = probe.Trial("float16", DEVICE, "norm_add")
    trial.x[0, 0, 0, 0] = float("nan")
    s = trial.source
    act, mask = work.norm_add_act(s)
    assert act[0, 0, 0, 0].isnan() and mask[0, 0, 0, 0].item() & 1


def test_a_plan_is_built_where_its_gpu_is_the_current_one(monkeypatch, tmp_path):
    """cuDNN builds for the current device, which need not be that of the tensors."""
    current = []

    class On:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    def compiled(*_, **__):
        assert current == [torch.device("cuda", 1)]
        return types.SimpleNamespace(serialize=lambda: b"a plan", get_workspace_size=lambda: 7)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(plans, "compiled", compiled)
    monkeypatch.setattr(plans.library, "handle", lambda device: None)
    problem = GraphProblem("conv_genstats", ConvProblem(2, 8, 4, 4, 8, 1, 1), "float16", "act")
    made = plans.Plans(torch.device("cuda", 1), "these versions", tmp_path)._built(problem)
    assert made.workspace_bytes == 7 and not current
