"""Shapes, FLOPs and bytes of a problem, against PyTorch's own and against figures written out by hand."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet.problem import ConvProblem, NormProblem

CONV1X1 = ConvProblem(256, 256, 56, 56, 64, 1, 1)
STEM = ConvProblem(256, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3))


def test_figures_by_hand():
    assert (STEM.p, STEM.q) == (112, 112)
    assert STEM.flops == 2 * 256 * 112 * 112 * 64 * 3 * 7 * 7
    assert STEM.input_bytes(2) == STEM.touched_input_bytes(2) == 256 * 3 * 224 * 224 * 2
    assert STEM.output_bytes(2) == 256 * 64 * 112 * 112 * 2
    assert STEM.weight_bytes(4) == 64 * 3 * 49 * 4
    assert STEM.output_norm == NormProblem(256, 64, 112, 112)
    assert CONV1X1.weight_elements == 256 * 64


@pytest.mark.parametrize(
    "size, kernel, stride, padding, dilation, groups",
    list(itertools.product([5, 8], [1, 3], [1, 2, 3], [0, 1], [1, 2], [1, 2])),
)
def test_shapes_flops_and_touched_pixels_are_pytorchs(size, kernel, stride, padding, dilation, groups):
    x = torch.zeros(2, 4, size, size + 1, requires_grad=True)
    weight = torch.ones(6, 4 // groups, kernel, kernel)
    problem = ConvProblem(
        2, 4, size, size + 1, 6, kernel, kernel, (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    assert y.shape == (2, 6, problem.p, problem.q)
    assert counter.get_total_flops() == problem.flops
    y.sum().backward()  # with a weight of ones, the gradient of a pixel counts the taps that read it
    assert problem.touched_input_bytes(2) == 2 * (x.grad != 0).sum()
    assert problem.output_bytes(2) == 2 * y.numel()
    assert problem.input_bytes(4) == 4 * x.numel()
    assert problem.weight_bytes(4) == 4 * weight.numel()


def test_strided_1x1_touches_a_quarter():
    problem = ConvProblem(8, 64, 56, 56, 128, 1, 1, stride=(2, 2))
    assert 4 * problem.touched_input_bytes(2) == problem.input_bytes(2)


def test_norm():
    norm = NormProblem(2, 10, 3, 5)
    assert (norm.count, norm.elements, norm.tensor_bytes(2)) == (30, 300, 600)
    assert norm.mask_bytes == 30 * 2  # ten channels take two bytes a pixel


def test_problems_are_values():
    assert dataclasses.replace(CONV1X1, n=1) == ConvProblem(1, 256, 56, 56, 64, 1, 1)
    assert len({CONV1X1, dataclasses.replace(CONV1X1), STEM}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONV1X1.n = 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n": 0}, "n: expected a whole number of at least 1; got 0"),
        ({"k": 6.0}, "k: expected a whole number"),
        ({"stride": (1, -1)}, "stride: expected two whole numbers of at least 1"),
        ({"padding": 1}, "padding: expected two whole numbers of at least 0; got 1"),
        ({"dilation": (0, 1)}, "dilation: expected"),
        ({"groups": 3}, "groups: expected a divisor of c = 256 and k = 64; got 3"),
        ({"r": 57}, "h, w: expected a size that a 57x1 window fits into; got 56x56"),
    ],
)
def test_bad_fields_are_named(change, message):
    with pytest.raises(ValueError, match="^" + message):
        dataclasses.replace(CONV1X1, **change)


def test_bad_norm_is_named():
    with pytest.raises(ValueError, match="^h: expected a whole number of at least 1; got -1"):
        NormProblem(1, 1, -1, 1)
