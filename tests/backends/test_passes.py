"""Every pass in both kernel languages against the reference, pass by pass: all options, odd shapes, NaN, reproducibility, precision.

CUDA C++ and Triton on a GPU; on a CPU the same CUDA C++ by the SIMT shim, and Triton by its interpreter.

The reference evaluates in float64 and rounds once. A pass may differ by the rounding of float32 arithmetic, which is a last bit of the
result's dtype here and there; memory that a kernel forgets to write holds NaN (`poisoned` in tests/conftest.py).
"""

import pytest
import torch
from support.chains import DEVICE, LANGUAGES
from support.passes import DTYPES, KINDS, OPTIONS, REFERENCE, Case, agree, nhwc

from fused_resnet.backends import BACKENDS
from fused_resnet.kernels import tiling
from fused_resnet.kernels.launch import multiprocessors
from fused_resnet.reference import unpack_mask
from fused_resnet.values import Source

pytestmark = pytest.mark.usefixtures("poisoned")

#: One tile; no vector load and a part of a mask's byte; several programs, steps and blocks of channels, and more rows than the CUDA
#: kernels give to one block; many channels, one pixel.
SHAPES = [(2, 24, 5, 7), (3, 13, 4, 3), (3, 72, 21, 19), (6, 264, 1, 1)]
CASES = [(name, s, d) for name in LANGUAGES for s in SHAPES for d in DTYPES if not BACKENDS[name].why_not(DEVICE, d)]


@pytest.fixture(params=CASES, ids=lambda p: f"{p[0]}-{'x'.join(map(str, p[1]))}-{p[2]}".replace("torch.", ""))
def case(request, seed):
    name, shape, dtype = request.param
    return Case(BACKENDS[name], shape, dtype)


@pytest.fixture(params=LANGUAGES)
def passes(request, seed):
    return BACKENDS[request.param]


@pytest.mark.parametrize("affine", [True, False])
def test_batch_stats(case, affine):
    arguments = (case.x, *((case.gamma, case.beta) if affine else (None, None)), 2e-3)  # not the usual one, which may be written somewhere
    agree(case.passes.batch_stats(*arguments), REFERENCE.batch_stats(*arguments))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter, where a block goes past the channels
@pytest.mark.parametrize("ratio", [100.0, 1000.0])
def test_statistics_survive_a_mean_far_above_the_deviation(passes, ratio):
    x = nhwc((4, 20, 19, 17), torch.float32, ratio)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    ours = passes.batch_stats(x, None, None, 0.0)
    assert ((ours[0] - mean).abs() / var.sqrt()).max() < 2 * torch.finfo(torch.float32).eps * ratio
    assert ((ours[2] - var).abs() / var).max() < 1e-5
    naive = (x * x).mean((0, 2, 3)) - x.mean((0, 2, 3)) ** 2  # the planted fault: this bound is one that it can't meet
    assert ((naive - var).abs() / var).max() > 1e-5


def test_more_rows_of_many_channels_are_one_part(passes):
    """Narrow slabs of so many channels fill a device, and the CUDA kernels then sum up to 4,096 rows without partial results."""
    case = Case(passes, (5, 136, 15, 16), torch.float16)
    arguments = (case.x, case.gamma, case.beta, 1e-5)
    agree(passes.batch_stats(*arguments), REFERENCE.batch_stats(*arguments))
    arguments = (case.d, case.dact, case.source("raw"), None, False)
    agree(passes.norm_backward_reduce(*arguments), REFERENCE.norm_backward_reduce(*arguments))


@pytest.mark.parametrize("parts", [1, 3, 41])
def test_moments_of_parts_merge_into_those_of_the_whole(case, parts):
    """As devices that share a batch merge theirs: the counts differ, and the parts' means lie apart."""
    case.x += torch.linspace(0, 3, case.shape[3], device=DEVICE).to(case.dtype)
    columns = case.x.permute(0, 2, 3, 1).reshape(-1, case.shape[1]).tensor_split(min(parts, len(case.x) * case.shape[2]))
    pieces = [c.T.reshape(1, case.shape[1], -1, 1).contiguous(memory_format=torch.channels_last) for c in columns if len(c)]
    ours = [case.passes.batch_moments(piece) for piece in pieces]
    for piece, moments in zip(pieces, ours, strict=True):
        agree(moments, REFERENCE.batch_moments(piece))
    means, m2s = (torch.stack(t) for t in zip(*ours, strict=True))
    counts = torch.tensor([len(c) for c in columns if len(c)], device=DEVICE)
    merged = case.passes.merge_moments(counts, means, m2s, case.gamma, case.beta, 2e-3)
    agree(merged, REFERENCE.merge_moments(counts, means, m2s, case.gamma, case.beta, 2e-3))
    agree(merged, REFERENCE.batch_stats(case.x, case.gamma, case.beta, 2e-3))


@pytest.mark.parametrize("kind, relu, save_mask", [(k, *o) for k in KINDS for o in OPTIONS if k != "none" or o != (True, True)])
def test_norm_add_act(case, kind, relu, save_mask):
    arguments = (case.source(kind), relu, save_mask)
    ours, expected = case.passes.norm_add_act(*arguments), REFERENCE.norm_add_act(*arguments)
    agree(ours, expected, flips=1e-3)
    if save_mask:  # bits past the last channel are zero
        assert ours[1].shape[-1] == -(-case.shape[1] // 8)
        assert not unpack_mask(ours[1], 8 * ours[1].shape[-1])[:, case.shape[1] :].any()


@pytest.mark.parametrize("with_dact", [False, True])
@pytest.mark.parametrize("kind, relu", [("none", True), ("materialised", True), ("raw", True), ("none", False), ("raw", False)])
def test_norm_backward_reduce(case, kind, relu, with_dact):
    mask = None
    if relu and kind != "none":
        mask = REFERENCE.norm_add_act(case.source(kind), True, True)[1]
    dact = case.dact if with_dact else None
    arguments = (case.d, dact, case.source(kind), mask, relu)
    agree(case.passes.norm_backward_reduce(*arguments), REFERENCE.norm_backward_reduce(*arguments))


@pytest.mark.parametrize("affine", [True, False])
def test_norm_backward_apply(case, affine):
    dz, s1, s2, _ = REFERENCE.norm_backward_reduce(case.d, None, case.source(), None, relu=False)
    arguments = (dz, case.x, case.mean, case.invstd, case.gamma if affine else None, s1, s2)
    agree([case.passes.norm_backward_apply(*arguments)], [REFERENCE.norm_backward_apply(*arguments)])


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 1), (1, 1, 0)], ids=str)
def test_norm_act_max_pool(case, window):
    size, _, padding = window
    if min(case.shape[2:]) + 2 * padding < size:
        case = Case(case.passes, (2, 11, 3, 4), case.dtype)
    forward = (case.source(), *window)
    out, index = REFERENCE.norm_act_max_pool(*forward)
    agree(case.passes.norm_act_max_pool(*forward), (out, index), flips=2e-3)
    backward = (nhwc(out.shape, case.dtype, 0.5), index, case.source(), *window)
    agree(case.passes.norm_act_max_pool_backward(*backward), REFERENCE.norm_act_max_pool_backward(*backward))


@pytest.mark.parametrize("kind", ["none", "materialised", "raw"])
def test_norm_add_act_avg_pool(case, kind):
    forward = (case.source(kind),)
    out, mask = REFERENCE.norm_add_act_avg_pool(*forward)
    agree(case.passes.norm_add_act_avg_pool(*forward), (out, mask), flips=1e-3)
    backward = (nhwc(out.shape, case.dtype, 0.5), case.source(kind), mask)
    agree(case.passes.norm_add_act_avg_pool_backward(*backward), REFERENCE.norm_add_act_avg_pool_backward(*backward))


def test_equal_activations_give_the_gradient_to_the_first(passes):
    x = torch.ones(1, 3, 5, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    index = passes.norm_act_max_pool(Source(x, scale=ones, bias=zeros), 3, 2, 1)[1]
    assert index.cpu()[0, 0].tolist() == [[4, 3, 3], [1, 0, 0], [1, 0, 0]]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter: as asked for
def test_what_is_not_finite_is_not_hidden(passes):
    """NaN and infinities come out where the reference has them: GradScaler relies on it. One test: each backend meets each in `make test`, too."""
    for value in (float("nan"), float("inf"), float("-inf")):
        case = Case(passes, (2, 10, 6, 5), torch.float32)
        case.x[1, 3] = value  # so many that they are more than `flips`
        for kind in KINDS:
            arguments = (case.source(kind), True, kind != "none")
            agree(passes.norm_add_act(*arguments), REFERENCE.norm_add_act(*arguments), flips=1e-2)
            arguments = arguments[:-2]
            agree(passes.norm_add_act_avg_pool(*arguments), REFERENCE.norm_add_act_avg_pool(*arguments), flips=1e-2)
        arguments = (case.source(), 3, 2, 1)
        agree(passes.norm_act_max_pool(*arguments), REFERENCE.norm_act_max_pool(*arguments), flips=1e-2)
        ours = passes.batch_stats(case.x, None, None, 1e-5)
        assert not any(statistic[3].isfinite() for statistic in ours[:2] if not statistic[3] == 0)
        assert all(statistic[[0, 1, 2, 4]].isfinite().all() for statistic in ours)
        case.d[0, 5, 1, 1] = value
        arguments = (case.d, None, case.source(x=case.x.nan_to_num(0, 0, 0)), None, False)
        agree(passes.norm_backward_reduce(*arguments), REFERENCE.norm_backward_reduce(*arguments))


def test_the_same_input_gives_the_same_bits(passes):
    case = Case(passes, (5, 40, 23, 17), torch.float16)
    tile = tiling.reduction(5 * 23 * 17, 40, 2, multiprocessors(DEVICE), loads=1)
    assert tile.row_programs > 1  # there is something to merge
    for _ in range(2):
        first, second = (passes.batch_stats(case.x, case.gamma, case.beta, 1e-5) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        arguments = (case.d, case.dact, case.source(), None, True)
        first, second = (passes.norm_backward_reduce(*arguments)[:3] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31(passes):
    """A tensor of 2³¹ + elements: its last rows are what the same rows are by themselves."""
    n = 2**31 // (64 * 112 * 112) + 2
    x = torch.randn(n, 64, 112, 112, device=DEVICE, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    scale, bias = torch.rand(64, device=DEVICE) + 0.5, torch.randn(64, device=DEVICE)
    source, last = (Source(t, scale=scale, bias=bias, residual=t) for t in (x, x[-1:]))
    act, mask = passes.norm_add_act(source, True, True)
    tail, tail_mask = passes.norm_add_act(last, True, True)
    assert torch.equal(act[-1:], tail) and torch.equal(mask[-1:], tail_mask)
    del act, mask
    out, index = passes.norm_act_max_pool(source, 3, 2, 1)
    tail, tail_index = passes.norm_act_max_pool(last, 3, 2, 1)
    assert torch.equal(out[-1:], tail) and torch.equal(index[-1:], tail_index)
    x[:-1] = 0
    mean = passes.batch_stats(x, None, None, 1e-5)[0]
    torch.testing.assert_close(mean, x[-1].float().mean((1, 2)) / n, rtol=1e-4, atol=1e-9)


def test_many_partial_results_are_merged_in_two_stages():
    """More than one program's eight steps: 2,500 tiles of a convolution, whose sums and moments are those of all."""
    pytest.importorskip("triton")
    from fused_resnet.kernels.batch_stats import merge_moments
    from fused_resnet.kernels.norm_backward import PartialSums

    sums = PartialSums(2500, 10, DEVICE, raw_residual=True)
    assert tiling.finalisation(2500, 10).row_programs == 2
    sums.partial.normal_(mean=1.0)
    for made, exact in zip(sums.finalise(), sums.partial.double().sum(1), strict=True):
        torch.testing.assert_close(made.double(), exact, rtol=1e-6, atol=0)
    counts = torch.randint(1, 9, (2500,), device=DEVICE)
    means, m2s = torch.randn(2500, 10, device=DEVICE) + 100, torch.rand(2500, 10, device=DEVICE)
    mean, _, var, *_ = merge_moments(counts, means, m2s, None, None, 1e-5)
    n, weights = counts.sum(), counts[:, None].double()
    exact = (weights * means.double()).sum(0) / n
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), (m2s.double() + weights * (means.double() - exact) ** 2).sum(0) / n, rtol=1e-5, atol=0)


class TestTiling:
    """The tilings cover the matrix, whatever its shape."""

    @pytest.mark.parametrize("channels", [1, 3, 64, 100, 2048])
    @pytest.mark.parametrize("rows", [1, 7, 49 * 256, 112 * 112 * 256])
    def test_every_row_and_channel_is_taken_once(self, rows, channels):
        tilings = [
            tiling.elementwise(rows, channels, 2),
            tiling.elementwise(rows, channels, 4, loads=1),
            *(tiling.reduction(rows, channels, 2, sms, loads=1) for sms in (1, 108, 132)),
        ]
        for tile in [*tilings, tiling.finalisation(rows % 1000 + 1, channels)]:
            assert tile.rows_per_program * tile.row_programs >= tile.rows
            assert tile.rows_per_program * (tile.row_programs - 1) < tile.rows  # so no program is without a row
            assert tile.block_channels * tile.channel_programs >= channels
            assert tile.block_rows & (tile.block_rows - 1) == 0 and tile.block_channels & (tile.block_channels - 1) == 0
            assert tile.block_channels % 8 == 0  # whole bytes of a mask
            assert tile.programs < 2**31

    @pytest.mark.parametrize("channels", [3, 64, 2048])
    def test_no_merge_waits_for_memory_often(self, channels):
        """Eight loads after one another at most, for the 25,088 tiles of a stem and for the splits of a gradient of a weight, however many."""
        for partials in (1, 7, 256, 257, 2048, 2049, 12544, 25088, 10**6):
            merges = [tiling.finalisation(partials, channels)]
            while merges[-1].row_programs > 1:
                merges.append(tiling.finalisation(merges[-1].row_programs, channels))
            assert all(merge.steps <= 8 for merge in merges) and len(merges) <= (1 if partials <= 2048 else 2), partials
        for splits in (2, 3, 14, 64, 65, 528, 1056, 4096):
            merge = tiling.finalisation_of_splits(splits, 64 * channels)
            assert merge.steps <= 9 and merge.row_programs == 1 and merge.block_rows * merge.block_channels <= 8192, splits

    def test_a_reduction_fills_the_gpu_and_leaves_few_partial_results(self):
        for channels, rows in ((64, 112 * 112 * 256), (256, 56 * 56 * 256), (2048, 7 * 7 * 256)):
            tile = tiling.reduction(rows, channels, 2, 132, loads=2)
            assert tile.programs <= 4 * 132
            assert tile.programs >= 2 * 132, (channels, rows)
