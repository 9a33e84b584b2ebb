"""What the compiler made of the native library's kernels, and what they move and compute. Needs the built library, and no GPU.

fused-resnet kernels --language cuda                             # all kernels
fused-resnet kernels --language cuda --name max_pool             # those whose name holds "max_pool"
fused-resnet kernels --language cuda --page docs/kernels/cuda.md # the table of that page
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from . import binary, native
from .files import with_section

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
    if not native.CUDA.path.exists():
        raise FileNotFoundError(f"the native library is not built: {native.CUDA.why_not()}")
    return _read(native.CUDA.path)


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


# ---- the page --------------------------------------------------------------------------------------------------------

COMMAND = "fused-resnet kernels --language cuda --page docs/kernels/cuda.md"
#: What a backward reduction's gradient is made of: (words, what is read in units of rows * C, FLOPs an element).
GRADIENTS = {
    "Plain": ("d", "e", 0.0),
    "Summed": ("d + dact", "2e", 1.0),
    "Averaged": ("average pool", "", 1.0),
    "MaxPooled 3x3/2": ("max pool 3×3/2", "(e + 1)/4", 9 / 4),
    "MaxPooled any window": ("max pool, any window", "(e + 1)/stride²", None),
}
MASKS = {"no ReLU": ("no ReLU", "", 0), "mask bits": ("mask bits", "1/8", 0), "mask recomputed": ("mask recomputed", "", 3)}
#: Of the addition of a residual: FLOPs an element.
RESIDUALS = {"no residual": 0, "residual": 1, "raw residual": 3}


def contract(kernel: str, variant: list[str]) -> tuple[str, str, str, str]:
    """(options in words, bytes read, bytes written, FLOPs) of a kernel; the last three for an element of [rows, C].

    Elements have e bytes; vectors of C values and partial sums are left out. FLOPs are counted as csrc/elements.cuh says.
    """
    if kernel == "batch_stats":
        return "", "e", "", "7"
    if kernel == "norm_backward_apply":
        return "", "2e", "e", "5"
    if kernel == "norm_act_max_pool":
        stem = variant[0] == "3x3/2"
        return ("3×3/2", "e", "(e + 1)/4", "13.5") if stem else ("any window", "e", "(e + 1)/stride²", "6·(size/stride)²")
    if kernel == "norm_add_act":
        residual, relu, mask = variant[0], variant[1] == "yes", variant[2] == "yes"
        words = _joined(", ", "" if residual == "no residual" else residual, "ReLU" * relu, "mask" * mask)
        return words, _sum("e", "e" * (residual != "no residual")), _sum("e", "1/8" * mask), str(2 + RESIDUALS[residual] + relu)
    if kernel == "norm_add_act_avg_pool":
        residual, mask = variant[0], variant[1] == "yes"
        words = _joined(", ", "" if residual == "no residual" else residual, "mask" * mask)
        return words, _sum("e", "e" * (residual != "no residual")), "1/8" * mask, str(4 + RESIDUALS[residual])
    if kernel == "norm_backward_reduce":
        (gradient, given, added), (mask, bits, recomputed), raw = GRADIENTS[variant[0]], MASKS[variant[1]], variant[2] == "yes"
        flops = "7 + (size/stride)²" if added is None else f"{4 + added + recomputed + 3 * raw:g}"
        return _joined(", ", gradient, mask, "raw residual" * raw), _sum("e", given, "e" * raw, bits), "e", flops
    return "", "", "", ""  # those that merge partial results


def _joined(between: str, *parts: str) -> str:
    return between.join(filter(None, parts))


def _sum(*terms: str) -> str:
    """A sum of bytes, those of whole elements first: "3e + 1/8"."""
    whole = sum({"e": 1, "2e": 2}.get(term, 0) for term in terms)
    return _joined(" + ", "e" if whole == 1 else f"{whole}e", *(term for term in terms if term not in ("e", "2e")))


def section(element: str = "bfloat16", width: int = 8) -> str:
    """The page's table: every kernel for that element type, with loads of `width` elements, both architectures in a cell."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    spilled = count = 0
    for row in (dict(zip(HEADER, values, strict=True)) for values in rows()):
        spilled, count = spilled + int(row["spilled"]), count + 1
        dtype, _, options = row["variant"].partition(", ")
        if dtype in ("", element) and options.partition(", ")[0] in ("", str(width)):
            found.setdefault((row["kernel"].removesuffix("_kernel"), options.partition(", ")[2].strip()), []).append(row)
    lines = [
        f"{compiler()}, {element}, loads of {width} elements; of two figures the first is of sm_80, the second of sm_90a. All {count} "
        f"variants of both, of every element type, with and without 16-byte loads: {spilled} bytes spilled or on a stack.",
        "",
        "| kernel | options | reads | writes | FLOPs | registers | shared, bytes | occupancy | 16-byte accesses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (kernel, variant), of_kernel in found.items():
        figures = (" / ".join(dict.fromkeys(row[name] for row in of_kernel)) for name in ("registers", "shared", "occupancy", "16-byte"))
        cells = (f"`{kernel}`", *contract(kernel, variant.split(", ")), *figures)
        lines.append("| " + " | ".join(cell or "-" for cell in cells) + " |")
    return "\n".join(lines)


def compiler() -> str:
    """The compiler that made the library, as it wrote its name there."""
    found = re.search(rb"Cuda compilation tools, release ([\d.]+, V[\d.]+)", native.CUDA.path.read_bytes())
    return f"nvcc {found[1].decode()}" if found else "an unknown compiler"


def write_page(path: Path) -> None:
    """Put the table into a page, between its marks. Raises ValueError where it has none."""
    try:
        text = with_section(path.read_text(encoding="utf-8"), COMMAND, section())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    path.write_text(text, encoding="utf-8")
