"""Reads a GPU binary, a cubin or a library that holds some: registers, spills, shared memory, width of memory accesses."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS_PER_MULTIPROCESSOR = 2048
#: A function and what cuobjdump says of it.
USAGE = re.compile(r" Function (\w+):\n(.*)")
MACHINE_CODE = re.compile(r"\t\tFunction : (\S+)\n(.*?)(?=\n\t\tFunction : |\Z)", re.DOTALL)


@dataclass(frozen=True)
class Code:
    """The machine code of a kernel for one architecture."""

    function: str  #: as the linker knows it
    architecture: int
    registers: int  #: of a thread
    spilled: int  #: bytes of stack and local memory a thread: what did not fit into registers
    shared: int  #: bytes of static shared memory a block
    wide: int  #: global loads and stores of 16 bytes
    accesses: int  #: all global loads and stores


def occupancy(registers: int, threads: int) -> float:
    """The fraction of a multiprocessor's threads that registers let run at once, in blocks of `threads`."""
    rounded = -(-registers // 8) * 8
    blocks = min(REGISTERS_PER_MULTIPROCESSOR // (rounded * threads), THREADS_PER_MULTIPROCESSOR // threads)
    return blocks * threads / THREADS_PER_MULTIPROCESSOR


@dataclass(frozen=True)
class Usage:
    """Registers, spills and shared memory of a kernel, without a look at its instructions."""

    registers: int  #: of a thread
    spilled: int  #: bytes of stack and local memory a thread: what did not fit into registers
    shared: int  #: bytes of static shared memory a block


def usage(path: Path) -> dict[tuple[int | None, str], Usage]:
    """Of every kernel in a binary, by architecture and function; a lone cubin names no architecture. Quick: nothing is disassembled.

    Raises FileNotFoundError where cuobjdump is neither on PATH nor in Triton's package.
    """
    found = {}
    for architecture, function, text in _functions(_dump("--dump-resource-usage", path), USAGE):
        figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
        found[architecture, function] = Usage(figures["REG"], figures["STACK"] + figures["LOCAL"], figures["SHARED"])
    return found


def disassembled(path: Path) -> str:
    """The machine code of a binary, as cuobjdump writes it. Raises as `usage`."""
    return _dump("-sass", path)


def read(path: Path, listing: str | None = None) -> list[Code]:
    """Every kernel in a binary. `listing` is what `disassembled` returned, where that is at hand. Raises as `usage`."""
    used, result = usage(path), []
    for architecture, function, text in _functions(listing or disassembled(path), MACHINE_CODE):
        figures = used.get((architecture, function)) or used[None, function]
        accesses = re.findall(r"\b(?:LDG|STG)\.E\S*", text)
        wide = sum(".128" in access for access in accesses)
        result.append(Code(function, architecture, **vars(figures), wide=wide, accesses=len(accesses)))
    return result


def _functions(listing: str, pattern: re.Pattern) -> Iterable[tuple[int | None, str, str]]:
    """(architecture, function, what `pattern` finds of it) for each function of cuobjdump's listing."""
    for part in ("\n" + listing).split("\nFatbin elf code:\n"):
        architecture = re.search(r"^(?:arch = |\tcode for )sm_(\d+)", part, re.MULTILINE)
        for function, text in pattern.findall(part):
            yield architecture and int(architecture[1]), function, text


def _dump(option: str, path: Path) -> str:
    spec = find_spec("triton")
    packaged = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else Path("cuobjdump")
    if not (tool := shutil.which("cuobjdump") or shutil.which(str(packaged))):
        raise FileNotFoundError("cuobjdump: expected on PATH (it comes with CUDA) or in Triton's package")
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
