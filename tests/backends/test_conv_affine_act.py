"""Convolution, affine map, residual and ReLU in inference: the Triton kernel's epilogue, every backend's `conv_affine_act`, the choice.

The bound: at most twice the error of PyTorch's eager in the same dtype, operator by operator, both against float64. What NaN is in a
sum stays NaN through the ReLU; that a GPU's code keeps it, tests/kernels/test_convolutions_compile.py asks of the compiler's output.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.chains import DEVICE, RUNNABLE, TESTED, relative_error
from support.convolutions import DTYPES, PROBLEMS, SMALL, geometry_of, nhwc, planted, weight_of
from support.epilogues import EPILOGUES, SHAPES, check, eager, operands
from support.rule import floor

import fused_resnet
from fused_resnet import backends, ops
from fused_resnet.backends import BACKENDS
from fused_resnet.functional import conv_bn_act
from fused_resnet.kernels import fprop as module
from fused_resnet.kernels.fprop import fprop_affine_act
from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import CUDNN, Configuration, Entry, Table, Task

pytestmark = pytest.mark.usefixtures("poisoned")

#: Every epilogue in float16, which shows a second rounding best; one of them in the kernel's other dtypes.
KERNEL_CASES = [(epilogue, torch.float16) for epilogue in EPILOGUES] + [("all", dtype) for dtype in DTYPES if dtype != torch.float16]


# ---- the kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epilogue, dtype", KERNEL_CASES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernel_agrees(name, epilogue, dtype):
    given = operands(name, epilogue, dtype)
    check(fprop_affine_act(*given, configuration=SMALL, allow_tf32=False), given)


@pytest.mark.parametrize(
    "name, tiles",
    [*itertools.product(["1x1", "3x3 stride 2", "stem"], [(32, 16, 32), (64, 32, 64)]), ("1x1 to a thousand", (16, 256, 16))], ids=str,
)  # fmt: skip
def test_the_kernel_agrees_with_any_tiles(name, tiles):
    given = operands(name, "all", torch.float16)
    check(fprop_affine_act(*given, configuration=Configuration(*tiles, warps=4, stages=2), allow_tf32=False), given)


def test_the_kernel_rounds_once():
    """Eager rounds the sum and then adds to it: with a bias of 1024 it has lost what the residual brings back."""
    given = operands("1x1", "residual", torch.float16)
    given[4] += 1024.0
    given[5] = (given[5] - 1024.0).contiguous(memory_format=torch.channels_last)
    truth = eager(*(t.double() if torch.is_tensor(t) else t for t in given))
    act = fprop_affine_act(*given, configuration=SMALL, allow_tf32=False)
    assert relative_error(act, truth) <= floor(torch.float16, act.numel()) < 0.1 * relative_error(eager(*given), truth)


@pytest.mark.parametrize("vector", [torch.float16, torch.float64])
def test_vectors_of_any_dtype(vector):
    given = operands("3x3", "all", torch.float32)
    given[3], given[4] = (t.to(vector) for t in given[3:5])
    check(fprop_affine_act(*given, configuration=SMALL, allow_tf32=False), [*given[:3], given[3].float(), given[4].float(), *given[5:]])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter: as asked for
@pytest.mark.parametrize("place", ["x", "bias", "residual"])
def test_nan_passes_the_relu(place):
    given = operands("3x3", "residual", torch.float32)
    position, at = {"x": (0, (1, 3, 2, 2)), "bias": (4, 3), "residual": (5, (1, 3, 2, 2))}[place]
    given[position][at] = math.nan
    expected = eager(*given).isnan()
    assert expected.any() and not expected.all()
    assert torch.equal(fprop_affine_act(*given, configuration=SMALL, allow_tf32=False).isnan(), expected)


#: What is wrong, in the kernel's own words, what is written instead, and the case that must see it. No fault reads outside a tensor.
FAULTS = {
    "no ReLU": ("if OUT_RELU:", "if False:", "bias"),
    "always a ReLU": ("if OUT_RELU:", "if True:", "linear"),
    "no scale": ("if out_scale_ptr is not None:", "if False:", "all"),
    "no residual": ("if out_residual_ptr is not None:", "if False:", "residual"),
    "the first tile's residual": ("out_residual_at = start.to(tl.int64) * K + ", "out_residual_at = ", "residual"),
    "the first filters' bias": ("vector(out_bias_ptr, filters,", "vector(out_bias_ptr, filters - n * BLOCK_N,", "bias"),
    "the residual behind the ReLU": (
        "preactivation(acc, out_scale, vector(out_bias_ptr, filters, filters < K), out_residual, None, None)",
        "relu(preactivation(acc, out_scale, vector(out_bias_ptr, filters, filters < K), None, None, None)) + out_residual",
        "residual",
    ),
}  # fmt: skip


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a fault may read what is not there")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, tmp_path):
    right, wrong, epilogue = FAULTS[fault]
    faulty, given = planted(module, right, wrong, tmp_path), operands("1x1", epilogue, torch.float16)
    check(fprop_affine_act(*given, configuration=SMALL, allow_tf32=False), given)
    with pytest.raises(AssertionError):
        check(faulty.fprop_affine_act(*given, configuration=SMALL, allow_tf32=False), given)


def test_what_the_kernel_can_not_do_is_named():
    grouped, plain = operands("3x3 grouped", "bias", torch.float32), operands("3x3", "bias", torch.float32)
    with pytest.raises(ValueError, match="geometry: expected groups = 1; got 3"):
        fprop_affine_act(*grouped, configuration=SMALL, allow_tf32=False)
    with pytest.raises(ValueError, match="configuration: expected splits = 1"):
        fprop_affine_act(*plain, configuration=replace(SMALL, splits=2), allow_tf32=False)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31():
    """An output and a residual of 2³¹ + elements: the last image is what it is by itself."""
    n = 2**31 // (64 * 112 * 112) + 2
    x = torch.randn(n, 16, 112, 112, device=DEVICE, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(n, 64, 112, 112, device=DEVICE, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    problem = ConvProblem(n, 16, 112, 112, 64, 1, 1)
    rest = weight_of(problem, torch.float16), geometry_of(problem), None, torch.randn(64, device=DEVICE)
    tiles = Configuration(64, 64, 16, warps=4, stages=2)
    whole, tail = (
        fprop_affine_act(x[part], *rest, residual[part], True, configuration=tiles, allow_tf32=False)
        for part in (slice(None), slice(-1, None))
    )
    assert torch.equal(whole[-1:], tail)


# ---- the backends ----------------------------------------------------------------------------------------------------

#: Enough for each way through a backend; the interpreter takes long for all.
OF_BACKENDS = list(itertools.product(["3x3 stride 2", "3x3 grouped"], EPILOGUES))
RUNNABLE_DTYPES = [
    (name, dtype) for name in TESTED for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if not BACKENDS[name].why_not(DEVICE, dtype)
]  # fmt: skip


@pytest.mark.parametrize("name, dtype", RUNNABLE_DTYPES, ids=str)
@pytest.mark.parametrize("shape, epilogue", OF_BACKENDS)
def test_every_backend_agrees(shape, epilogue, name, dtype):
    given = operands(shape, epilogue, dtype)
    with fused_resnet.backend(name), torch.no_grad():
        check(ops.conv_affine_act(*given), given)


@pytest.mark.parametrize("choice", ["nothing", "tiles", "cudnn", "cudnn, which refuses"])
def test_what_was_measured_for_training_chooses(choice, monkeypatch):
    """`tuned` takes what does the same convolution in training; where nothing was measured, or cuDNN refuses, the passes."""
    tuned, seen = BACKENDS["tuned_triton"], []
    given = operands("1x1", "residual", torch.float32)
    problem = SHAPES["1x1"]
    measured = {"nothing": [], "tiles": [Entry(Task("fprop", problem, "float32", "act"), SMALL, 1.0, 2.0)]}
    table = Table(measured.get(choice, [Entry(Task("fprop", problem, "float32", "act"), CUDNN, 1.0, 2.0)]))
    expected = eager(*given)

    def note(what, result):
        def call(*args, **options):
            seen.append(what)
            return result

        return call

    monkeypatch.setattr(backends.tuned, "measured", lambda device: table)
    monkeypatch.setattr(backends.tuned.cudnn, "why_not_task", lambda task, device: None)
    monkeypatch.setattr(module, "fprop_affine_act", note("tiles", expected))
    monkeypatch.setattr(backends.convolutions.cudnn, "conv_affine_act", note("cudnn", None if "refuses" in choice else expected))
    monkeypatch.setattr(backends.TunedTriton, "norm_add_act", note("pass", (expected, None)), raising=True)
    tuned.forget()
    try:
        assert tuned.conv_affine_act(*given) is expected
        assert seen == {"nothing": ["pass"], "tiles": ["tiles"], "cudnn": ["cudnn"]}.get(choice, ["cudnn", "pass"])
        seen.clear()  # a graph of cuDNN's has a ReLU
        tuned.conv_affine_act(*given[:-1], False)
        assert seen == (["tiles"] if choice == "tiles" else ["pass"])
    finally:
        tuned.forget()


# ---- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, value, error, words",
    [
        (0, torch.randn(2, 32, 5, 5), ValueError, "x: expected memory_format=torch.channels_last"),
        (1, torch.randn(48, 31, 1, 1), ValueError, "x: expected 31 channels, as weight"),
        (3, torch.ones(47), ValueError, r"scale: expected shape \[48\]"),
        (4, torch.ones(48, dtype=torch.int32), TypeError, "bias: expected a floating dtype"),
        (5, nhwc(2, 48, 5, 4, dtype=torch.float32).cpu(), ValueError, r"residual: expected shape \[2, 48, 5, 5\], that of the output"),
        (5, torch.randn(2, 48, 5, 5), ValueError, "residual: expected memory_format=torch.channels_last"),
        (5, nhwc(2, 48, 5, 5, dtype=torch.float16), TypeError, "residual: expected torch.float32"),
    ],
)
def test_bad_arguments_are_named(place, value, error, words):
    given = operands("1x1", "bias", torch.float32)
    given[place] = value.to(DEVICE)
    with fused_resnet.backend("eager"), pytest.raises(error, match=words):
        ops.conv_affine_act(*given)


@pytest.mark.parametrize("name", RUNNABLE)
def test_vectors_may_have_strides(name):
    given = operands("1x1", "all", torch.float32)
    strided = list(given)
    strided[3], strided[4] = (torch.stack([t, torch.full_like(t, math.nan)], 1)[:, 0] for t in given[3:5])
    with fused_resnet.backend(name), torch.no_grad():
        check(ops.conv_affine_act(*strided), given)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_layer_by_its_running_statistics_is_one_call(name, relu, monkeypatch):
    """`functional.conv_bn_act`, where only numbers are wanted; as PyTorch's modules."""
    dtype, called = torch.float16, []
    given = operands("3x3", "residual", dtype)
    x, weight, residual = given[0], given[1], given[5]
    mean, var, gamma, beta = (torch.rand(16, device=DEVICE) + 0.5 for _ in range(4))
    scale = gamma * (var + 1e-5).rsqrt()
    bias = beta - mean * scale
    implementation = type(BACKENDS[name])
    original = implementation.conv_affine_act
    monkeypatch.setattr(implementation, "conv_affine_act", lambda self, *args: called.append(name) or original(self, *args))
    with fused_resnet.backend(name), torch.no_grad():
        act = conv_bn_act(x, weight, gamma, beta, mean, var, residual, training=False, padding=1, relu=relu)
        conv_bn_act(x, weight, gamma, beta, mean, var, residual, training=True, padding=1, relu=relu)
    check(act, [x, weight, given[2], scale, bias, residual, relu])
    assert called == [name]


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    """A mode that wants to see operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_inference_is_where_only_numbers_are_wanted():
    from torch.autograd import forward_ad

    x, wants = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    assert ops.inferring(x) and ops.inferring(x, None, x) and not ops.inferring(wants) and not ops.inferring(x, None, wants)
    with torch.no_grad():
        assert ops.inferring(wants, wants)
        with Watching():
            assert not ops.inferring(x)
        with forward_ad.dual_level():
            assert not ops.inferring(x)
    with torch.inference_mode():
        assert ops.inferring(torch.randn(2))
    answers = []
    torch.func.vmap(lambda t: answers.append(ops.inferring(t)) or t)(x)
    torch.jit.trace(lambda t: (answers.append(ops.inferring(t)), t + 1)[1], x, check_trace=False)
    compiled = torch.compile(lambda t: t + 1 if ops.inferring(t) else t - 1, backend="eager", fullgraph=True)
    answers.append(not torch.equal(compiled(x), x - 1))
    assert len(answers) > 2 and not any(answers)
    assert not ops.inferring(x.to("meta"))
