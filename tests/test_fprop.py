"""The Triton forward convolution against the reference: every kind of shape, prologue, residual and edge, and its heuristic's launches.

On a CPU by Triton's interpreter, with small tiles, but several in each direction. Two bounds:
- y: at most twice the error of PyTorch's own convolution of the same activation in the same dtype, both against float64;
- act and mask: those of `Reference.norm_add_act`, to a last bit of float32's arithmetic.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_operators import floor
from test_passes import agree, poisoned  # noqa: F401  (a fixture for all tests of this file)

from fused_resnet.kernels import fprop as module
from fused_resnet.kernels.batch_stats import merge_moments
from fused_resnet.kernels.fprop import fprop
from fused_resnet.problem import ConvProblem
from fused_resnet.reference import ConvGeometry, Reference, Source, passes_gradient
from fused_resnet.tuning import Configuration
from fused_resnet.tuning.heuristic_fprop import configuration

REFERENCE = Reference()
SMALL = Configuration(16, 16, 16, warps=1, stages=1)
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
KINDS = ("materialised", "norm", "residual", "raw residual")
#: The kinds of convolution of ResNets, cropped, and shapes that suit nothing.
PROBLEMS = {
    "1x1": ConvProblem(2, 32, 5, 5, 48, 1, 1),
    "1x1 to 1000": ConvProblem(1, 40, 1, 2, 100, 1, 1),
    "1x1 of one pixel": ConvProblem(1, 17, 1, 1, 10, 1, 1),
    "1x1 with padding": ConvProblem(1, 20, 3, 4, 19, 1, 1, padding=(1, 1)),
    "projection": ConvProblem(2, 24, 7, 6, 33, 1, 1, stride=(2, 2)),
    "3x3": ConvProblem(2, 32, 5, 6, 16, 3, 3, padding=(1, 1)),
    "3x3 stride 2": ConvProblem(1, 20, 7, 8, 40, 3, 3, stride=(2, 2), padding=(1, 1)),
    "3x3 dilated": ConvProblem(1, 18, 7, 7, 10, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "3x3 without padding": ConvProblem(3, 16, 4, 5, 20, 3, 3),
    "3x3 of one pixel": ConvProblem(3, 33, 1, 1, 17, 3, 3, padding=(1, 1)),
    "3x3 of an image's colours": ConvProblem(2, 3, 6, 5, 16, 3, 3, padding=(1, 1)),
    "stem": ConvProblem(1, 3, 13, 12, 20, 7, 7, stride=(2, 2), padding=(3, 3)),
    "uneven": ConvProblem(1, 5, 9, 7, 18, 3, 2, stride=(1, 2), padding=(2, 0), dilation=(1, 3)),
}


def nhwc(*shape, dtype, offset=0.0):
    """Random, and exact in bfloat16 and float16."""
    t = (torch.randn(shape) + offset).bfloat16().half().to(dtype)
    return t.to("cuda" if torch.cuda.is_available() else "cpu").contiguous(memory_format=torch.channels_last)


def vectors(c, count, like):
    return [torch.randn(c, device=like.device) for _ in range(count)]


def source_of(kind: str, problem: ConvProblem, dtype: torch.dtype) -> Source:
    shape = problem.n, problem.c, problem.h, problem.w
    x = nhwc(*shape, dtype=dtype, offset=0.5)
    if kind == "materialised":
        return Source(x)
    mean, invstd, scale, bias = vectors(problem.c, 4, x)
    bias += 1.0  # so that act of a padded zero would be seen
    if kind == "norm":
        return Source(x, mean, invstd, scale, bias)
    residual = nhwc(*shape, dtype=dtype)
    own = vectors(problem.c, 4, x) if kind == "raw residual" else [None] * 4
    return Source(x, mean, invstd, scale, bias, residual, *own)


def geometry_of(problem: ConvProblem) -> ConvGeometry:
    return ConvGeometry(list(problem.stride), list(problem.padding), list(problem.dilation), problem.groups)


def weight_of(problem: ConvProblem, dtype: torch.dtype) -> torch.Tensor:
    weight = nhwc(problem.k, problem.c, problem.r, problem.s, dtype=dtype)
    return weight * 2.0**-4


def activation(source: Source) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not source.pending:
        return source.x, None
    arguments = source.x, source.scale, source.bias, source.residual, source.residual_scale, source.residual_bias
    return REFERENCE.norm_add_act(*arguments, relu=True, save_mask=True)


def relative_error(y, truth):
    return ((y.double() - truth).norm() / truth.norm()).item()


def check(y, act, weight, geometry):
    """The rule of tests/test_operators.py."""
    truth = torch.conv2d(act.double(), weight.double(), None, *geometry)
    eager = relative_error(torch.conv2d(act, weight, None, *geometry), truth)
    error = relative_error(y, truth)
    assert error <= max(2 * eager, floor(y.dtype, y.numel())), f"error {error:.2e}, eager's {eager:.2e}"


def check_moments(y, moments):
    """Those of y as rounded, about means of their own."""
    counts, means, m2s = moments
    k = y.shape[1]
    assert counts.dtype == torch.int64 and counts.sum() == y.numel() // k
    ones, zeros = torch.ones(k, device=y.device), torch.zeros(k, device=y.device)
    expected = REFERENCE.batch_stats(y, ones, zeros, 1e-5)
    agree(REFERENCE.merge_moments(counts, means, m2s, ones, zeros, 1e-5), expected)
    agree(merge_moments(counts, means, m2s, ones, zeros, 1e-5), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_the_reference(name, kind, dtype):
    problem = PROBLEMS[name]
    source, weight, geometry = source_of(kind, problem, dtype), weight_of(problem, dtype), geometry_of(problem)
    writes = source.pending and module.reads_each_value_once(problem)
    y, act, mask, moments = fprop(source, weight, geometry, writes, writes and source.residual is not None, SMALL, allow_tf32=False)
    expected_act, expected_mask = activation(source)
    assert y.shape == (problem.n, problem.k, problem.p, problem.q) and y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    check(y, expected_act, weight, geometry)
    check_moments(y, moments)
    agree((act, mask), (expected_act if writes else None, expected_mask if writes and source.residual is not None else None))
