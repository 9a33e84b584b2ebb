"""The gradient of a convolution's input in Triton: every kind of shape, what is applied on load, what is added, masked and summed on store.

On a CPU by Triton's interpreter, with small tiles, but several in each direction. The bounds:
- dx: at most twice the error of PyTorch's convolution with the reference's passes around it in the same dtype, both against float64;
- its sums: those of dx as it was rounded, to float32's arithmetic; dy: the reference's, to a last bit.
"""

from dataclasses import replace

import pytest
import torch
from support.chains import DEVICE, relative_error
from support.convolutions import (
    ADDED,
    DTYPES,
    PROBLEMS,
    REFERENCE,
    SMALL,
    SOURCES,
    STRIDED,
    Backward,
    geometry_of,
    network_problems,
    planted,
    weight_of,
)
from support.passes import agree
from support.rule import floor

from fused_resnet.kernels import dgrad as module
from fused_resnet.kernels.dgrad import dgrad
from fused_resnet.policy import pays_to_apply_norm
from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import Configuration
from fused_resnet.tuning.gpu import MULTIPROCESSORS
from fused_resnet.tuning.heuristic_dgrad import configuration
from fused_resnet.values import ConvOutput, Source

pytestmark = pytest.mark.usefixtures("poisoned")

ALL = PROBLEMS | STRIDED
#: How a convolution of a dy that exists is launched.
ALONE = dict(apply_norm=False, write_dy=False, configuration=SMALL, allow_tf32=False)


def check(run, case: Backward, tiles: Configuration = SMALL):
    """Every result of a convolution's backward, against the reference."""
    in_prologue = case.problem.pointwise
    expected_dy = REFERENCE._dy(case.output)
    output = case.output if in_prologue else case.output._replace(dz=expected_dy)
    dx, s1, s2, residual_s2, dy = run(
        output,
        case.source,
        case.mask,
        case.dact,
        case.compact,
        case.stride,
        apply_norm=in_prologue,
        write_dy=in_prologue,
        configuration=tiles,
        allow_tf32=False,
    )
    agree((dy,), (expected_dy if in_prologue else None,))
    dy = expected_dy if dy is None else dy
    assert dx.shape == case.source.x.shape and dx.dtype == case.dtype
    assert dx.is_contiguous(memory_format=torch.channels_last)
    truth = case.truth(dy)
    eager, error = relative_error(case.eager(dy), truth), relative_error(dx, truth)
    assert error <= max(2 * eager, floor(case.dtype, dx.numel())), f"error {error:.2e}, eager's {eager:.2e}"
    source = case.source
    if not source.pending:
        assert (s1, s2, residual_s2) == (None, None, None)
        return
    agree_sums(dx, (s1, s2, residual_s2), REFERENCE._reduced(dx, source)[1:])


def agree_sums(dx, found, expected):
    """Equal to the rounding of float32 sums: of the sum of what is summed, since it cancels."""
    scale = dx.double().abs().sum((0, 2, 3)).max().clamp_min(1e-30)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == torch.float32
            assert ((ours.double() - theirs.double()).abs() / scale).max() < 1e-5


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_reference(name, kind):
    check(dgrad, Backward(ALL[name], kind, torch.float16))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float16], ids=str)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2", "projection", "stem"])
def test_agrees_with_the_reference_in_other_dtypes(name, dtype):
    check(dgrad, Backward(ALL[name], "raw residual", dtype))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2", "projection"])
def test_adds_the_gradients_of_other_readers(name, added, kind):
    check(dgrad, Backward(ALL[name], kind, torch.float16, added))


@pytest.mark.parametrize("training, affine", [(True, False), (False, True), (False, False)])
def test_norms_without_parameters_or_by_running_statistics(training, affine):
    check(dgrad, Backward(ALL["1x1"], "norm", torch.float32, training=training, affine=affine))


@pytest.mark.parametrize("tiles", [(32, 16, 32), (16, 64, 16), (64, 32, 64)], ids=str)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2", "stem"])
def test_agrees_with_any_tiles(name, tiles):
    check(dgrad, Backward(ALL[name], "raw residual", torch.float32, "both"), Configuration(*tiles, warps=4, stages=2))


def test_a_pixel_that_no_window_reads_gets_what_is_added():
    """Three of four pixels of a strided 1x1: their group has no tap."""
    case = Backward(ALL["projection"], "materialised", torch.float32, "dact")
    dx, *_ = dgrad(case.output, case.source, None, case.dact, None, 0, **ALONE)
    assert torch.equal(dx[:, :, 1::2], case.dact[:, :, 1::2]) and torch.equal(dx[:, :, :, 1::2], case.dact[:, :, :, 1::2])
    assert not torch.equal(dx[:, :, ::2, ::2], case.dact[:, :, ::2, ::2])


@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2"])
def test_any_strides_of_the_weight(name):
    case = Backward(ALL[name], "materialised", torch.float32)
    weight = case.output.weight
    strided = torch.empty(*weight.shape, 2, device=DEVICE)[..., 1].copy_(weight)
    expected, *others = (
        dgrad(case.output._replace(weight=w), case.source, None, None, None, 0, **ALONE)[0] for w in (weight, weight.contiguous(), strided)
    )
    assert all(torch.equal(expected, other) for other in others)


def test_the_same_bits_each_time():
    case = Backward(ALL["1x1"], "raw residual", torch.float16, "dact")
    runs = [
        dgrad(case.output, case.source, case.mask, case.dact, None, 0, **ALONE | dict(apply_norm=True, write_dy=True)) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


#: What is wrong, in the kernel's own words, and what is written instead; and a case that must see it. No fault reads outside a tensor.
FAULTS = {
    "the mean of dz stays": ("batch_norm_backward(a.to(tl.float32), y, mean, invstd, gamma, s1, s2,",
                             "batch_norm_backward(a.to(tl.float32), y, mean, invstd, gamma, s1 * 0, s2,", "1x1", "norm", "nothing"),
    "gamma is forgotten": ("s1_ptr is not None:", "s1_ptr is not None:\n                gamma = None", "1x1", "materialised", "nothing"),
    "sums before rounding": ("dz = dx.to(tl.float32)", "dz = acc * 1.001", "1x1", "norm", "nothing"),
    "padding reads its neighbour": ("(p >= 0) & (p < P) & (q >= 0) & (q < Q)", "(p >= 0) & (p < P) & (q < Q) & (q > -2)", "3x3",
                                    "materialised", "nothing"),
    "taps are transposed": ("r * weight_r + s * weight_s", "s * weight_r + r * weight_s", "3x3", "materialised", "nothing"),
    "a mask that is not asked": ("acc = tl.where(keep & valid, acc, 0.0)", "acc = tl.where(valid, acc, 0.0)", "1x1", "residual", "nothing"),
    "compact everywhere": ("there = valid & ((h % COMPACT == 0) & (w % COMPACT == 0))[:, None]", "there = valid", "1x1", "norm", "compact"),
    "a residual's own mean is forgotten": ("(residual - vector(residual_mean_ptr, channels, channels < C))", "residual", "1x1",
                                           "raw residual", "nothing"),
    "parities change places": ("first_r = first_tap(parity_h, R", "first_r = first_tap(parity_w, R", "3x3 stride 2", "norm", "nothing"),
    "the first row of a parity, right at stride 2": ("parity_h + PADDING_H * (STRIDE_H - 1)", "parity_h + PADDING_H", "3x3 stride 3", "norm",
                                                     "nothing"),
    "the first column of a parity, right at stride 2": ("parity_w + PADDING_W * (STRIDE_W - 1)", "parity_w + PADDING_W", "3x3 stride 3",
                                                        "materialised", "nothing"),
}  # fmt: skip


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a fault may read what is not there")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, tmp_path):
    right, wrong, name, kind, added = FAULTS[fault]
    faulty = planted(module, right, wrong, tmp_path)
    with pytest.raises(AssertionError):
        check(faulty.dgrad, Backward(ALL[name], kind, torch.float16, added))


@pytest.mark.parametrize(
    "problem, apply_norm, write_dy, tiles, names",
    [
        (replace(PROBLEMS["3x3"], groups=2), False, False, SMALL, "output.geometry: expected groups = 1"),
        (PROBLEMS["3x3"], True, False, SMALL, "apply_norm: expected False"),
        (PROBLEMS["projection"], True, False, SMALL, "apply_norm: expected False"),
        (PROBLEMS["1x1"], False, True, SMALL, "write_dy: expected False"),
        (PROBLEMS["1x1"], False, False, replace(SMALL, splits=2), "configuration: expected splits = 1"),
    ],
)
def test_what_it_can_not_do_is_named(problem, apply_norm, write_dy, tiles, names):
    case = Backward(problem, "materialised", torch.float32)
    with pytest.raises(ValueError, match=names):
        dgrad(case.output, case.source, None, None, None, 0, **ALONE | dict(apply_norm=apply_norm, write_dy=write_dy, configuration=tiles))


def test_too_many_pixels_for_a_tile_are_named():
    problem = ConvProblem(2, 2**28, 2, 2, 1, 2, 2)
    meta = {"device": "meta"}
    x = torch.empty(2, 2**28, 2, 2, **meta, memory_format=torch.channels_last)
    dz = torch.empty(2, 1, 1, 1, **meta, memory_format=torch.channels_last)
    vector = torch.empty(1, **meta)
    weight = torch.empty(1, 2**28, 2, 2, **meta)
    output = ConvOutput(dz, vector, vector, dz, vector, vector, weight, vector, True, geometry_of(problem), True)
    with pytest.raises(ValueError, match="source: expected fewer than"):
        dgrad(output, Source(x), None, None, None, 0, **ALONE)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 3])
def test_offsets_past_two_to_the_31(window):
    """A tensor of 2³¹ + elements: its last image is what it is by itself."""
    n = 2**31 // (64 * 112 * 112) + 2
    problem = ConvProblem(n, 64, 112, 112, 64, window, window, padding=(window // 2,) * 2)
    dz = torch.randn(n, 64, 112, 112, device=DEVICE, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    weight, tiles = weight_of(problem, torch.float16), configuration(problem, 2, torch.cuda.get_device_capability())
    whole, tail = (
        dgrad(ConvOutput(t, None, None, None, None, None, weight, None, True, geometry_of(problem), True), Source(t), None, None,
              None, 0, **ALONE | dict(configuration=tiles))[0]
        for t in (dz, dz[-1:])
    )  # fmt: skip
    assert torch.equal(whole[-1:], tail)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_heuristic_fills_the_gpu(itemsize, capability):
    for problem in dict.fromkeys(network_problems((32, 256, 1024))):
        tiles = configuration(problem, itemsize, capability)
        assert tiles.splits == 1
        programs = -(-problem.n * problem.h * problem.w // tiles.block_m) * -(-problem.c // tiles.block_n)
        enough = programs >= 2 * MULTIPROCESSORS[min(capability[0], 9)]
        assert enough or tiles.block_n <= 64 or pays_to_apply_norm(problem), (problem, tiles)
