"""The kernels for CPUs under AddressSanitizer and UndefinedBehaviorSanitizer; and that a planted fault is found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simt import compile as simt

from fused_resnet import native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="cmake and ninja are not installed"),
]
TESTS = Path(__file__).resolve().parent
#: Runs pytest on the library argv[1], with the instruction set argv[2].
RUN = """
import sys
from pathlib import Path
import pytest
from fused_resnet import native
native.CPU.path = Path(sys.argv[1])
assert native.CPU.load() is None, native.CPU.load()
native.use_instruction_set(sys.argv[2])
raise SystemExit(pytest.main(sys.argv[3:]))
"""
#: A file of csrc/cpu/, what stands there, and what a fault makes of it.
FAULTS = {
    "a row too many": ("walk.h", "last(first + parts.rows_per_part < rows ? first + parts.rows_per_part : rows)", "last(first + parts.rows_per_part)"),
    "a whole block at the end of a row": ("vector.h", "body(Constant<kNarrow>{}, channel, Cut{channels - channel});", "body(Constant<kNarrow>{}, channel, Whole{});"),
    "a window past the image": ("pools.h", "window.height - top < window.size ? window.height - top : window.size", "window.size"),
}  # fmt: skip


def build(csrc: Path, folder: Path) -> Path:
    """The library of `csrc` under both sanitizers. Later builds in the same folder compile what has changed."""
    home = Path(torch.__file__).parent
    configure = (
        "cmake", "-S", csrc / "cpu", "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1",
        "-DFUSED_RESNET_SANITIZE=address,undefined", f"-DTORCH_INCLUDE_DIRS={home / 'include'}", f"-DTORCH_LIBRARY_DIR={home / 'lib'}",
    )  # fmt: skip
    for command in (configure, ("cmake", "--build", folder)):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "libfused_resnet_cpu.so"


def tests_of(library: Path, isa: str, wanted: str) -> subprocess.CompletedProcess:
    """The tests of the passes on that library, in a process of its own."""
    environment = simt.environment("asan") | {
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "2", "FUSED_RESNET_CPU_ISA": isa,
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
    command = [sys.executable, "-c", RUN, library, isa, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", TESTS / "test_passes.py", "-k", wanted]
    return subprocess.run([str(word) for word in command], env=environment, cwd=TESTS.parent, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder() -> Path:
    return TESTS.parent / "build" / "cpu_sanitized"


def test_the_passes_run_clean_on_every_instruction_set(folder):
    library = build(TESTS.parent / "csrc", folder)
    best = native.INSTRUCTION_SETS.index(native.cpu_instruction_set()) if native.CPU.load() is None else 0
    for isa in native.INSTRUCTION_SETS[: best + 1]:
        done = tests_of(library, isa, "passes_cpu and not offsets")
        assert done.returncode == 0, isa + done.stdout[-4000:] + done.stderr[-4000:]
        assert " passed" in done.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault, tmp_path):
    name, right, wrong = FAULTS[fault]
    csrc = shutil.copytree(TESTS.parent / "csrc", tmp_path / "csrc")
    text = (csrc / "cpu" / name).read_text()
    assert text.count(right) == 1, "the fault has lost its place"
    (csrc / "cpu" / name).write_text(text.replace(right, wrong))
    done = tests_of(build(csrc, tmp_path / "build"), "portable", "passes_cpu and float32 and (3x13x4x3 or 3x72x21x19)")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
