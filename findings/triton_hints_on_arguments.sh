#!/usr/bin/env bash
# Guess: tl.assume(n % 16 == 0), or n = tl.multiple_of(n, 16), tells the compiler what it needs to load 16 bytes at a time behind the
#     mask "offset < n". The same hints on a row's stride, or tl.multiple_of on a pointer, do as much.
# Fact: on a kernel's arguments neither changes an instruction, and nothing warns. What does: the specialisation of the argument that the
#     launcher makes (tt.divisibility, when the value is a multiple of 16), the hint on the *block* of pointers, or the arithmetic that
#     contains the fact: n = n // 16 * 16.
# Matters: with do_not_specialize, and compiled ahead of time without attributes, a pass over memory issues four times the loads and stores,
#     and the hints that look like the cure do nothing, silently.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env triton==3.9.0

cat >"$folder/program.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def masked_kernel(x_ptr, out_ptr, n, HINT: tl.constexpr):
    if HINT == "assume":
        tl.assume(n % 16 == 0)
    if HINT == "multiple_of":
        n = tl.multiple_of(n, 16)
    if HINT == "arithmetic":
        n = n // 16 * 16
    at = tl.arange(0, 1024)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def rows_kernel(x_ptr, out_ptr, n, HINT: tl.constexpr):
    if HINT == "assume":
        tl.assume(n % 16 == 0)
    if HINT == "multiple_of":
        n = tl.multiple_of(n, 16)
    if HINT == "arithmetic":
        n = n // 16 * 16
    at = tl.arange(0, 32)[:, None] * n + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def pointer_kernel(x_ptr, out_ptr, n, HINT: tl.constexpr):
    if HINT == "multiple_of":
        x_ptr, out_ptr = tl.multiple_of(x_ptr, 16), tl.multiple_of(out_ptr, 16)
    x_at, out_at = x_ptr + tl.arange(0, 1024), out_ptr + tl.arange(0, 1024)
    if HINT == "block":
        x_at, out_at = tl.multiple_of(x_at, 16), tl.multiple_of(out_at, 16)
    tl.store(out_at, tl.load(x_at))


def widths(kernel, hint, specialised):
    """Values that a load and a store move at a time."""
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "HINT": "constexpr"}
    attributes = {(i,): [["tt.divisibility", 16]] for i in specialised}
    source = ASTSource(kernel, signature, {(3,): hint}, attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    return sorted({int(v or 1) for v in re.findall(r"\b(?:ld|st)\.global(?:\.v(\d))?\.b32", ptx)})


print(f"triton {triton.__version__}, sm_90, float32: values that an instruction moves")
for kernel, pointers in ((masked_kernel, (0, 1)), (rows_kernel, (0, 1)), (pointer_kernel, ())):
    name = kernel.__name__.removesuffix("_kernel")
    hints = {"masked": ("none", "assume", "multiple_of", "arithmetic"), "rows": ("none", "assume", "multiple_of", "arithmetic"),
             "pointer": ("none", "multiple_of", "block")}[name]
    for hint in hints:
        found = widths(kernel, hint, pointers)
        print(f"  {name:8} {hint:12} {found}")
        assert found == ([4] if hint in ("arithmetic", "block") else [1]), "hints count now"
    found = widths(kernel, "none", (0, 1, 2))
    print(f"  {name:8} {'specialised':12} {found}")
    assert found == [4]
PYTHON
"$folder/env/bin/python" -W ignore "$folder/program.py"
