"""The native library: CUDA C++ kernels as operators of the namespace `fused_resnet_native`. Loading it is optional.

Importing this module loads nothing. Once `load()` has returned None, `torch.ops.fused_resnet_native` holds the operators; their
schemas stand in csrc/library.cpp, the contracts of their kernels in csrc/*.cuh. It needs no GPU to be loaded, only to be run.
"""

import struct
from functools import lru_cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libfused_resnet.so")
#: Written by the build in place of the library: why there is none.
ABSENCE = Path(__file__).with_name("native_absent.txt")


@lru_cache(maxsize=1)
def load() -> str | None:
    """Load the library, once in a process. Returns None where it is loaded, else the reason why not, in one sentence."""
    if not LIBRARY.exists():
        if ABSENCE.exists():
            return f"not built: {ABSENCE.read_text(encoding='utf-8').strip()}"
        return f"not built: the package holds no {LIBRARY.name}; `pip install --no-build-isolation` builds it or says what is missing"
    if _is_truncated(LIBRARY):
        return f"does not load: {LIBRARY.name} is cut short"
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        return f"does not load: {first or type(error).__name__}"
    return None


def _is_truncated(path: Path) -> bool:
    """Whether an ELF file ends before its section headers, which stand last. The dynamic loader would die of a bus error."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        return False  # the loader says so itself
    (table,), (entry_size, entries) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < table + entry_size * entries
