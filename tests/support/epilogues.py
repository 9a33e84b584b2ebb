"""A convolution with an affine map, a residual and a ReLU behind it: operands, PyTorch's result, and the rule for ours."""

import torch

from fused_resnet.problem import ConvProblem
from support.chains import DEVICE, relative_error
from support.convolutions import PROBLEMS, geometry_of, nhwc
from support.rule import floor

SHAPES = PROBLEMS | {
    "1x1 to a thousand": ConvProblem(1, 17, 1, 2, 1000, 1, 1), "3x3 grouped": ConvProblem(2, 6, 5, 4, 9, 3, 3, padding=(1, 1), groups=3),
}  # fmt: skip
#: Whether there is a scale, a residual, a ReLU. The first is a folded convolution, the second ends a block, the third is a projection.
EPILOGUES = {
    "bias": (False, False, True), "residual": (False, True, True), "linear": (False, False, False), "all": (True, True, True),
    "all but a ReLU": (True, True, False),
}  # fmt: skip


def operands(name: str, epilogue: str, dtype: torch.dtype) -> list:
    """The arguments of `conv_affine_act`, exact in every dtype but the scale, which no convolution of folded norms has."""
    problem, (scaled, added, relu) = SHAPES[name], EPILOGUES[epilogue]
    x = nhwc(problem.n, problem.c, problem.h, problem.w, dtype=dtype, offset=0.5)
    weight = nhwc(problem.k, problem.c // problem.groups, problem.r, problem.s, dtype=dtype) * 2.0**-4
    scale = torch.rand(problem.k, device=DEVICE) + 0.5 if scaled else None
    bias = torch.randn(problem.k).bfloat16().half().float().to(DEVICE)
    residual = nhwc(problem.n, problem.k, problem.p, problem.q, dtype=dtype) if added else None
    return [x, weight, geometry_of(problem), scale, bias, residual, relu]


def eager(x, weight, geometry, scale, bias, residual, relu) -> torch.Tensor:
    """PyTorch's operators, one by one, in the dtype of x."""
    y = torch.conv2d(x, weight, None, *geometry)
    if scale is not None:
        y = (y * scale[:, None, None]).to(x.dtype)
    y = y + bias.to(x.dtype)[:, None, None]
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def check(act: torch.Tensor, given: list) -> None:
    """Against float64. Shape, dtype and layout too."""
    x, weight, geometry, scale, bias, residual, relu = given
    wide = [t if t is None else t.double() for t in (scale, bias, residual)]
    truth = eager(x.double(), weight.double(), geometry, *wide, relu)
    assert act.shape == truth.shape and act.dtype == x.dtype and act.is_contiguous(memory_format=torch.channels_last)
    allowed, error = relative_error(eager(*given), truth), relative_error(act, truth)
    assert error <= max(2 * allowed, floor(x.dtype, act.numel())), f"error {error:.2e}, eager's {allowed:.2e}"
