"""The gradient of a convolution's weight in Triton: every kind of shape, the activation made on load, splits, any strides.

On a CPU by Triton's interpreter, with small tiles, but several in each direction. dw is at most twice as far from float64's as
PyTorch's own of the same activation in the same dtype.
"""

from dataclasses import replace

import pytest
import torch
from support.chains import DEVICE, relative_error
from support.convolutions import (
    DTYPES,
    PROBLEMS,
    SMALL,
    STRIDED,
    activation,
    geometry_of,
    network_problems,
    nhwc,
    planted,
    source_of,
    weight_of,
)
from support.rule import floor

from fused_resnet.kernels import wgrad as module
from fused_resnet.kernels.wgrad import wgrad
from fused_resnet.problem import ConvProblem
from fused_resnet.reference import convolution_backward
from fused_resnet.tuning import Configuration, Task, heuristics
from fused_resnet.tuning.gpu import MULTIPROCESSORS
from fused_resnet.tuning.heuristic_wgrad import LEAST_STEPS, configuration, m_tiles
from fused_resnet.values import ConvOutput, Source

pytestmark = pytest.mark.usefixtures("poisoned")

SOURCES = ("materialised", "norm")
ALL = PROBLEMS | STRIDED
SPLIT = replace(SMALL, splits=3)


def expected(source: Source, dy, weight, geometry, dtype) -> torch.Tensor:
    """PyTorch's dw in `dtype`, of the activation as rounded."""
    act, _ = activation(source)
    output = ConvOutput(None, None, None, None, None, None, weight.to(dtype), None, True, geometry, True)
    return convolution_backward(act.to(dtype), dy.to(dtype), output, False, True)[1]


def check(run, problem: ConvProblem, kind: str, dtype: torch.dtype, tiles: Configuration = SMALL):
    source, weight, geometry = source_of(kind, problem, dtype), weight_of(problem, dtype), geometry_of(problem)
    dy = nhwc(problem.n, problem.k, problem.p, problem.q, dtype=dtype, offset=0.2)
    dw = run(source, dy, weight, geometry, tiles, False)
    assert dw.shape == weight.shape and dw.stride() == weight.stride() and dw.dtype == dtype
    truth = expected(source, dy, weight, geometry, torch.float64)
    error, eager = (relative_error(found, truth) for found in (dw, expected(source, dy, weight, geometry, dtype)))
    assert error <= max(2 * eager, floor(dtype, dw.numel())), f"error {error:.2e}, eager's {eager:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_reference(name, kind, dtype):
    check(wgrad, ALL[name], kind, dtype)


@pytest.mark.parametrize("splits", [2, 3, 7, 100])
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2", "stem"])
def test_splits_over_pixels(name, splits):
    """More splits than there are steps: none of them is empty."""
    check(wgrad, ALL[name], "norm", torch.float16, replace(SMALL, splits=splits))


@pytest.mark.parametrize("tiles", [(32, 16, 32), (16, 64, 16), (64, 32, 64)], ids=str)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2", "stem"])
def test_agrees_with_any_tiles(name, tiles):
    check(wgrad, ALL[name], "norm", torch.float32, Configuration(*tiles, warps=4, stages=2, splits=2))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", ["1x1", "3x3", "stem"])
def test_any_strides_of_the_weight(name, splits):
    problem = ALL[name]
    source, weight, geometry = source_of("materialised", problem, torch.float32), weight_of(problem, torch.float32), geometry_of(problem)
    dy = nhwc(problem.n, problem.k, problem.p, problem.q, dtype=torch.float32)
    gapped = torch.empty(*weight.shape, 2, device=DEVICE)[..., 1].copy_(weight)
    tiles = replace(SMALL, splits=splits)
    first = wgrad(source, dy, weight, geometry, tiles, False)
    for other in (weight.contiguous(), gapped, weight.transpose(2, 3).contiguous().transpose(2, 3)):
        dw = wgrad(source, dy, other, geometry, tiles, False)
        assert torch.equal(dw, first)
        assert dw.stride() == torch.empty_like(other).stride()  # its own, but without gaps


def test_the_same_bits_each_time():
    problem = ALL["3x3"]
    source, weight = source_of("norm", problem, torch.float16), weight_of(problem, torch.float16)
    dy = nhwc(problem.n, problem.k, problem.p, problem.q, dtype=torch.float16)
    first, second = (wgrad(source, dy, weight, geometry_of(problem), SPLIT, False) for _ in range(2))
    assert torch.equal(first, second)


#: What is wrong, in the kernel's own words, and what is written instead; and a case that must see it. No fault reads outside a tensor.
FAULTS = {
    "padding passes through the prologue": ("valid_row = valid_row & on_image", "pass", "3x3", "norm", SMALL),
    "no ReLU": ("relu(tl.fma(a.to(tl.float32), scale, bias))", "tl.fma(a.to(tl.float32), scale, bias)", "1x1", "norm", SMALL),
    "taps are transposed": ("r * out_r + s * out_s", "s * out_r + r * out_s", "3x3", "materialised", SMALL),
    "the last split is lost": ("(split < splits)[:, None]", "(split < splits - 1)[:, None]", "1x1", "norm", SPLIT),
    "the last of few channels is lost": ("inside = element < R * S * FLAT_C", "inside = element < R * S * FLAT_C - 1", "stem", "materialised",
                                         SMALL),
}  # fmt: skip


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a fault may read what is not there")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, tmp_path):
    right, wrong, name, kind, tiles = FAULTS[fault]
    faulty = planted(module, right, wrong, tmp_path)
    with pytest.raises(AssertionError):
        check(faulty.wgrad, ALL[name], kind, torch.float16, tiles)


@pytest.mark.parametrize(
    "problem, kind, names",
    [
        (replace(PROBLEMS["3x3"], groups=2), "norm", "geometry: expected groups = 1"),
        (PROBLEMS["1x1"], "residual", "source: expected no residual"),
        (ConvProblem(2, 2**28, 2, 2, 1, 2, 2), "meta", "source: expected fewer than"),
    ],
)
def test_what_it_can_not_do_is_named(problem, kind, names):
    if kind == "meta":
        source = Source(torch.empty(problem.n, problem.c, problem.h, problem.w, device="meta", memory_format=torch.channels_last))
        weight, dy = (torch.empty(shape, device="meta") for shape in ((1, problem.c, 2, 2), (problem.n, 1, 1, 1)))
    else:
        source, weight = source_of(kind, problem, torch.float32), weight_of(problem, torch.float32)
        dy = nhwc(problem.n, problem.k, problem.p, problem.q, dtype=torch.float32)
    with pytest.raises(ValueError, match=names):
        wgrad(source, dy, weight, geometry_of(problem), SMALL, False)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 3])
def test_offsets_past_two_to_the_31(window):
    """Of a tensor of 2³¹ + elements only the last image has a gradient: dw is that of this image."""
    n = 2**31 // (64 * 112 * 112) + 2
    problem = ConvProblem(n, 64, 112, 112, 64, window, window, padding=(window // 2,) * 2)
    x = torch.randn(n, 64, 112, 112, device=DEVICE, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    dy = torch.zeros_like(x)
    dy[-1].normal_()
    weight, tiles = weight_of(problem, torch.float16), configuration(problem, 2, torch.cuda.get_device_capability(), False)
    whole, tail = (wgrad(Source(a), b, weight, geometry_of(problem), tiles, False) for a, b in ((x, dy), (x[-1:], dy[-1:])))
    torch.testing.assert_close(whole, tail, rtol=1e-3, atol=1e-3 * tail.abs().max().item())


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_heuristic_splits_as_far_as_it_pays(itemsize, capability):
    """Less than a third of the multiprocessors is idle while there are steps to share; the rest is what one more split may not be worth."""
    multiprocessors = MULTIPROCESSORS[min(capability[0], 9)]
    for problem in dict.fromkeys(network_problems((32, 256, 1024))):
        for prologue in (False, True):
            tiles = configuration(problem, itemsize, capability, prologue)
            steps = -(-problem.n * problem.p * problem.q // tiles.block_k)
            programs = m_tiles(problem, tiles.block_m) * -(-problem.k // tiles.block_n)
            assert tiles.splits == 1 or tiles.splits <= steps // LEAST_STEPS
            assert programs * (tiles.splits - 1) <= 4 * multiprocessors
            few = tiles.splits + 1 > steps // LEAST_STEPS
            assert few or programs * (tiles.splits + 1) > multiprocessors or programs * tiles.splits > 2 / 3 * multiprocessors, (
                problem,
                tiles,
            )


def test_the_tuner_always_tries_splits():
    task = Task("wgrad", ConvProblem(256, 512, 7, 7, 512, 3, 3, (1, 1), (1, 1)), "bfloat16", "norm")
    assert {2, 4, 8} <= {tiles.splits for tiles in heuristics.candidates(task, (9, 0))[:4]}
