"""The native library for CPUs, built with AddressSanitizer and UndefinedBehaviorSanitizer: its tests and those of the passes run clean.

    FUSED_RESNET_TEST_CPU_LIBRARY=… LD_PRELOAD=libasan.so:libstdc++.so.6 ASAN_OPTIONS=detect_leaks=0 pytest tests/backends/test_passes.py -k passes_cpu

runs any test with such a build (csrc/cpu/CMakeLists.txt: FUSED_RESNET_SANITIZE=ON).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkout import ROOT, TESTS, file_of
from support.simt import compile as simt

from fused_resnet import native

CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "sanitized_cpu"
TOOLS = ("cmake", "ninja")
pytestmark = [
    pytest.mark.skipif(bool(simt.why_not()), reason=str(simt.why_not())),
    pytest.mark.skipif(native.CPU.why_not() is not None, reason=f"native library for CPUs: {native.CPU.why_not()}"),
    pytest.mark.timeout(1200),
    pytest.mark.full,
]

#: An activation whose memory was taken away: the kernel reads past the end of what is left.
OUT_OF_BOUNDS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
passes = torch.ops.fused_resnet_cpu
passes.use_instruction_set(int(sys.argv[2]))
x = torch.randn(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)
if sys.argv[3] == "short":
    x.untyped_storage().resize_(4096)
passes.batch_moments(x)
print("done")
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """The library, portable and for the best that this machine has; the first build takes two minutes, a later one nothing."""
    torch_home = Path(torch.__file__).parent
    tools = {name: str(path) for name in TOOLS if (path := Path(sys.executable).parent / name).exists()}
    options = [f"-DTORCH_INCLUDE_DIRS={torch_home / 'include'}", f"-DTORCH_LIBRARY_DIR={torch_home / 'lib'}", "-DFUSED_RESNET_SANITIZE=ON"]
    options += [f"-DFUSED_RESNET_CPU_ISAS={native.best_cpu_instruction_set()}"]
    options += [f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}"] if "ninja" in tools else []
    cmake = tools.get("cmake", "cmake")
    for command in (
        [cmake, "-S", CSRC / "cpu", "-B", BUILD, "-G", "Ninja", *options, "-DCMAKE_CXX_COMPILER=g++"],
        [cmake, "--build", BUILD],
    ):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD / "libfused_resnet_cpu.so"


def process(library: Path, *arguments: object) -> subprocess.CompletedProcess:
    """A Python process that can load the library."""
    environment = simt.environment("asan") | {
        "FUSED_RESNET_TEST_CPU_LIBRARY": str(library), "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "file, chosen",
    [
        ("test_native_cpu.py", "not wide_registers and not depends_on"),
        ("test_passes.py", "passes_cpu and not offsets"),
        ("test_conv_with_passes.py", "not avx2"),  # which this build lacks, unless it is the best
    ],
)
def test_the_operators_run_clean(library, file, chosen):
    """Portable and by the best instruction set that this machine has, in every dtype: one source, compiled for each."""
    options = "-q", "--quick", "-p", "no:cacheprovider", "-p", "no:xdist"
    done = process(library, "-m", "pytest", *options, file_of(file), "-k", chosen)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and "ERROR: AddressSanitizer" not in done.stderr and "runtime error" not in done.stderr


@pytest.mark.parametrize("number", [0, -1], ids=["portable", "best"])
def test_a_read_past_the_end_is_reported(library, number):
    clean = process(library, "-c", OUT_OF_BOUNDS, library, number, "whole")
    assert (clean.returncode, clean.stdout) == (0, "done\n"), clean.stderr[-4000:]
    faulty = process(library, "-c", OUT_OF_BOUNDS, library, number, "short")
    assert faulty.returncode and "AddressSanitizer: heap-buffer-overflow" in faulty.stderr and "done" not in faulty.stdout
