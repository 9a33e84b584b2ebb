"""Convolutions as products of matrices, and in float32 in place of a narrow dtype: the rules that pick them, and errors at most PyTorch's own."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.backends import BACKENDS, onednn, products
from fused_resnet.problem import ConvProblem
from fused_resnet.values import Conv, ConvGeometry, ConvOutput, Norm, problem_of

CASES = {
    "1x1": ((2, 24, 9, 7), 40, 1, 1, 0),
    "1x1 with a stride": ((3, 24, 9, 8), 40, 1, 2, 0),
    "1x1 with a stride that leaves a border": ((2, 16, 8, 11), 24, 1, 3, 0),
    "3x3, few pixels of many channels": ((2, 512, 5, 4), 512, 3, 1, 1),
    "3x3 with a stride": ((2, 512, 7, 7), 512, 3, 2, 1),
}


def operands(case):
    shape, k, size, stride, padding = CASES[case]
    x = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(k, shape[1], size, size) / (shape[1] * size**2) ** 0.5).bfloat16().contiguous(memory_format=torch.channels_last)
    geometry = ConvGeometry([stride] * 2, [padding] * 2, [1, 1], 1)
    dy = torch.randn_like(torch.conv2d(x, weight, None, *geometry)) + 0.3
    return x, weight, geometry, dy


def gradients(x, weight, geometry, dy):
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False])[
        :2
    ]


@pytest.mark.parametrize("case", CASES)
def test_errors_are_at_most_twice_the_frameworks(case):
    x, weight, geometry, dy = operands(case)
    problem, wide = problem_of(x, weight, geometry), [t.double() for t in (x, weight)]
    exact = [torch.conv2d(*wide, None, *geometry), *gradients(*wide, geometry, dy.double())]
    theirs = [torch.conv2d(x, weight, None, *geometry), *gradients(x, weight, geometry, dy)]
    ours = {"wgrad": (products.wgrad(x, dy, problem), 2)}
    if problem.r == 1:
        ours["fprop"] = products.fprop(x, weight, problem), 0
        ours["dgrad"] = products.dgrad(dy, weight, problem), 1
    for kind, (found, i) in ours.items():
        assert found.shape == exact[i].shape and found.is_contiguous(memory_format=torch.channels_last), kind
        error, allowed = ((t.double() - exact[i]).norm() for t in (found, theirs[i]))
        assert error <= 2 * allowed, (kind, error, allowed)
        assert (found.double() - exact[i]).abs().max() <= 2 * (theirs[i].double() - exact[i]).abs().max() + 1e-9, kind


@pytest.mark.parametrize("case", CASES)
def test_the_backend_gives_what_pytorch_gives(case):
    """With running statistics, so that the norm is an affine map and dy is dz times its scale."""
    passes = BACKENDS["passes_cpu"]
    if reason := passes.why_not(torch.device("cpu"), torch.bfloat16):
        pytest.skip(reason)
    x, weight, geometry, dy = operands(case)
    k = len(weight)
    norm = Norm(None, None, torch.zeros(k), torch.ones(k), False, 0.0)
    pending = passes._convolution(x, Conv(weight, norm, geometry))
    output = ConvOutput(dy, torch.zeros(k), torch.zeros(k), *pending[:3], weight, None, False, geometry, True)
    exact = [torch.conv2d(x.double(), weight.double(), None, *geometry), *gradients(x.double(), weight.double(), geometry, dy.double())]
    for need_dx, need_dw in ((True, True), (True, False), (False, True)):
        dx, dw = passes._convolution_backward(x, output._replace(need_dw=need_dw), need_dx)
        assert (dx is not None, dw is not None) == (need_dx, need_dw)
        for found, expected in ((pending.y, exact[0]), (dx, exact[1]), (dw, exact[2])):
            if found is not None:
                torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
        assert dw is None or dw.stride() == weight.stride()


class Convolutions(TorchDispatchMode):
    """The dtypes in which PyTorch's convolutions run."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name():
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_float32_stands_for_a_dtype_that_onednn_does_not_have(case, dtype, autocast, monkeypatch):
    passes = BACKENDS["passes_cpu"]
    if reason := passes.why_not(torch.device("cpu"), dtype):
        pytest.skip(reason)
    monkeypatch.setattr(onednn, "computing_dtype", lambda dtype: torch.float32)
    monkeypatch.setattr("fused_resnet.backends.passes_cpu.runs_with_passes", lambda *_: False)
    x, weight, geometry, dy = operands(case)
    x, weight, dy = (t.to(dtype) for t in (x, weight, dy))
    k = len(weight)
    norm = Norm(None, None, torch.zeros(k), torch.ones(k), False, 0.0)
    exact = [torch.conv2d(x.double(), weight.double(), None, *geometry), *gradients(x.double(), weight.double(), geometry, dy.double())]
    with torch.autocast("cpu", dtype, enabled=autocast), Convolutions() as seen:
        pending = passes._convolution(x, Conv(weight, norm, geometry))
        output = ConvOutput(dy, torch.zeros(k), torch.zeros(k), *pending[:3], weight, None, False, geometry, True)
        results = pending.y, *passes._convolution_backward(x, output, True)
    assert seen.dtypes == [torch.float32] * len(seen.dtypes) and len(seen.dtypes) >= 2
    for found, expected in zip(results, exact, strict=True):
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        # One rounding, of a sum in float32.
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5 * expected.abs().max().item())


def test_float32_stands_for_no_dtype_that_onednn_has():
    assert onednn.computing_dtype(torch.float32) == torch.float32 and onednn.computing_dtype(torch.float64) == torch.float64
    for dtype, supported in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    ):
        assert onednn.computing_dtype(dtype) == (dtype if supported else torch.float32)


def test_the_rule_looks_at_shapes_and_dtypes():
    def kinds(dtype=torch.bfloat16, **problem):
        shape = {"n": 16, "c": 512, "h": 7, "w": 7, "k": 512, "r": 1, "s": 1} | problem
        return {kind for kind in ("fprop", "dgrad", "wgrad") if products.as_product(kind, ConvProblem(**shape), dtype)}

    assert kinds() == {"wgrad"}
    assert kinds(stride=(2, 2)) == {"fprop", "dgrad", "wgrad"}
    assert kinds(r=3, s=3, padding=(1, 1)) == {"wgrad"}
    for otherwise in (
        {"groups": 32}, {"dtype": torch.float32}, {"dtype": torch.float16}, {"r": 3, "s": 3, "padding": (1, 1), "dilation": (2, 2)}, {"padding": (1, 1)},
        {"r": 3, "s": 3, "padding": (1, 1), "c": 64, "k": 64, "h": 56, "w": 56}, {"stride": (2, 1)},
    ):  # fmt: skip
        assert kinds(**otherwise) == set(), otherwise
