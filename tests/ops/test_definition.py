"""The definition's own small steps against PyTorch's, at the values where a wrong one differs."""

import math

import pytest
import torch

from fused_resnet.reference import Reference, convolution_backward, like_weight, passes_gradient
from fused_resnet.values import ConvGeometry, ConvOutput, Source

EDGES = [math.nan, -math.inf, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, math.inf]


def test_a_gradient_passes_where_pytorchs_relu_lets_it():
    z = torch.tensor(EDGES, requires_grad=True)
    z.relu().sum().backward()
    assert passes_gradient(z.detach()).tolist() == z.grad.bool().tolist() == [True, *[False] * 5, *[True] * 3]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_weights_gradient_has_its_strides(layout):
    memory_format = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    weight = torch.randn(6, 4, 3, 3).contiguous(memory_format=memory_format)
    act, dy = (torch.randn(2, c, 5, 5).contiguous(memory_format=torch.channels_last) for c in (4, 6))
    vector = torch.ones(6)
    output = ConvOutput(dy, vector, vector, dy, vector, vector, weight, None, True, ConvGeometry([1, 1], [1, 1], [1, 1], 1), True)
    _, dw = convolution_backward(act, dy, output, False, True)
    assert dw.stride() == weight.stride()
    other = dw.contiguous(memory_format=torch.channels_last if layout == "contiguous" else torch.contiguous_format)
    assert like_weight(other, weight).stride() == weight.stride() and torch.equal(like_weight(other, weight), dw)


def test_an_average_pools_gradient_is_shared_by_all_pixels():
    x = torch.rand(2, 3, 7, 7).contiguous(memory_format=torch.channels_last) + 0.5
    ones, zeros = torch.ones(3), torch.zeros(3)
    dout = torch.randn(2, 3, 1, 1)
    dz, s1, *_ = Reference().norm_add_act_avg_pool_backward(dout, Source(x, zeros, ones, ones, zeros), None)
    torch.testing.assert_close(dz, (dout / 49).expand_as(dz))
    torch.testing.assert_close(s1, dout.sum((0, 2, 3)))
