"""1x1 and 3x3 convolutions that run together with the passes around them: each against the same work apart, and products against float64."""

import pytest
import torch

from fused_resnet import environment, native
from fused_resnet.backends import BACKENDS, passes_cpu
from fused_resnet.values import Conv, ConvGeometry, ConvOutput, Norm, Source

PASSES = BACKENDS["passes_cpu"]
#: The window, n, c, k, h, w: whole blocks of pixels and not, one part and several, dweight summed on the way and of the whole dy; of
#: 3x3 also one image and several at once, a unit of fewer, 16 channels, and lines of whole groups and not.
SHAPES = [
    *((1, *shape) for shape in ((1, 32, 64, 56, 45), (3, 96, 32, 7, 5), (1, 32, 32, 1, 2), (2, 512, 128, 5, 5), (4, 64, 64, 33, 31))),
    *((3, *shape) for shape in ((2, 32, 64, 24, 13), (2, 16, 16, 34, 31), (33, 16, 16, 5, 4), (49, 64, 32, 2, 3), (1, 96, 32, 7, 42))),
    *((3, *shape) for shape in ((1, 32, 32, 1, 1), (17, 32, 32, 1, 9), (2, 256, 128, 5, 5), (1, 16, 16, 40, 33))),
    *((3, *shape) for shape in ((19, 32, 64, 8, 8), (2, 64, 32, 5, 56), (2, 96, 64, 6, 14), (3, 16, 16, 5, 32))),  # whole groups of a line
]
#: Instruction sets and dtypes. "best" is what the machine has, of tiles for bfloat16 with AMX.
CASES = [("best", "bfloat16"), ("best", "float32"), ("portable", "bfloat16"), ("avx2", "float32")]
KINDS = ("act", "norm", "norm_add", "norm_add_raw")


@pytest.fixture(autouse=True, params=CASES, ids="-".join)
def dtype(request, monkeypatch):
    """The dtype of a case, and its instruction set in use."""
    name, dtype = request.param
    if reason := PASSES.why_not(torch.device("cpu"), torch.bfloat16):
        pytest.skip(reason)
    before = native.cpu_instruction_set()
    monkeypatch.setattr(passes_cpu, "DTYPES", dict.fromkeys(native.INSTRUCTION_SETS, (torch.float32, torch.bfloat16)))
    monkeypatch.setattr(passes_cpu, "LEAST_IMAGES", 1)
    try:
        native.use_instruction_set(None if name == "best" else name)
    except environment.VariableError as error:
        pytest.skip(str(error))
    yield getattr(torch, dtype)
    native.use_instruction_set(before)


def activation(dtype, *shape):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def norm_of(channels):
    return Norm(torch.rand(channels) + 0.5, torch.randn(channels), torch.zeros(channels), torch.ones(channels), True, 1e-5)


def source_of(kind, dtype, shape):
    x = activation(dtype, *shape) * 3 + 1
    if kind == "act":
        return Source(x)
    norm = norm_of(shape[1])
    mean, invstd, _, scale, bias = PASSES.batch_stats(x, norm.gamma, norm.beta, norm.eps)
    if kind == "norm":
        return Source(x, mean, invstd, scale, bias)
    residual = activation(dtype, *shape)
    if kind == "norm_add":
        return Source(x, mean, invstd, scale, bias, residual)
    other = norm_of(shape[1])
    r_mean, r_invstd, _, r_scale, r_bias = PASSES.batch_stats(residual, other.gamma, other.beta, other.eps)
    return Source(x, mean, invstd, scale, bias, residual, r_mean, r_invstd, r_scale, r_bias)


def convolution(kind, dtype, window, n, c, k, h, w):
    weight = (torch.randn(k, c, window, window) / (window * c**0.5)).to(dtype).contiguous(memory_format=torch.channels_last)
    return source_of(kind, dtype, (n, c, h, w)), Conv(weight, norm_of(k), ConvGeometry([1, 1], [window // 2] * 2, [1, 1], 1))


def apart(monkeypatch):
    monkeypatch.setattr(passes_cpu, "runs_with_passes", lambda *_: False)


def assert_as_near(ours, theirs, exact):
    """The project's rule: at most twice the error of the same work by PyTorch's convolution."""
    error, allowed = ((t.double() - exact).norm() for t in (ours, theirs))
    assert error <= 2 * allowed + 1e-6 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_that_of_the_passes_and_a_convolution(kind, shape, dtype, monkeypatch):
    source, conv = convolution(kind, dtype, *shape)
    (pending,), act, mask = PASSES.convolve(source, [conv], True)
    again = PASSES.convolution_again(source, conv, True)(Source(act))
    apart(monkeypatch)
    (expected,), expected_act, expected_mask = PASSES.convolve(source, [conv], True)
    assert torch.equal(act, expected_act)
    assert (mask is None) == (expected_mask is None) and (mask is None or torch.equal(mask, expected_mask))
    assert_as_near(pending.y, expected.y, torch.conv2d(act.double(), conv.weight.double(), padding=conv.geometry.padding))
    assert torch.equal(again, pending.y)
    made = PASSES.batch_stats(pending.y, conv.norm.gamma, conv.norm.beta, conv.norm.eps)
    for ours, theirs in zip(pending[1:], made, strict=True):  # float32 sums of other parts of the pixels
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("summed", [False, True], ids=["one reader", "two readers"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_that_of_the_passes_and_a_convolution(kind, shape, summed, dtype, monkeypatch):
    source, conv = convolution(kind, dtype, *shape)
    (pending,), act, mask = PASSES.convolve(source, [conv], True)
    k = len(conv.weight)
    dz, dact = torch.randn_like(pending.y) + 0.3, torch.randn_like(act) if summed else None
    output = ConvOutput(dz, torch.randn(k), torch.randn(k), *pending[:3], conv.weight, conv.norm.gamma, True, conv.geometry, True)
    wide = PASSES._dy(output).double()
    padding = conv.geometry.padding
    exact_dw = torch.nn.grad.conv2d_weight(act.double(), conv.weight.shape, wide, padding=padding)
    for need_dx, need_dw in ((True, True), (True, False), (False, True)):
        asked = output._replace(need_dw=need_dw)
        (dx, *sums), (dw,) = PASSES.convolve_backward(source, act, mask, [asked], dact, need_dx)
        with monkeypatch.context() as patch:
            apart(patch)
            (expected, *expected_sums), (expected_dw,) = PASSES.convolve_backward(source, act, mask, [asked], dact, need_dx)
        assert (dw is None) == (not need_dw) and (dx is None) == (not need_dx)
        if need_dw:
            assert_as_near(dw, expected_dw, exact_dw)
            assert dw.stride() == conv.weight.stride()
        if not need_dx:
            continue
        exact = torch.nn.grad.conv2d_input(act.shape, conv.weight.double(), wide, padding=padding) + (0 if dact is None else dact.double())
        if kind != "act":
            exact = torch.where(act > 0, exact, 0.0)
        assert_as_near(dx, expected, exact)
        for ours, theirs in zip(sums, expected_sums, strict=True):
            assert (ours is None) == (theirs is None)
        if kind != "act":
            made = PASSES.norm_backward_reduce(dx, None, source, mask, True)[1:]
            for ours, theirs in zip(sums, made, strict=True):
                assert ours is None or (ours - theirs).norm() <= 1e-5 * (theirs.norm() + dx.double().norm())


@pytest.mark.parametrize("shape", [(1, 4, 64, 128, 29, 29), (3, 9, 64, 128, 15, 17), (3, 40, 16, 16, 9, 9)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, dtype):
    source, conv = convolution("norm", dtype, *shape)
    k = len(conv.weight)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            (pending,), act, mask = PASSES.convolve(source, [conv], True)
            dz = torch.randn_like(pending.y)
            output = ConvOutput(dz, *torch.randn(2, k), *pending[:3], conv.weight, conv.norm.gamma, True, conv.geometry, True)
            (dx, s1, s2, _), (dw,) = PASSES.convolve_backward(source, act, mask, [output], None, True)
            results.append([*pending, act, dx, s1, s2, dw])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_a_weight_in_nchw_gives_the_same_bits(dtype):
    source, conv = convolution("norm", dtype, 3, 2, 32, 64, 9, 7)
    made = []
    for weight in (conv.weight, conv.weight.contiguous()):
        given = conv._replace(weight=weight)
        (pending,), act, mask = PASSES.convolve(source, [given], True)
        torch.manual_seed(1)
        output = ConvOutput(
            torch.randn_like(pending.y), *torch.randn(2, 64), *pending[:3], weight, conv.norm.gamma, True, conv.geometry, True
        )
        (dx, *_), (dw,) = PASSES.convolve_backward(source, act, mask, [output], None, True)
        assert dw.stride() == weight.stride()
        made.append((pending.y, dx, dw))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*made, strict=True))


@pytest.mark.parametrize(("window", "channels"), [(1, 32), (3, 32), (3, 16)])
def test_nan_and_infinity_are_handed_on_to_their_windows_alone(window, channels, dtype):
    source, conv = convolution("act", dtype, window, 2, channels, channels, 8, 8)
    source.x[0, 3, 2, 1], source.x[0, 4, 5, 7], source.x[1, 0, 0, 0] = torch.nan, torch.inf, torch.nan
    (pending,), *_ = PASSES.convolve(source, [conv], True)
    expected = torch.conv2d(source.x.double(), conv.weight.double(), padding=conv.geometry.padding)
    assert torch.equal(pending.y.isfinite(), expected.isfinite())
    assert torch.equal(pending.y.isnan(), expected.isnan())


def test_a_precision_that_the_user_lowered_is_onednns(dtype):
    source, conv = convolution("act", dtype, 3, 2, 32, 32, 8, 8)
    assert passes_cpu.runs_with_passes(source.x, conv.weight, conv.geometry)
    setting = torch.backends.mkldnn.conv
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        assert passes_cpu.runs_with_passes(source.x, conv.weight, conv.geometry) == (dtype != torch.float32)
    finally:
        setting.fp32_precision = before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (64, 32, 3, 3)}, r"weight: expected a tensor of x's dtype, \[K, 32, 1, 1\] or \[K, 32, 3, 3\] in channels_last"),
        ({"weight": (64, 32, 5, 5)}, r"weight: expected a tensor of x's dtype, \[K, 32, 1, 1\] or \[K, 32, 3, 3\]"),
        ({"weight": (48, 32, 1, 1)}, "weight: expected channels that are multiples of 32"),
        ({"x": torch.float16}, "x: expected float32 or bfloat16, got float16"),
        ({"x": torch.float64}, "x: expected"),
        ({"weight": torch.float16}, "weight: expected a tensor of x's dtype"),
        ({"scale": torch.ones(32)}, "bias"),
        ({"residual": (1, 32, 4, 4)}, "residual: expected None without a scale"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message, dtype):
    given = {"x": activation(dtype, 1, 32, 4, 4), "weight": torch.ones(64, 32, 1, 1, dtype=dtype)}
    for name, value in change.items():
        if isinstance(value, torch.dtype):
            value = given[name].to(value)
        elif isinstance(value, tuple):
            value = torch.ones(value, dtype=dtype) if name == "weight" else activation(dtype, *value)
        given[name] = value
    none = dict.fromkeys(("scale", "bias", "residual", "residual_scale", "residual_bias", "gamma", "beta"))
    with pytest.raises(RuntimeError, match=message):
        PASSES.operators.conv_forward(**(none | given), statistics=False, eps=1e-5)
