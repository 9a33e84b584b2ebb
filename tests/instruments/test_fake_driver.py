"""The driver without a GPU, by which Triton launches up to the call that would start a kernel; and the benchmark of that time."""

import json

import pytest

pytest.importorskip("triton")
import torch
from support.checkout import ROOT, script
from support.compiled import run

from fused_resnet.kernels.launch import INTERPRETED

DRIVER = script("bench/fake_driver.py")
ADD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, triton, triton.language as tl
from fake_driver import install

@triton.jit
def add_kernel(x_ptr, y_ptr, n, step, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at * step, tl.load(x_ptr + at, mask=at < n), mask=at < n)

calls = install(90)
x, y = torch.zeros(256), torch.zeros(257)
for out, n, step in ((y[:256], 256, 1), (y[:256], 256, 1), (y[1:], 256, 1), (y[:256], 255, 1), (y[:256], 256, 2)):
    add_kernel[(2, 3)](x, out, n, step, BLOCK=128, num_warps=2)
print(json.dumps([[c.kernel, c.function, c.grid, c.packed, [v if isinstance(v, int) else v.data_ptr() % 16 for v in c.arguments]] for c in calls]))
"""


def test_a_call_is_what_would_start_the_kernel(tmp_path):
    """Its function is another one where a pointer is not at a multiple of 16 bytes, and where a number is not, or is 1."""
    path = tmp_path / "add.py"  # Triton reads a kernel's source from its file
    path.write_text(ADD)
    calls = json.loads(run(str(path), str(ROOT / "bench")))
    assert [function for _, function, *_ in calls] == [1, 1, 2, 3, 4]
    assert {(kernel, *grid) for kernel, _, grid, *_ in calls} == {("add_kernel", 2, 3, 1)}
    assert {packed[0] for *_, packed, _ in calls} == {2}
    assert calls[2][-1] == [0, 4, 256, 1, 128] and calls[3][-1] == [0, 0, 255, 1, 128]


@pytest.mark.parametrize(
    "kind, value",
    [("*fp32", 7), ("*fp32", 1.0), ("i32", 2**31), ("i32", 1.5), ("i32", None), ("i64", 2**63), ("fp32", torch.zeros(1)), ("fp32", "x")],
)
def test_an_argument_that_does_not_fit_is_refused(kind, value):
    with pytest.raises(TypeError, match=rf"n: expected what a kernel takes as .*{kind[1:]}"):
        DRIVER.check("n", kind, value)


@pytest.mark.parametrize(
    "kind, value", [("*fp32", None), ("*fp32", torch.zeros(1)), ("i32", -(2**31)), ("i64", 2**31), ("fp32", 0.5), ("constexpr", "tf32")]
)
def test_an_argument_that_fits_is_taken(kind, value):
    DRIVER.check("n", kind, value)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter has not taken the kernels")
def test_interpreted_kernels_can_not_be_launched():
    with pytest.raises(RuntimeError, match="unset it"):
        DRIVER.install(90)


def test_an_unknown_architecture_is_refused():
    arguments = "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); from fake_driver import install; install(75)"
    with pytest.raises(AssertionError, match=f"expected one of {', '.join(map(str, DRIVER.SHARED))}; got 75"):
        run(*arguments)


# ---- bench/launch_overhead.py --------------------------------------------------------------------------------------------------


def test_the_least_of_each_call_counts():
    bench = script("bench/launch_overhead.py")
    first, second = [("fprop", 5000), ("fprop", 9000), (bench.STEP, 20000)], [("fprop", 7000), ("fprop", 3000), (bench.STEP, 15000)]
    found = bench.least([first, second])
    assert found == {"fprop": (2, pytest.approx(8e-6)), bench.STEP: (1, pytest.approx(15e-6))}
    with pytest.raises(ValueError, match="same functions"):
        bench.least([first, first[1:]])
    lines = bench.table({"before": found, "here": {name: (count, taken / 2) for name, (count, taken) in found.items()}})
    assert lines[1].split() == ["fprop", "2", "4.0", "0.01", "2.0", "0.00"]
    assert lines[-1].split() == ["whole", "step", "0.02", "0.01"] and lines[-2].split()[0] == "together"


@pytest.mark.slow
def test_the_benchmark_runs():
    """Of a small network. The whole step is more than its launches."""
    found = run("bench/launch_overhead.py", "--model", "resnet20", "--size", "32", "--rounds", "2")
    columns = json.loads(found.splitlines()[-1])["launch_overhead"]
    assert columns["here"]["fprop"] > 0 and columns["here"]["whole step"] > sum(columns["here"].values()) / 2
