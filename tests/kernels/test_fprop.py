"""The Triton forward convolution against the reference: every kind of shape, prologue, residual and edge, and its heuristic's launches.

On a CPU by Triton's interpreter, with small tiles, but several in each direction. Two bounds:
- y: at most twice the error of PyTorch's own convolution of the same activation in the same dtype, both against float64;
- act and mask: those of `Reference.norm_add_act`, to a last bit of float32's arithmetic.
"""

import math
from dataclasses import replace

import pytest
import torch
from support.chains import DEVICE, relative_error
from support.convolutions import (
    DTYPES,
    PROBLEMS,
    REFERENCE,
    SMALL,
    SOURCES,
    activation,
    geometry_of,
    network_problems,
    planted,
    source_of,
    weight_of,
)
from support.passes import agree
from support.rule import floor

from fused_resnet.kernels import fprop as module
from fused_resnet.kernels.batch_stats import merge_moments
from fused_resnet.kernels.fprop import fprop
from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import Configuration
from fused_resnet.tuning.gpu import MULTIPROCESSORS
from fused_resnet.tuning.heuristic_fprop import configuration
from fused_resnet.values import Source

pytestmark = pytest.mark.usefixtures("poisoned")


def check(y, act, weight, geometry):
    """The rule of tests/ops/test_operators.py."""
    truth = torch.conv2d(act.double(), weight.double(), None, *geometry)
    eager = relative_error(torch.conv2d(act, weight, None, *geometry), truth)
    error = relative_error(y, truth)
    assert error <= max(2 * eager, floor(y.dtype, y.numel())), f"error {error:.2e}, eager's {eager:.2e}"


def check_moments(y, moments):
    """Those of y as rounded, about means of their own."""
    counts, means, m2s = moments
    k = y.shape[1]
    assert counts.dtype == torch.int64 and counts.sum() == y.numel() // k
    expected = REFERENCE.batch_stats(y, None, None, 1e-3)
    agree(REFERENCE.merge_moments(counts, means, m2s, None, None, 1e-3), expected)
    agree(merge_moments(counts, means, m2s, None, None, 1e-3), expected)


def check_all(convolve, problem, kind, dtype, tiles=SMALL):
    """Every result of a convolution, against the reference."""
    source, weight, geometry = source_of(kind, problem, dtype), weight_of(problem, dtype), geometry_of(problem)
    writes = source.pending and problem.pointwise
    y, act, mask, moments = convolve(source, weight, geometry, writes, writes and source.residual is not None, tiles, False)
    assert y.shape == (problem.n, problem.k, problem.p, problem.q) and y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected_act, expected_mask = activation(source)
    check(y, expected_act, weight, geometry)
    check_moments(y, moments)
    agree((act, mask), (expected_act if writes else None, expected_mask if writes and source.residual is not None else None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_the_reference(name, kind, dtype):
    check_all(fprop, PROBLEMS[name], kind, dtype)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("tiles", [(32, 16, 32), (16, 64, 16), (64, 32, 64)], ids=str)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2", "stem"])
def test_agrees_with_any_tiles(name, tiles, kind):
    check_all(fprop, PROBLEMS[name], kind, torch.float32, Configuration(*tiles, warps=4, stages=2))


def test_the_problems_have_several_tiles_and_edges_in_each_direction():
    rows = [p.n * p.p * p.q for p in PROBLEMS.values()]
    assert sum(m > 16 for m in rows) > 8 and sum(m % 16 > 0 for m in rows) > 8
    assert sum(p.k > 16 and p.k % 16 > 0 for p in PROBLEMS.values()) > 5
    assert sum(p.c > 16 and p.c % 16 > 0 for p in PROBLEMS.values()) > 4


@pytest.mark.parametrize("name", ["3x3", "stem of pairs"])
def test_any_strides_of_the_weight(name):
    problem = PROBLEMS[name]
    source, weight = source_of("materialised", problem, torch.float32), weight_of(problem, torch.float32)
    strided = torch.empty(*weight.shape, 2, device=DEVICE)[..., 1].copy_(weight)
    for other in (weight.contiguous(), strided, weight.flip(2).flip(2).transpose(2, 3).contiguous().transpose(2, 3)):
        assert other.stride() != weight.stride()
        ours, expected = (fprop(source, w, geometry_of(problem), False, False, SMALL, False)[0] for w in (other, weight))
        assert torch.equal(ours, expected)


def test_statistics_survive_a_mean_far_above_the_deviation():
    """As tests/backends/test_passes.py: E[y²] − E[y]² can't meet this bound."""
    problem = ConvProblem(2, 16, 6, 7, 16, 1, 1)
    x = (torch.randn(2, 16, 6, 7, device=DEVICE) + 100.0).contiguous(memory_format=torch.channels_last)
    weight = torch.eye(16, device=DEVICE)[:, :, None, None]
    y, _, _, moments = fprop(Source(x), weight, geometry_of(problem), False, False, SMALL, False)
    assert torch.equal(y, x)
    exact = torch.var(y.double(), (0, 2, 3), correction=0)
    var = REFERENCE.merge_moments(*moments, None, None, 1e-5)[2]
    assert ((var - exact).abs() / exact).max() < 1e-5
    naive = (y * y).mean((0, 2, 3)) - y.mean((0, 2, 3)) ** 2
    assert ((naive - exact).abs() / exact).max() > 1e-5


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter: as asked for
def test_nan_comes_out_where_the_reference_has_it():
    problem = PROBLEMS["3x3"]
    source, weight, geometry = source_of("norm", problem, torch.float32), weight_of(problem, torch.float32), geometry_of(problem)
    source.x[1, 3, 2, 2] = math.nan
    y, _, _, (_, means, _) = fprop(source, weight, geometry, False, False, SMALL, False)
    assert torch.equal(y.isnan(), torch.conv2d(activation(source)[0], weight, None, *geometry).isnan())
    assert means.isnan().any() and not means.isnan().all()


#: What is wrong, in the kernel's own words, and what is written instead; and a case that must see it. No fault reads outside a tensor.
FAULTS = {
    "padding passes through the prologue": (" bias = bias * kept", " pass", "3x3", "norm"),
    "rows past the last count": ("None if WHOLE_TILES else valid_row", "None", "1x1", "norm"),
    "statistics before rounding": ("tile_moments(y.to(tl.float32)", "tile_moments(acc", "1x1", "norm"),
    "a residual's own affine is forgotten": ("residual_scale = vector(residual_scale_ptr, c, inside)", "pass", "1x1", "raw residual"),
    "taps are transposed": ("r * weight_r + s * weight_s", "s * weight_r + r * weight_s", "3x3", "materialised"),
    "the lead shifts the channels": ("rows[:, :, lead : lead + s * c]", "rows[:, :, : s * c]", "stem of pairs", "materialised"),
    "the mask begins above zero": ("passes_gradient(z) & valid", "(z > 0.1) & valid", "1x1", "residual"),
}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a fault may read what is not there")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, tmp_path):
    right, wrong, name, kind = FAULTS[fault]
    faulty = planted(module, right, wrong, tmp_path)
    dtype = torch.float16  # what it rounds, and a pair of its elements, is seen too
    with pytest.raises(AssertionError):
        check_all(faulty.fprop, PROBLEMS[name], kind, dtype)


@pytest.mark.parametrize(
    "problem, kind, write_act, save_mask, tiles, names",
    [
        (replace(PROBLEMS["3x3"], groups=2), "norm", False, False, SMALL, "geometry: expected groups = 1"),
        (PROBLEMS["3x3"], "norm", True, False, SMALL, "write_act: expected False"),
        (PROBLEMS["projection"], "norm", True, False, SMALL, "write_act: expected False"),
        (PROBLEMS["1x1 with padding"], "norm", True, False, SMALL, "write_act: expected False"),
        (PROBLEMS["1x1"], "materialised", True, False, SMALL, "write_act: expected False"),
        (PROBLEMS["1x1"], "residual", False, True, SMALL, "save_mask: expected False"),
        (PROBLEMS["1x1"], "norm", False, False, replace(SMALL, splits=2), "configuration: expected splits = 1"),
        (ConvProblem(2, 2**28, 2, 2, 1, 2, 2), "meta", False, False, SMALL, "source: expected fewer than"),
    ],
)
def test_what_it_can_not_do_is_named(problem, kind, write_act, save_mask, tiles, names):
    if kind == "meta":
        source = Source(torch.empty(problem.n, problem.c, problem.h, problem.w, device="meta", memory_format=torch.channels_last))
        weight = torch.empty(problem.k, problem.c, problem.r, problem.s, device="meta")
    else:
        source, weight = source_of(kind, problem, torch.float32), weight_of(problem, torch.float32)
    with pytest.raises(ValueError, match=names):
        fprop(source, weight, geometry_of(problem), write_act, save_mask, tiles, False)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 3])
def test_offsets_past_two_to_the_31(window):
    """A tensor of 2³¹ + elements: its last image is what it is by itself."""
    n = 2**31 // (64 * 112 * 112) + 2
    x = torch.randn(n, 64, 112, 112, device=DEVICE, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    scale, bias = torch.rand(64, device=DEVICE) + 0.5, torch.randn(64, device=DEVICE)
    problem = ConvProblem(n, 64, 112, 112, 64, window, window, padding=(window // 2,) * 2)
    weight = weight_of(problem, torch.float16)
    for prologue in (False, True):
        tiles = configuration(problem, 2, torch.cuda.get_device_capability(), prologue)
        norm = (scale, scale, scale, bias) if prologue else ()
        whole, tail = (fprop(Source(t, *norm), weight, geometry_of(problem), False, False, tiles, False)[0] for t in (x, x[-1:]))
        assert torch.equal(whole[-1:], tail)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_heuristic_fills_the_gpu(itemsize, capability):
    for problem in network_problems():
        for prologue in (False, True):
            tiles = configuration(problem, itemsize, capability, prologue)
            assert tiles.splits == 1 and tiles.block_m >= 64
            programs = math.ceil(problem.n * problem.p * problem.q / tiles.block_m) * math.ceil(problem.k / tiles.block_n)
            smallest = tiles.block_m == 64 and tiles.block_n <= 64
            assert smallest or programs >= 2 * MULTIPROCESSORS[min(capability[0], 9)], (problem, tiles)
