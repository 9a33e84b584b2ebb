"""The suite `kernels` under pytest-benchmark: `pytest bench/test_kernels.py --benchmark-json kernels.json`.

Every pass and convolution, ours and its peers', on the shapes of ResNet-18 and ResNet-50 on a GPU (batch 256, bfloat16), and on the
first shape of each, small, on a CPU, where ours runs in Triton's interpreter and its time says nothing. A call is timed up to its end on
the device. Each result is compared with the reference's before. `fused-resnet bench kernels` writes the figures of the documents.
"""

import dataclasses

import pytest
import torch

from fused_resnet.backends import BACKENDS
from fused_resnet.bench import accuracy, convolutions, passes, schema
from fused_resnet.bench.kernels import IMPLEMENTATIONS, LANGUAGES, Kernels, peers, why_not
from fused_resnet.bench.machine import measure_ceilings
from fused_resnet.bench.schema import read_results
from fused_resnet.cli import main
from fused_resnet.problem import NormProblem
from fused_resnet.reference import Reference
from fused_resnet.roofline import resnet

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float16


def plan():
    if CUDA:
        return list(passes.plan([resnet("resnet18", 256), resnet("resnet50", 256)]))
    return list({make: (make, norm) for make, norm in reversed(list(passes.plan([resnet("resnet18", 2, 16)])))}.values())


def convolutions_plan():
    if CUDA:
        return list(convolutions.plan([resnet("resnet18", 256), resnet("resnet50", 256)]))
    # The first of each, but for the stem, whose images are large.
    return list(dict(reversed([(name, at) for name, at in convolutions.plan([resnet("resnet18", 4, 32), resnet("resnet50", 4, 32)])
                               if not at.images])).items())  # fmt: skip


def name(value):
    if isinstance(value, convolutions.Place):
        return f"{value}-{name(value.read)}".replace(" ", "")
    if isinstance(value, str):
        return value
    return value.__name__ if callable(value) else f"{value.n}x{value.c}x{value.h}x{value.w}"


@pytest.fixture(scope="module")
def suite():
    return Kernels(DEVICE, DTYPE, measure_ceilings(DEVICE, DTYPE, 3), IMPLEMENTATIONS)


def check_and_time(benchmark, suite, case, impl):
    if reason := why_not(impl, DEVICE, DTYPE):
        pytest.skip(reason)
    calls = peers(case, (impl,), DEVICE, DTYPE)
    if not calls:
        pytest.skip("there is no operator for it")
    facts = suite.check(case, calls)[impl]
    if "unsupported" in facts.get("status", "") and not impl.startswith("ours"):
        pytest.skip(facts["status"])
    assert "status" not in facts, facts
    benchmark.extra_info.update(bytes=case.bytes, dtype=str(DTYPE), max_rel_error=facts["max_rel_error"])

    def call():
        calls[impl]()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20 if CUDA else 1, warmup_rounds=3 if CUDA else 0)


@pytest.mark.parametrize("impl", [*LANGUAGES, "eager_nhwc", *(["cudnn"] if CUDA else [])])
@pytest.mark.parametrize("make, norm", plan(), ids=name)
def test_pass(benchmark, make, norm, impl, suite):
    check_and_time(benchmark, suite, make(passes.Inputs(norm, DTYPE, DEVICE)), impl)


@pytest.mark.parametrize("impl", [*LANGUAGES, "ours:triton", "eager_nhwc"])
@pytest.mark.parametrize("case, place", convolutions_plan(), ids=name)
def test_convolution(benchmark, case, place, impl, suite):
    check_and_time(benchmark, suite, convolutions.make(case, place, DTYPE, DEVICE), impl)


ARGUMENTS = [
    "bench", "kernels", "--device", "cpu", "--dtype", "fp16", "--size", "16", "--repeats", "3", "--case", "norm_act_max_pool",
    "--commit", "c0ffee",
]  # fmt: skip


def test_the_program_writes_what_it_measured(tmp_path, capsys):
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("*.json")
    rows = {(row.case, row.impl): row for row in read_results(path).rows}
    case = "norm_act_max_pool"
    assert set(rows) == {("copy", "copy"), ("matmul", "eager"), (case, "eager_nhwc"), *((case, impl) for impl in LANGUAGES)}
    for (_, impl), row in rows.items():
        reason = why_not(impl, torch.device("cpu"), torch.float16)
        assert row.status == (f"unsupported: {reason}" if reason else "ok")
    assert rows[case, "ours:passes_triton"].max_rel_error < 1e-3
    assert str(path) in capsys.readouterr().out


def test_cudnn_on_a_cpu_is_unsupported_with_the_reason(suite):
    cpu = dataclasses.replace(suite, device=torch.device("cpu"), dtype=torch.float16, implementations=("cudnn",))
    (row,) = cpu.rows(lambda: passes.norm_add_forward(passes.Inputs(NormProblem(2, 8, 4, 4), torch.float16, torch.device("cpu"))))
    assert (row.impl, row.status, row.median_ms) == ("cudnn", "unsupported: cuDNN runs on CUDA GPUs, not on 'cpu'", None)


class CudnnByATen:
    """cuDNN's batch norm with its arguments and results in cuDNN's order, computed by ATen's."""

    def __getattr__(self, name):
        return getattr(torch.ops.aten, name)

    def cudnn_batch_norm(self, x, gamma, beta, mean, var, training, momentum, eps):
        out, mean, invstd = torch.ops.aten.native_batch_norm(x, gamma, beta, mean, var, training, momentum, eps)
        return out, mean, invstd, torch.empty(0)

    def cudnn_batch_norm_backward(self, x, dy, gamma, _, __, mean, invstd, eps, kept):
        assert kept.numel() == 0
        wanted = [True, True, True]
        return torch.ops.aten.native_batch_norm_backward(dy, x, gamma, None, None, mean, invstd, True, eps, wanted)


@pytest.mark.parametrize("make", [passes.norm_act_forward, passes.norm_add_forward, passes.norm_backward, passes.norm_add_backward])
def test_what_cudnn_is_asked_for_is_the_case(make, monkeypatch):
    """Its results are the reference's, here computed by ATen in its place; with another case's they are not."""
    monkeypatch.setattr(passes, "ATEN", CudnnByATen())
    inputs = passes.Inputs(NormProblem(4, 16, 6, 6), torch.float32, torch.device("cpu"))
    case = make(inputs)
    expected = case.ours(Reference())
    assert accuracy.error(case.cudnn(), expected)[1] is None
    inputs.gamma.neg_()
    assert accuracy.error(case.cudnn(), expected)[1].startswith("wrong: ")


def test_what_is_wrong_gets_no_figure(tmp_path, monkeypatch):
    right = Reference.norm_act_max_pool
    monkeypatch.setattr(type(BACKENDS["passes_triton"]), "norm_act_max_pool", lambda self, *args: [2 * t for t in right(self, *args)])
    assert main([*ARGUMENTS, "--out", str(tmp_path), "--impl", "ours:passes_triton"]) == 1
    (path,) = tmp_path.rglob("*.json")
    row = read_results(path).rows[-1]
    assert row.status.startswith("wrong: result 0 differs by 1.0e+00")
    assert {getattr(row, figure) for figure in schema.FIGURES} == {None}


def test_nan_is_wrong():
    assert accuracy.error((torch.tensor([1.0, float("nan")]),), (torch.tensor([1.0, 2.0]),))[1].startswith("wrong: result 0 differs by inf")
