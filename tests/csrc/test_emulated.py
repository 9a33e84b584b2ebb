"""The CUDA kernels under AddressSanitizer, UndefinedBehaviorSanitizer and the SIMT shim's race detector; and that each finds a fault."""

import os
import shutil
import subprocess
import sys

import pytest
from support import emulated
from support.checkout import ROOT, TESTS, file_of
from support.simt import compile as simt

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=simt.why_not() or "")
#: Calls one operator of the library argv[1] on tensors with more rows than one block takes, some of them not aligned to 16 bytes.
CALL = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.fused_resnet_emulated
flat = torch.randn(3 * 20 * 20 * 64 + 1)
x = flat[1:].view(3, 20, 20, 64).permute(0, 3, 1, 2)
aligned = x.clone(memory_format=torch.channels_last)
mean, invstd, _, scale, bias = ops.batch_stats(aligned, None, None, 1e-5)
ops.norm_backward_reduce(aligned, None, aligned, mean, invstd, scale, bias, None, None, None, None, True)
ops.norm_add_act(x, scale, bias, x, None, None, True, True)
ops.norm_act_max_pool(aligned, scale, bias, 3, 2, 1)
"""
#: A file of csrc/, what stands there, what a fault makes of it, and what is reported under which flavour.
FAULTS = {
    "sums without their barrier": ("reduce.cuh", "  __syncthreads();\n  const int t = threadIdx.x;", "  const int t = threadIdx.x;", "race", "race: "),
    "moments without their barrier": ("batch_stats.cuh", "  __syncthreads();\n", "", "race", "race: "),
    "blocks that share a row": ("reduce.cuh", "first + tile.rows_per_part < rows ? first + tile.rows_per_part", "first + tile.rows_per_part + 1 < rows ? first + tile.rows_per_part + 1", "race", "race: "),
    "a row too many": ("reduce.cuh", "first + tile.rows_per_part : rows)", "first + tile.rows_per_part : rows + 1)", "asan", "heap-buffer-overflow"),
    "a window past the image": ("max_pool.cuh", "if (top + r < 0 || top + r >= geometry.height) continue;", "", "asan", "heap-buffer-overflow"),
    "16 bytes at any address": ("launch.h", "channels % kWide == 0 && pointers_aligned", "channels % kWide == 0", "ubsan", "misaligned"),
    "a slab that is too small": ("reduce.cuh", "constexpr int kSlab = kWideColumns * kGroup;", "constexpr int kSlab = 32;", "ubsan", "out of bounds"),
}  # fmt: skip


def process(flavour: str, *arguments) -> subprocess.CompletedProcess:
    """A Python process that can load a library of that flavour."""
    environment = simt.environment(flavour) | {
        "SIMT_FLAVOUR": flavour,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("flavour", ["asan", "ubsan", "race"])
def test_the_passes_run_clean(flavour):
    emulated.build(flavour=flavour)
    wanted = "emulated and (float16 or 3x13x4x3-float32) and not offsets"
    done = process(flavour, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file_of("test_passes.py"), "-k", wanted)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", [pytest.param(f, marks=[] if i in (0, 3) else pytest.mark.slow) for i, f in enumerate(FAULTS)])
def test_a_planted_fault_is_reported(fault, tmp_path):
    name, right, wrong, flavour, message = FAULTS[fault]
    csrc = shutil.copytree(emulated.CSRC, tmp_path / "csrc")
    text = (csrc / name).read_text()
    assert text.count(right) == 1, "the fault has lost its place"
    (csrc / name).write_text(text.replace(right, wrong))
    done = process(flavour, "-c", CALL, emulated.build(csrc, flavour))
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.full
@pytest.mark.parametrize("flavour", ["asan", "ubsan", "race"])
def test_without_a_fault_nothing_is_reported(flavour):
    done = process(flavour, "-c", CALL, emulated.build(flavour=flavour))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
