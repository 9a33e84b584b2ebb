"""1x1 convolutions that run together with the passes around them: each against the same work apart, and products against float64."""

import pytest
import torch

from fused_resnet import native
from fused_resnet.backends import BACKENDS, passes_cpu
from fused_resnet.values import Conv, ConvGeometry, ConvOutput, Norm, Source

PASSES = BACKENDS["passes_cpu"]
GEOMETRY = ConvGeometry([1, 1], [0, 0], [1, 1], 1)
#: n, c, k, h, w: whole blocks of pixels and not, one part and several, dweight summed on the way and of the whole dy.
SHAPES = [(1, 32, 64, 56, 45), (3, 96, 32, 7, 5), (1, 32, 32, 1, 2), (2, 512, 128, 5, 5), (4, 64, 64, 33, 31)]
KINDS = ("act", "norm", "norm_add", "norm_add_raw")


@pytest.fixture(autouse=True, params=["portable", "best"])
def instruction_set(request, monkeypatch):
    """Plain loops, and the best that this machine has: AMX, or others' plain loops."""
    if reason := PASSES.declines(torch.device("cpu"), torch.bfloat16):
        pytest.skip(reason)
    before = native.cpu_instruction_set()
    monkeypatch.setattr(passes_cpu, "POINTWISE_SETS", native.INSTRUCTION_SETS)
    native.use_instruction_set("portable" if request.param == "portable" else None)
    yield
    native.use_instruction_set(before)


def activation(*shape):
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)


def norm_of(channels):
    return Norm(torch.rand(channels) + 0.5, torch.randn(channels), torch.zeros(channels), torch.ones(channels), True, 1e-5)


def source_of(kind, shape):
    x = activation(*shape) * 3 + 1
    if kind == "act":
        return Source(x)
    norm = norm_of(shape[1])
    mean, invstd, _, scale, bias = PASSES.batch_stats(x, norm.gamma, norm.beta, norm.eps)
    if kind == "norm":
        return Source(x, mean, invstd, scale, bias)
    residual = activation(*shape)
    if kind == "norm_add":
        return Source(x, mean, invstd, scale, bias, residual)
    other = norm_of(shape[1])
    r_mean, r_invstd, _, r_scale, r_bias = PASSES.batch_stats(residual, other.gamma, other.beta, other.eps)
    return Source(x, mean, invstd, scale, bias, residual, r_mean, r_invstd, r_scale, r_bias)


def convolution(kind, n, c, k, h, w):
    return source_of(kind, (n, c, h, w)), Conv((torch.randn(k, c, 1, 1) / c**0.5).bfloat16(), norm_of(k), GEOMETRY)


def apart(monkeypatch):
    monkeypatch.setattr(passes_cpu, "runs_with_passes", lambda *_: False)


def assert_as_near(ours, theirs, exact):
    """The project's rule: at most twice the error of the same work by PyTorch's convolution."""
    error, allowed = ((t.double() - exact).norm() for t in (ours, theirs))
    assert error <= 2 * allowed + 1e-6 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_that_of_the_passes_and_a_convolution(kind, shape, monkeypatch):
    source, conv = convolution(kind, *shape)
    (pending,), act, mask = PASSES.convolve(source, [conv], True)
    again = PASSES.convolution_again(source, conv, True)(Source(act))
    apart(monkeypatch)
    (expected,), expected_act, expected_mask = PASSES.convolve(source, [conv], True)
    assert torch.equal(act, expected_act)
    assert (mask is None) == (expected_mask is None) and (mask is None or torch.equal(mask, expected_mask))
    assert_as_near(pending.y, expected.y, torch.conv2d(act.double(), conv.weight.double()))
    assert torch.equal(again, pending.y)
    made = PASSES.batch_stats(pending.y, conv.norm.gamma, conv.norm.beta, conv.norm.eps)
    for ours, theirs in zip(pending[1:], made, strict=True):  # float32 sums of other parts of the pixels
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("summed", [False, True], ids=["one reader", "two readers"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_that_of_the_passes_and_a_convolution(kind, shape, summed, monkeypatch):
    source, conv = convolution(kind, *shape)
    (pending,), act, mask = PASSES.convolve(source, [conv], True)
    k = len(conv.weight)
    dz, dact = torch.randn_like(pending.y) + 0.3, torch.randn_like(act) if summed else None
    output = ConvOutput(dz, torch.randn(k), torch.randn(k), *pending[:3], conv.weight, conv.norm.gamma, True, GEOMETRY, True)
    wide = PASSES._dy(output).double()
    exact_dw = torch.nn.grad.conv2d_weight(act.double(), conv.weight.shape, wide)
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
        exact = torch.nn.grad.conv2d_input(act.shape, conv.weight.double(), wide) + (0 if dact is None else dact.double())
        if kind != "act":
            exact = torch.where(act > 0, exact, 0.0)
        assert_as_near(dx, expected, exact)
        for ours, theirs in zip(sums, expected_sums, strict=True):
            assert (ours is None) == (theirs is None)
        if kind != "act":
            made = PASSES.norm_backward_reduce(dx, None, source, mask, True)[1:]
            for ours, theirs in zip(sums, made, strict=True):
                assert ours is None or (ours - theirs).norm() <= 1e-5 * (theirs.norm() + dx.double().norm())


def test_any_number_of_threads_gives_the_same_bits():
    source, conv = convolution("norm", 4, 64, 128, 29, 29)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            (pending,), act, mask = PASSES.convolve(source, [conv], True)
            dz = torch.randn_like(pending.y)
            output = ConvOutput(dz, *torch.randn(2, 128), *pending[:3], conv.weight, conv.norm.gamma, True, GEOMETRY, True)
            (dx, s1, s2, _), (dw,) = PASSES.convolve_backward(source, act, mask, [output], None, True)
            results.append([*pending, act, dx, s1, s2, dw])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_nan_and_infinity_are_handed_on():
    source, conv = convolution("act", 1, 32, 64, 8, 8)
    source.x[0, 3, 2, 1], source.x[0, 4, 5, 5] = torch.nan, torch.inf
    (pending,), *_ = PASSES.convolve(source, [conv], True)
    assert pending.y[0, :, 2, 1].isnan().all() and not pending.y[0, :, 5, 5].isfinite().any()
    assert pending.y[0, :, 0, 0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(64, 32, 3, 3, dtype=torch.bfloat16)}, r"weight: expected a dense bfloat16 \[K, 32, 1, 1\]"),
        ({"weight": torch.ones(48, 32, 1, 1, dtype=torch.bfloat16)}, "weight: expected channels that are multiples of 32"),
        ({"weight": torch.ones(64, 32, 1, 1)}, "weight: expected a dense bfloat16"),
        ({"x": torch.ones(1, 32, 4, 4).contiguous(memory_format=torch.channels_last)}, "expected tensors of bfloat16"),
        ({"scale": torch.ones(32)}, "bias"),
        ({"residual": activation(1, 32, 4, 4)}, "residual: expected None without a scale"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    given = {"x": activation(1, 32, 4, 4), "weight": torch.ones(64, 32, 1, 1, dtype=torch.bfloat16)}
    given |= dict.fromkeys(("scale", "bias", "residual", "residual_scale", "residual_bias", "gamma", "beta"))
    with pytest.raises(RuntimeError, match=message):
        PASSES.operators.pointwise_forward(**(given | change), statistics=False, eps=1e-5)
