"""Every Triton kernel, compiled ahead of time for sm_80 and sm_90 as `fused-resnet kernels` does: no GPU is needed.

In a process of its own: where Triton's interpreter has taken the kernels, as it has in this one on a CPU, they can't be compiled.
"""

import json

import pytest
from support.compiled import LOSES_NAN, run, tested_triton

pytestmark = tested_triton

COMPILE = """
import dataclasses, json, sys, torch
from fused_resnet.kernels import inspect
print(json.dumps([dataclasses.asdict(c) for c in inspect.compile_all("", (getattr(torch, sys.argv[1]),))]))
"""
PLANTED_FAULT = """
import sys, torch, triton, triton.language as tl
from fused_resnet.kernels import inspect
from fused_resnet.kernels.launch import Launch

@triton.jit
def relu_by_maximum_kernel(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(x_ptr + at, tl.maximum(x, 0.0), mask=at < n)

launch = Launch(relu_by_maximum_kernel, 1, {"x_ptr": torch.empty(512, device="meta"), "n": 512, "BLOCK": 512}, 4, 3)
print(inspect.compile_launch(launch, "", 90).ptx)
"""


@pytest.mark.full
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_kernels_compile_without_a_spill_and_keep_nan(dtype):
    compiled = json.loads(run("-c", COMPILE, dtype))
    assert {c["architecture"] for c in compiled} == {80, 90}
    assert {c["kernel"] for c in compiled} == {
        "batch_stats_partial_kernel", "merge_moments_kernel", "moments_of_sums_kernel", "norm_add_act_kernel", "norm_backward_reduce_kernel",
        "sums_finalise_kernel", "norm_backward_apply_kernel", "norm_act_max_pool_kernel", "norm_act_max_pool_backward_kernel",
        "norm_add_act_avg_pool_kernel",
    }  # fmt: skip
    for c in compiled:
        where = c["kernel"], c["variant"], c["architecture"]
        assert c["spilled"] == 0, where
        assert c["registers"] <= 128, where
        assert not LOSES_NAN.search(c["ptx"]), where
        # Everything of an activation's size moves 16 bytes at a time; the moments of a few devices, told by their counts, are small.
        if "C=256" in c["variant"] and "counts" not in c["variant"]:
            assert c["wide"] / c["accesses"] >= 0.5, where


def test_a_maximum_that_loses_nan_is_seen(tmp_path):
    script = tmp_path / "fault.py"  # Triton reads a kernel's source from its file
    script.write_text(PLANTED_FAULT)
    assert LOSES_NAN.search(run(str(script)))


def test_the_table_is_one_command():
    title, names, *rows = run("-m", "fused_resnet", "kernels", "--language", "triton", "--name", "sums_finalise", "--csv").splitlines()
    assert title == "# triton kernels" and names.startswith("kernel,variant,sm,registers,")
    assert len(rows) > 3 and all(row.startswith("sums_finalise_kernel") for row in rows)
