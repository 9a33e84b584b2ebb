"""The suite `kernels` under pytest-benchmark: `pytest bench/test_kernels.py --benchmark-json kernels.json`.

Every pass, ours and eager's, on ResNet-50's shapes on a GPU (batch 256, bfloat16), and on the first shape of each, small, on a CPU,
where ours runs in Triton's interpreter and its time says nothing. A call is timed up to its end on the device. Each result is
compared with the reference's before. bench/kernels.py writes the figures that the documents show.
"""

import kernels
import pytest
import torch

from fused_resnet.backends import BACKENDS
from fused_resnet.bench import passes, schema
from fused_resnet.bench.schema import read_results
from fused_resnet.reference import Reference
from fused_resnet.roofline import resnet

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float16


def plan():
    if CUDA:
        return list(passes.plan(resnet("resnet50", 256)))
    return list({make: (make, norm) for make, norm in reversed(list(passes.plan(resnet("resnet18", 2, 16))))}.values())


def name(value):
    return value.__name__ if callable(value) else f"{value.n}x{value.c}x{value.h}x{value.w}"


@pytest.mark.parametrize("impl", ["ours:passes", "eager_nhwc"])
@pytest.mark.parametrize("make, norm", plan(), ids=name)
def test_pass(benchmark, make, norm, impl):
    if impl.startswith("ours") and (reason := BACKENDS["passes"].declines(DEVICE, DTYPE)):
        pytest.skip(reason)
    case = make(passes.Inputs(norm, DTYPE, DEVICE))
    calls = kernels.peers(case, [impl])
    if not calls:
        pytest.skip("ATen has no operator for it")
    facts = kernels.check(calls, case.ours(Reference()), DEVICE, DTYPE)[impl]
    assert "status" not in facts, facts
    benchmark.extra_info.update(bytes=case.bytes, dtype=str(DTYPE), max_rel_error=facts["max_rel_error"])

    def call():
        calls[impl]()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20 if CUDA else 1, warmup_rounds=3 if CUDA else 0)


ARGUMENTS = ["--device", "cpu", "--dtype", "fp16", "--size", "16", "--repeats", "3", "--case", "norm_act_max_pool", "--commit", "c0ffee"]


def test_the_program_writes_what_it_measured(tmp_path, capsys):
    assert kernels.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("*.json")
    rows = {(row.case, row.impl): row for row in read_results(path).rows}
    assert set(rows) == {
        ("copy", "copy"), ("matmul", "eager"), ("norm_act_max_pool", "eager_nhwc"), ("norm_act_max_pool", "ours:passes"),
    }  # fmt: skip
    assert all(row.status == "ok" and row.median_ms > 0 for row in rows.values())
    assert rows["norm_act_max_pool", "ours:passes"].max_rel_error < 1e-3
    assert str(path) in capsys.readouterr().out


def test_what_is_wrong_gets_no_figure(tmp_path, monkeypatch):
    right = Reference.norm_act_max_pool
    monkeypatch.setattr(type(BACKENDS["passes"]), "norm_act_max_pool", lambda self, *args: [2 * t for t in right(self, *args)])
    assert kernels.main([*ARGUMENTS, "--out", str(tmp_path), "--impl", "ours:passes"]) == 1
    (path,) = tmp_path.rglob("*.json")
    row = read_results(path).rows[-1]
    assert row.status.startswith("wrong: result 0 differs by 1.0e+00")
    assert {getattr(row, figure) for figure in schema.FIGURES} == {None}


def test_nan_is_wrong():
    assert passes.error((torch.tensor([1.0, float("nan")]),), (torch.tensor([1.0, 2.0]),))[1].startswith("wrong: result 0 differs by inf")


def test_without_a_commit_nothing_is_measured(tmp_path, monkeypatch, capsys):
    def nowhere():
        raise RuntimeError("commit: no git checkout")

    monkeypatch.setattr("fused_resnet.bench.program.current_commit", nowhere)
    with pytest.raises(SystemExit) as stop:
        kernels.main(["--device", "cpu", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "commit: no git checkout\n"
