"""The kernels for CPUs, portable, compiled for aarch64 and run by an emulator: the same bits as on this machine.

On Debian: apt-get install g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user. Without these the tests are skipped. What PyTorch stands behind, the operators, needs
its library for aarch64 and is not compiled here.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from support.checkout import ROOT, TESTS

CPU = ROOT / "csrc" / "cpu"
SYSROOT = Path("/usr/aarch64-linux-gnu")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
CROSS = shutil.which("aarch64-linux-gnu-g++")
#: As in csrc/cpu/CMakeLists.txt.
FLAGS = (
    "-std=gnu++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-DFUSED_RESNET_ISA=portable", "-Wall", "-Wextra",
    "-Wno-missing-field-initializers", "-Wno-parentheses", "-Wno-psabi", "-Werror",
)  # fmt: skip
pytestmark = [
    pytest.mark.skipif(not (CROSS and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64"),
    pytest.mark.timeout(600),
]


def output(compiler: str, folder: Path, *runner: str) -> str:
    """What the driver prints, compiled by `compiler` and run by `runner`."""
    program = folder / "driver"
    subprocess.run(
        [compiler, *FLAGS, f"-I{CPU}", TESTS / "support" / "aarch64" / "driver.cpp", CPU / "kernels.cpp", "-o", program], check=True
    )
    return subprocess.run([*runner, program], check=True, capture_output=True, text=True).stdout


@pytest.mark.full
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64")
def test_an_aarch64_machine_gives_the_same_bits(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = output("g++", tmp_path / "here")
    there = output(CROSS, tmp_path / "there", EMULATOR, "-L", str(SYSROOT))
    assert here.count("\n") == 9 * 23
    assert there.splitlines() == here.splitlines()
