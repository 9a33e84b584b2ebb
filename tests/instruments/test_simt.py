"""The SIMT shim: kernels of CUDA C++ run on a CPU with the results of a GPU, and what is wrong with them is reported.

The kernels stand in tests/support/simt/kernels.cu, those with planted faults in tests/support/simt/faults.cu.
"""

import ctypes
import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkout import TESTS
from support.simt import compile as simt

HERE = Path(__file__).resolve().parent
SIMT = TESTS / "support" / "simt"
#: A library of the others loads into this process.
IN_PROCESS = ("plain", "ubsan", "race")
LAUNCH_FAILURE, ILLEGAL_ADDRESS = 719, 700
INVALID_VALUE, INVALID_CONFIGURATION, TOO_MANY_RESOURCES = 1, 9, 701

pytestmark = pytest.mark.skipif(simt.missing() is not None, reason=str(simt.missing()))


@functools.cache
def library(name: str, flavour: str) -> ctypes.CDLL:
    return simt.load(simt.library([SIMT / f"{name}.cu"], flavour))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def call(kernels: ctypes.CDLL, name: str, *arguments):
    """Calls a launcher that must succeed; arrays are passed by address."""
    status = getattr(kernels, name)(*(pointer(a) if isinstance(a, np.ndarray) else a for a in arguments))
    assert (status, kernels.simt_last_message().decode()) == (0, "")


# ---- results ---------------------------------------------------------------------------------------------------------


def selected_lane(how: int, lane: int, operand: int, width: int) -> int:
    """The lane that a shuffle reads, from the programming guide: another of the segment of `width` lanes, else the caller."""
    first = lane // width * width
    if how == 0:
        return first + operand % width
    if how == 1:
        return lane - operand if lane - operand >= first else lane
    if how == 2:
        return lane + operand if lane + operand < first + width else lane
    return lane ^ operand if lane ^ operand < first + width else lane  # lanes of earlier segments may be read


def check_sums(kernels, random):
    for threads, columns in ((32, 33), (96, 1000), (1024, 1500)):
        x = random.integers(-99, 99, (6, columns)).astype(np.float32)
        y = np.full(6, np.nan, np.float32)
        call(kernels, "sum_rows", x, y, 6, columns, threads)
        assert (y == x.sum(1)).all()
    x = random.integers(-(2**40), 2**40, (3, 300)).astype(np.float64)
    y = np.full(3, np.nan)
    call(kernels, "sum_rows_double", x, y, 3, 300)
    assert (y == x.sum(1)).all()


def check_ticket(kernels, random):
    drawn = np.zeros(1, np.uint32)
    for blocks in (1, 17, 40):  # the counter is back at 0 each time
        x = random.integers(-99, 99, (blocks, 128)).astype(np.float32)
        y, partial = np.full(1, np.nan, np.float32), np.full(blocks, np.nan, np.float32)
        call(kernels, "sum_by_ticket", x, partial, drawn, y, blocks)
        assert y[0] == x.sum()
        assert drawn[0] == 0


def check_scan(kernels, random):
    x = random.integers(-99, 99, (4, 160)).astype(np.int32)
    y = np.empty_like(x)
    call(kernels, "scan", x, y, 4)
    assert (y == x.cumsum(1)).all()


def check_masks(kernels, random):
    y = np.empty(32, np.int32)
    call(kernels, "two_masks", y)
    lane = np.arange(32)
    others = int((lane[lane % 3 != 0] % 2).sum()) + 100 + 1000
    assert (y == np.where(lane % 3 == 0, lane + 30 + 60 + 120, others)).all()


def check_shuffles(kernels, random):
    x = random.integers(-(2**62), 2**62, 32)
    y = np.empty_like(x)
    for how in range(4):
        for width in (1, 2, 4, 8, 16, 32):
            for operand in random.permutation(32)[:8]:
                call(kernels, "shuffle", how, int(operand), width, x, y)
                assert (y == x[[selected_lane(how, lane, operand, width) for lane in range(32)]]).all()


def check_predicates(kernels, random):
    y = np.empty(5, np.int32)
    call(kernels, "predicates", y)
    assert y.tolist() == [20, 1, 0, 1, 0]


def check_coordinates(kernels, random):
    y = np.zeros(3 * 4 * 5 * 6 * 7 * 2, np.uint32)
    call(kernels, "coordinates", y)
    assert (y == np.arange(y.size)).all()


def check_atomics(kernels, random):
    names = ["added", "incremented", "swapped", "greatest", "least", "wide", "real"]
    totals = np.zeros(1, np.dtype({"names": names, "formats": ["u4", "u4", "u4", "i4", "i4", "u8", "f4"]}, align=True))
    call(kernels, "atomics", totals)
    greatest = max(7 * i % 1000 for i in range(300))
    assert totals[0].tolist() == (900, 0, 600, greatest, -greatest, 300 * 2**33, 150.0)


def check_bits(kernels, random):
    x = random.integers(0, 2**32, (64, 3)).astype(np.uint32)
    x[0, 0], x[1, 0] = 0, 0x80000000
    y = np.empty((64, 4), np.uint32)
    call(kernels, "bits", x, y)
    for (a, b, selector), got in zip(x.tolist(), y.tolist(), strict=True):
        source = (a | b << 32).to_bytes(8, "little")
        permuted = int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")
        assert got == [a.bit_count(), (a & -a).bit_length(), 32 - a.bit_length(), permuted]


def check_arithmetic(kernels, random):
    x = random.lognormal(0, 3, (64, 3)).astype(np.float32)
    y = np.empty((64, 12), np.float32)
    call(kernels, "arithmetic", x, y)
    (a, b, c), (wide_a, wide_b, wide_c) = x.T, x.T.astype(np.float64)
    root, fused = (1 / np.sqrt(wide_a)).astype(np.float32), (wide_a * wide_b + wide_c).astype(np.float32)
    apart = [root, root, 1 / a, np.sqrt(a), a / b, a * b, a + b, a * b + c, fused, fused, np.minimum(a, b), a]
    assert (y == np.stack(apart, 1)).all()
    assert (y[:, 7] != y[:, 8]).any()  # nothing is fused unasked


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("order", ["plain", "drawn"])
@pytest.mark.parametrize("flavour", IN_PROCESS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_results(check, flavour, order, seed):
    kernels = library("kernels", flavour)
    for draw in range(5 if order == "drawn" else 1):
        kernels.simt_set_seed(seed + 1 + draw if order == "drawn" else 0)
        check(kernels, np.random.default_rng(seed + draw))
    kernels.simt_set_seed(0)


def run_in(flavour: str, program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python code in a process that can load a library of the flavour. It imports from this folder."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=simt.environment(flavour) | {"PYTHONPATH": str(TESTS)}, cwd=HERE, capture_output=True, text=True)


def test_results_under_address_sanitizer(seed):
    program = """
import sys, test_simt as tests
kernels, seed = tests.library("kernels", "asan"), int(sys.argv[1])
for order in (0, seed + 1):
    kernels.simt_set_seed(order)
    for check in tests.CHECKS:
        check(kernels, tests.np.random.default_rng(seed))
"""
    result = run_in("asan", program, str(seed))
    assert (result.returncode, result.stderr) == (0, "")


def test_orders_differ_and_repeat():
    kernels = library("faults", "plain")

    def order_of(seed: int) -> list[int]:
        """Which of the threads that write one place are last, in each of a few launches."""
        kernels.simt_set_seed(seed)
        values = []
        for _ in range(8):
            assert run(kernels, "last_writer", mended=False)[0] == 0
            values.append(int(run.values[0]))
        kernels.simt_set_seed(0)
        return values

    assert order_of(0) == [2 * 64 - 1] * 8
    assert order_of(5) == order_of(5)
    assert len({*order_of(5), *order_of(6)}) > 4


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


def run(faults: ctypes.CDLL, name: str, mended: bool, blocks: int = 2, threads: int = 64) -> tuple[int, str]:
    """Status and message of a launch; what it left of its data is in `run.values`."""
    run.values = np.empty(64, np.float32)
    status = faults.run_fault(name.encode(), int(mended), blocks, threads, pointer(run.values))
    assert status >= 0, name
    return status, faults.simt_last_message().decode()


#: (name, threads of a block if not 64, what the message holds).
FAULTS = {
    "race": [
        ("missing_barrier", 64, r"thread 32: race: write of byte 128 of .*missing_barrier<false>\(.*\)::s, which nothing orders with the "
            r"read by block 0, thread 31 at"),
        ("write_after_read", 64, "thread 31: race: read of byte 252 of dynamic shared memory, .* the write by block 0, thread 63 at"),
        ("missing_syncwarp", 64, "race: read of byte .* the write by block 0, thread"),
        ("syncwarp_of_others", 64, "race: .* the (read|write) by block 0, thread"),
        ("blocks_write_one_byte", 64, r"block 1, thread 0: race: write of .* byte 5 past the pointer in argument 0 \(at byte 0 of it\), "
            r".* the write by block 0, thread 0"),
        ("block_reads_what_another_writes", 64, "block 1, thread 0: race: .* by block 0, thread 0"),
        ("ticket_without_release", 64, "block 1, thread 0: race: read of .* the write by block 0, thread 0"),
        ("ticket_without_acquire", 64, "block 1, thread 0: race: read of .* the write by block 0, thread 0"),
        ("plain_and_atomic", 64, r"thread 1: race: write of .*\(at byte 8 of it\), .* the atomic write by block 0, thread 0"),
        ("races_by_memcpy", 64, "block 1, thread 0: race: .* by block 0, thread 0"),
        ("writes_another_threads_variable", 64, "thread 1: access to a local variable of thread 0"),
    ],
    "plain": [
        ("divergent_barrier", 64, r"(?s)block 0: no thread can go on.*threads 0-39 wait in __syncthreads, at .*"
            r"threads 40-63 wait in __syncwarp, mask 0xffffffff of warp 1, for threads 32-39, at"),
        ("ended_before_barrier", 64, r"(?s)no thread can go on.*threads 0-6, 8-63 wait in __syncthreads, at .*thread 7 has ended"),
        ("barriers_of_two_kinds", 64, "thread 32: __syncthreads_or, while other threads of the block wait in __syncthreads"),
        ("shuffle_without_a_lane", 64, r"(?s)threads 0-4, 6-31 wait in __shfl_xor_sync, mask 0xffffffff of warp 0, for thread 5, at .*"
            r"threads 5, 32-63 wait in __syncthreads"),
        ("ended_before_ballot", 64, r"(?s)threads 32, 34-63 wait in __ballot_sync, mask 0xffffffff of warp 1, for thread 33, at"),
        ("shuffles_of_two_masks", 64, r"(?s)mask 0xffffffff of warp 0, for threads 0, 2, .*30, at"),
        ("mask_without_the_caller", 64, "thread 16: __shfl_sync: mask 0x0000ffff lacks lane 16, which calls"),
        ("mask_of_lanes_that_are_not_there", 40, "thread 32: __any_sync: mask 0xffffffff names lanes that the block, with 8 in this warp, "
            "does not have"),
        ("reads_a_lane_outside_the_mask", 64, "thread 0: __shfl_sync: lane 0 reads lane 8, which mask 0x000000ff lacks"),
        ("width_that_is_no_power_of_two", 64, "thread 0: __shfl_down_sync: width 12 is not a power of two up to 32"),
        ("recursion_without_end", 64, "block 0, thread 0: stack overflow: a thread has 65536 bytes of stack"),
        ("null_pointer", 64, "block 0, thread 3: access to .*nil.*, which is not mapped"),
        ("division_by_zero", 64, "block 0, thread 0: integer division by zero"),
    ],
    "ubsan": [
        ("static_shared_beyond_the_end", 64, "block 0, thread 63: undefined behaviour: array index 64 is out of bounds"),
        ("misaligned_vector_load", 64, "undefined behaviour: misaligned address: 0x.*, for an object of type .*float4.*, "
            "16-byte aligned"),
        ("integer_overflow", 64, r"thread 63: undefined behaviour: signed integer overflow of \+"),
        ("null_pointer", 64, "block 0, thread 3: undefined behaviour: access through a null pointer"),
    ],
}  # fmt: skip
ADDRESS_FAULTS = {
    "global_read_beyond_the_end": (r"heap-buffer-overflow", "READ of size 4", "block 1, thread 63"),
    "global_write_before_the_beginning": (r"heap-buffer-overflow", "WRITE of size 4", "block 0, thread 0"),
    "dynamic_shared_beyond_the_end": (r"use-after-poison", "WRITE of size 4", "block 0, thread 63"),
}


@pytest.mark.parametrize("order", ["plain", "drawn"])
@pytest.mark.parametrize(
    "flavour, name, threads, message", [pytest.param(f, *case, id=f"{f}-{case[0]}") for f in FAULTS for case in FAULTS[f]]
)
def test_fault_is_reported(flavour, name, threads, message, order, seed):
    faults = library("faults", flavour)
    faults.simt_set_seed(seed + 1 if order == "drawn" else 0)
    status, got = run(faults, name, mended=False, threads=threads)
    faults.simt_set_seed(0)
    assert status == (ILLEGAL_ADDRESS if (flavour, name) == ("plain", "null_pointer") else LAUNCH_FAILURE)
    assert f"{name}<false>" in got.partition(": ")[0]
    assert f"{SIMT / 'faults.cu'}:" in got
    if order == "plain":  # in another order it may be another thread
        assert re.search(message, got), got
    assert run(faults, name, mended=True, threads=threads) == (0, "")  # after an error, too


@pytest.mark.parametrize("name", sorted({case[0] for cases in FAULTS.values() for case in cases} | {*ADDRESS_FAULTS}))
@pytest.mark.parametrize("flavour", IN_PROCESS)
def test_mended_kernel_is_not_reported(flavour, name, seed):
    faults = library("faults", flavour)
    threads = {case[0]: case[1] for cases in FAULTS.values() for case in cases}.get(name, 64)
    for order in (0, seed + 1, seed + 2):
        faults.simt_set_seed(order)
        assert run(faults, name, mended=True, threads=threads) == (0, "")
    faults.simt_set_seed(0)


@pytest.mark.parametrize("name", ADDRESS_FAULTS)
def test_bad_address_is_reported(name):
    program = """
import ctypes, sys
sys.exit(ctypes.CDLL(sys.argv[1]).run_fault(sys.argv[2].encode(), 0, 2, 64, (ctypes.c_float * 64)()))
"""
    result = run_in("asan", program, str(simt.library([SIMT / "faults.cu"], "asan")), name)
    assert result.returncode != 0
    for part in (*ADDRESS_FAULTS[name], f"{name}<false>", "faults.cu:"):
        assert part in result.stderr
    assert len(result.stderr) < 20_000


def test_faults_under_address_sanitizer():
    """What is no bad address is reported as elsewhere, and the process lives; nothing is wrong with what is mended."""
    program = """
import test_simt as tests
faults = tests.library("faults", "asan")
for name, threads in [(n, 64) for n in tests.ADDRESS_FAULTS] + [c[:2] for cases in tests.FAULTS.values() for c in cases]:
    assert tests.run(faults, name, mended=True, threads=threads) == (0, ""), name
for name, threads, message in tests.FAULTS["plain"]:
    if name != "null_pointer":
        status, got = tests.run(faults, name, mended=False, threads=threads)
        assert status == 719 and tests.re.search(message.replace("65536", "262144"), got), got
        assert tests.run(faults, name, mended=True, threads=threads) == (0, ""), name
print("done")
"""
    result = run_in("asan", program)
    assert result.stdout == "done\n", result.stderr


def test_uninitialised_shared_memory_is_seen():
    faults = library("faults", "plain")
    assert run(faults, "uninitialised_shared", mended=False) == (0, "")
    assert np.isnan(run.values[0::2]).all()
    assert (run.values[1::2] == 1).all()
    run(faults, "uninitialised_shared", mended=True)
    assert (run.values == 1).all()


def test_many_failures_take_no_more_memory():
    faults = library("faults", "plain")

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    for attempt in range(90):
        if attempt == 30:
            before = pages()
        assert run(faults, "mask_without_the_caller", mended=False)[0] == LAUNCH_FAILURE
    assert pages() - before < 256  # 1 MiB: the stacks of one launch are four times that


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


@pytest.mark.parametrize("flavour", simt.FLAVOURS)
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
