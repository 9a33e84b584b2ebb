"""What the compiler made of the native library's kernels. Needs no GPU; the library has to be built.

    python -m fused_resnet.native_kernels                    # all kernels; also `fused-resnet kernels --language cuda`
    python -m fused_resnet.native_kernels max_pool           # those whose name holds "max_pool"
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache

from . import binary, native

#: Of a block, in every kernel: kThreads in csrc/layout.h.
THREADS = 256
HEADER = ("kernel", "variant", "sm", "registers", "spilled", "shared", "threads", "occupancy", "16-byte")
#: Template arguments as the compiler writes them, and as the table does.
WORDS = (
    (r"fused_resnet::", ""), (r"\(bool\)1|\btrue\b", "yes"), (r"\(bool\)0|\bfalse\b", "no"), (r"\(int\)", ""),
    (r"__nv_bfloat16", "bfloat16"), (r"__half", "float16"), (r"\bfloat\b", "float32"), (r"\(Residual\)0", "no residual"),
    (r"\(Residual\)1", "residual"), (r"\(Residual\)2", "raw residual"), (r"\(Mask\)0", "no ReLU"), (r"\(Mask\)1", "mask recomputed"),
    (r"\(Mask\)2", "mask bits"), (r"Window<0, 0, 0>", "any window"), (r"Window<3, 2, 1>", "3x3/2"), (r"(\w+)Gradient<\w+>", r"\1"),
    (r"(\w+)Gradient<\w+, (\S+|any window) ?>", r"\1 \2"),
)  # fmt: skip


def codes() -> list[binary.Code]:
    """The machine code of every kernel. Raises FileNotFoundError where there is no library, or no cuobjdump."""
    if not native.LIBRARY.exists():
        raise FileNotFoundError(f"the native library is not built: {native.load()}")
    return _read(native.LIBRARY)


_read = lru_cache(maxsize=1)(binary.read)  # disassembling takes seconds


def readable(functions: list[str]) -> list[tuple[str, str]]:
    """(kernel, variant) of each mangled name; the variant is empty where c++filt is missing."""
    if shutil.which("c++filt"):
        text = "\n".join(functions)
        functions = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    names = []
    for name in functions:
        found = re.search(r"(\w+_kernel)(?:<(.*)>)?\(", name)
        kernel, variant = (found[1], found[2] or "") if found else (name, "")
        for pattern, word in WORDS:
            variant = re.sub(pattern, word, variant)
        names.append((kernel, variant))
    return names


def rows(name: str = "") -> Iterator[tuple[str, ...]]:
    """The lines of the table, in the order of `HEADER`. The last column: accesses of 16 bytes, of all to global memory.

    A variant: the element type, the elements of a load, and the options of the kernel's template in their order.
    """
    found = codes()
    lines = [(kernel, variant, code) for code, (kernel, variant) in zip(found, readable([c.function for c in found]), strict=True)]
    for kernel, variant, code in sorted(lines, key=lambda line: (line[0], line[1], line[2].architecture)):
        if name in kernel:
            yield (
                kernel, variant, str(code.architecture), str(code.registers), str(code.spilled), str(code.shared), str(THREADS),
                f"{binary.occupancy(code.registers, THREADS):.0%}", f"{code.wide}/{code.accesses}",
            )  # fmt: skip


def names() -> list[str]:
    """The names of all kernels."""
    return sorted({kernel for kernel, _ in readable([code.function for code in codes()])})


def table(name: str = "") -> str | None:
    """The table as text; None where no kernel's name holds `name`."""
    lines = [HEADER, *rows(name)]
    return binary.aligned(lines) if len(lines) > 1 else None


if __name__ == "__main__":
    print(table(*sys.argv[1:2]) or f"no kernel has that in its name; there are {', '.join(names())}")
