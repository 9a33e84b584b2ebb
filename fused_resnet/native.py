"""The native libraries: the passes as operators, in CUDA C++ for GPUs and in C++ for CPUs. Loading one is optional.

Importing this module loads nothing. `why_not()` of a library loads it at its first call; where it returns None, the library's namespace of
`torch.ops` holds the operators. Their schemas stand in csrc/library.cpp, the contracts of their kernels in csrc/*.cuh and csrc/cpu/*.h. The
library for GPUs loads on a machine without one; only its kernels need one.
"""

import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import environment

#: What the library for CPUs is compiled for, from the plainest to the best; numbered as in csrc/cpu/dispatch.cpp.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
#: What `use_instruction_set` chose last, and the best that there is; "" before they were asked for.
_in_use = _best = ""


class LibraryError(RuntimeError):
    """A native library can't be used. The message says why, in one sentence."""


class Library:
    """A native library beside the package, and the file that the build writes in its place: why there is none."""

    def __init__(self, name: str, namespace: str, absence: str) -> None:
        self.path = Path(__file__).with_name(f"lib{name}.so")
        self.absence = Path(__file__).with_name(absence)
        self.namespace = namespace

    @property
    def operators(self) -> Any:
        """The operators, once the library is loaded."""
        return getattr(torch.ops, self.namespace)

    @cache  # noqa: B019  (there are two, which live as long as the process)
    def why_not(self) -> str | None:
        """Why the operators can't be used, in one sentence; None where they can. The first call of a process loads the library."""
        try:
            self.load()
        except LibraryError as error:
            return str(error)
        return None

    def load(self) -> None:
        """Load the library. Raises LibraryError where it is not built or does not load."""
        if not self.path.exists():
            if self.absence.exists():
                raise LibraryError(f"not built: {self.absence.read_text(encoding='utf-8').strip()}")
            built = "`pip install --no-build-isolation` builds it or says what is missing"
            raise LibraryError(f"not built: the package holds no {self.path.name}; {built}")
        if _is_truncated(self.path):
            raise LibraryError(f"does not load: {self.path.name} is cut short")
        try:
            torch.ops.load_library(self.path)  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise LibraryError(f"does not load: {first or type(error).__name__}") from error


CUDA = Library("fused_resnet", "fused_resnet_native", "native_absent.txt")
CPU = Library("fused_resnet_cpu", "fused_resnet_cpu", "native_cpu_absent.txt")


def use_instruction_set(name: str | None = None) -> str:
    """Let the library for CPUs, which is loaded, use `name` of `INSTRUCTION_SETS`; None for the best that this machine has.

    Returns the name of what is used from now on. Raises `VariableError` for an unknown name, or one that this
    machine lacks.
    """
    if name is not None and name not in INSTRUCTION_SETS:
        raise environment.VariableError(f"FUSED_RESNET_CPU_ISA: expected one of {', '.join(INSTRUCTION_SETS)}; got {name!r}")
    number = CPU.operators.use_instruction_set(-1 if name is None else INSTRUCTION_SETS.index(name))
    if number < 0:
        raise environment.VariableError(f"FUSED_RESNET_CPU_ISA: this machine, or this build, lacks {name}")
    global _in_use, _best
    _in_use = INSTRUCTION_SETS[number]
    if name is None:
        _best = _in_use
    return _in_use


def cpu_instruction_set() -> str:
    """What the library for CPUs, which is loaded, uses: by `FUSED_RESNET_CPU_ISA`, else the best that there is, or what was set since."""
    return _in_use or use_instruction_set(environment.cpu_instruction_set())


def best_cpu_instruction_set() -> str:
    """The best that this machine and the library for CPUs, which is loaded, have, whatever is in use."""
    if not _best:
        in_use = _in_use
        use_instruction_set()
        if in_use:
            use_instruction_set(in_use)
    return _best


def release_memory() -> int:
    """Give the memory of CPU activations that no tensor has back to the system, and return its bytes.

    A step makes large tensors and drops them; what backs them is kept for the next step (csrc/cpu/memory.h). Sizes that are no longer made
    go back by themselves while others are made. Call this after training, in a process that goes on with other work. 0 where the library
    for CPUs was not loaded.
    """
    return CPU.operators.release_memory() if _in_use else 0


def _is_truncated(path: Path) -> bool:
    """Whether an ELF file ends before its section headers, which stand last. The dynamic loader would die of a bus error."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        return False  # the loader says so itself
    (table,), (entry_size, entries) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return bool(path.stat().st_size < table + entry_size * entries)
