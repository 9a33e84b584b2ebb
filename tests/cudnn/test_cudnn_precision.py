"""What sums of squares and rounded coefficients cost: against eager's own errors."""

import pytest
import torch
from support.cudnn_arithmetic import pending, raw

from fused_resnet.cudnn import work
from fused_resnet.reference import affine, passes_gradient
from fused_resnet.values import Source


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
