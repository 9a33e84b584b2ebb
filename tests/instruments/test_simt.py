"""The SIMT shim: kernels of CUDA C++ run on a CPU with the results of a GPU, and what is wrong with them is reported.

The kernels stand in tests/support/simt/kernels.cu, those with planted faults in tests/support/simt/faults.cu.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkout import TESTS
from support.simt import compile as simt
from support.simt.kernels import IN_PROCESS, call, library, pointer, run_in
from support.simt.results import CHECKS

SIMT = TESTS / "support" / "simt"
INVALID_VALUE, INVALID_CONFIGURATION, TOO_MANY_RESOURCES = 1, 9, 701

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["plain", "drawn"])
@pytest.mark.parametrize("flavour", IN_PROCESS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_results(check, flavour, order, seed):
    kernels = library("kernels", flavour)
    for draw in range(5 if order == "drawn" else 1):
        kernels.simt_set_seed(seed + 1 + draw if order == "drawn" else 0)
        check(kernels, np.random.default_rng(seed + draw))
    kernels.simt_set_seed(0)


def test_results_under_address_sanitizer(seed):
    program = """
import sys
import numpy as np
from support.simt.kernels import library
from support.simt.results import CHECKS
kernels, seed = library("kernels", "asan"), int(sys.argv[1])
for order in (0, seed + 1):
    kernels.simt_set_seed(order)
    for check in CHECKS:
        check(kernels, np.random.default_rng(seed))
"""
    result = run_in("asan", program, str(seed))
    assert (result.returncode, result.stderr) == (0, "")


def test_shared_memory_is_poisoned_before_each_block():
    for flavour in ("plain", "race"):
        kernels = library("kernels", flavour)
        y = np.zeros(2 * 20, np.float32)
        call(kernels, "leftovers", y, 20)
        assert np.isnan(y).all()
        assert len(set(y.view(np.uint32).tolist())) > 10  # an integer would differ from block to block
        assert np.isnan(y.view(np.float16)).all()
        assert torch.from_numpy(y).view(torch.bfloat16).isnan().all()
        assert np.isnan(y.view(np.float64)).all()


# ---- conversions -----------------------------------------------------------------------------------------------------

PATTERNS = np.arange(2**16, dtype=np.uint16)
TYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}


def same_bits(got: np.ndarray, expected: torch.Tensor):
    """Equal bits, but for which NaN a NaN is; what converts to 16 bits makes the one that a GPU makes."""
    want = expected.view(torch.uint16).numpy()
    nan = expected.isnan().numpy()
    assert (got[~nan] == want[~nan]).all()
    assert (got[nan] == 0x7FFF).all()


@pytest.mark.parametrize("name", TYPES)
def test_all_patterns_widen(name):
    y = np.empty(2**16, np.float32)
    getattr(library("kernels", "plain"), f"{name}_to_float")(pointer(PATTERNS), pointer(y), y.size)
    expected = torch.from_numpy(PATTERNS).view(TYPES[name]).float().numpy()
    assert ((y.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(y) & np.isnan(expected))).all()


@pytest.mark.parametrize("name", TYPES)
def test_rounds_to_nearest_even(name):
    exact = torch.from_numpy(PATTERNS).view(TYPES[name]).float().numpy()
    exact = np.sort(exact[np.isfinite(exact)])
    ties = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)  # representable: one bit more
    largest = exact[-1]
    beyond = largest + (largest - exact[-2]) / 2  # from here on infinity
    x = np.concatenate([
        exact, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)),
        [beyond, np.nextafter(beyond, np.float32(0)), -beyond, np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, 1e-45, -1e-45],
        np.random.default_rng(0).integers(0, 2**32, 200_000).astype(np.uint32).view(np.float32),
    ], dtype=np.float32)  # fmt: skip
    y = np.empty(x.size, np.uint16)
    getattr(library("kernels", "plain"), f"float_to_{name}")(pointer(x), pointer(y), x.size)
    same_bits(y, torch.from_numpy(x).to(TYPES[name]))


# ---- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid, block, expected",
    [
        ((1, 1, 1), (512, 1, 1), 0),
        ((3, 2, 4), (4, 2, 64), 0),
        ((0, 1, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 0), (32, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (0, 1, 1), INVALID_CONFIGURATION),
        ((2**31, 1, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1, 65536, 1), (32, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (1025, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 1, 65), INVALID_CONFIGURATION),
        ((1, 1, 1), (32, 64, 1), INVALID_CONFIGURATION),
        ((1, 1, 1), (513, 1, 1), TOO_MANY_RESOURCES),  # of the kernel's __launch_bounds__(512)
    ],
)
def test_configurations(grid, block, expected):
    kernels = library("kernels", "plain")
    assert kernels.configured(*grid, *block) == expected
    assert kernels.last_error(0) == expected
    assert kernels.last_error(1) == expected
    assert kernels.last_error(0) == 0


def test_much_dynamic_shared_memory_has_to_be_allowed():
    kernels, y = library("kernels", "plain"), np.zeros(1, np.uint32)
    assert kernels.much_shared(pointer(y), 12289, 0) == INVALID_VALUE
    assert kernels.much_shared(pointer(y), 12289, 228 * 1024) == -1
    call(kernels, "much_shared", y, 57000, 57000 * 4)
    assert y[0] == 2 * sum(range(57000)) % 2**32
    assert kernels.much_shared(pointer(y), 57001, 0) == INVALID_VALUE
    kernels.last_error(1)


def test_multiprocessors_are_as_many_as_one_says():
    kernels = library("kernels", "plain")
    before = kernels.multiprocessors()
    kernels.simt_set_multiprocessors(132)
    assert kernels.multiprocessors() == 132
    kernels.simt_set_multiprocessors(before)


# ---- faults ----------------------------------------------------------------------------------------------------------


# ---- building --------------------------------------------------------------------------------------------------------


def test_a_header_that_changes_is_seen(tmp_path):
    header, source = tmp_path / "inner" / "value.cuh", tmp_path / "value.cu"
    header.parent.mkdir()
    source.write_text('#include <cuda_runtime.h>\n#include "value.cuh"\nextern "C" int value() { return kValue; }\n')
    paths = []
    for value in (3, 44):
        header.write_text(f"constexpr int kValue = {value};\n")
        paths.append(simt.library([source], include=[header.parent]))
        assert simt.load(paths[-1]).value() == value
        assert simt.library([source], include=[header.parent]) == paths[-1]
    assert paths[0] != paths[1]


def test_what_is_not_modelled_does_not_compile(tmp_path):
    source = tmp_path / "strange.cu"
    source.write_text('#include <cuda_runtime.h>\nextern "C" void f(float* x) { *x = __expf(*x); }\n')
    with pytest.raises(simt.CompileError, match=r"(?s)g\+\+.*strange.cu.*__expf"):
        simt.library([source])
    with pytest.raises(ValueError, match="flavour: expected one of plain, asan, ubsan, race, got 'tsan'"):
        simt.library([source], "tsan")


def test_main_runs_by_one_command(tmp_path):
    source = tmp_path / "main.cu"
    source.write_text(
        (SIMT / "faults.cu").read_text()
        + """
extern "C" int main() {
  float values[64];
  return run_fault("missing_syncwarp", 0, 1, 64, values) == cudaSuccess ? 0 : 7;
}
"""
    )
    for flavour, status in (("plain", 0), ("asan", 0), ("race", 7)):
        result = subprocess.run([sys.executable, SIMT / "compile.py", flavour, source], capture_output=True, text=True)
        assert result.returncode == status, result.stderr
    assert "missing_syncwarp<false>" in result.stderr
    command = [sys.executable, SIMT / "compile.py", "asan", "--", "sh", "-c", "echo $LD_PRELOAD"]
    assert "libasan" in subprocess.run(command, capture_output=True, text=True).stdout


OPERATOR = """
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

using torch::stable::Tensor;

__global__ void __launch_bounds__(256) reverse_kernel(const float* x, float* y, int n) {
  __shared__ float s[256];
  s[threadIdx.x] = static_cast<int>(threadIdx.x) < n ? x[threadIdx.x] : 0.0f;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = s[n - 1 - threadIdx.x];
}

Tensor reverse(const Tensor& x) {
  const Tensor y = torch::stable::empty_like(x);
  cudaLaunchConfig_t config = {};
  config.blockDim = 256;
  const int n = static_cast<int>(x.numel());
  const cudaError_t error = cudaLaunchKernelEx(&config, reverse_kernel, static_cast<const float*>(x.const_data_ptr()),
                                               static_cast<float*>(y.mutable_data_ptr()), n);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return y;
}

STABLE_TORCH_LIBRARY(simt_test_NAME, library) { library.def("reverse(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(simt_test_NAME, CPU, library) { library.impl("reverse", TORCH_BOX(&reverse)); }
"""
OPERATOR_CALL = """
import sys, threading, torch
torch.ops.load_library(sys.argv[1])
x = torch.randn(200)
def call():
    for _ in range(200):
        assert torch.equal(getattr(torch.ops, sys.argv[2]).reverse(x), x.flip(0))
threads = [threading.Thread(target=call) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
print("done")
"""


@pytest.mark.parametrize("flavour", [simt.FLAVOURS[0], *(pytest.param(f, marks=pytest.mark.full) for f in simt.FLAVOURS[1:])])
def test_an_operator_of_the_stable_abi_runs(flavour, tmp_path):
    source, home = tmp_path / "operator.cu", Path(torch.__file__).parent
    source.write_text(OPERATOR.replace("NAME", flavour))
    path = simt.library(
        [source],
        flavour,
        flags=["-isystem", str(home / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"],
        link=[f"-L{home / 'lib'}", "-ltorch_cpu"],
    )
    result = run_in(flavour, OPERATOR_CALL, str(path), f"simt_test_{flavour}")
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
