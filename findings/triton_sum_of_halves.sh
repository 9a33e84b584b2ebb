#!/usr/bin/env bash
# Guess: tl.sum of a float16 or bfloat16 block adds in float32, as torch.sum does, and rounds once at the end. Where the compiler
#     changes, the sum stays.
# Fact: it adds in the block's own dtype. A thread's values, the warps' shuffles and the last step over shared memory are half-precision
#     additions: no instruction of the kernel widens to float32. Only small integers are widened by tl.sum. From 3.6 to 3.9 the additions
#     also changed places: of two halves packed in a register, so the same kernel on the same input rounds differently.
# Matters: the statistics of a batch norm and the sums of its backward are such sums: each step keeps 11 bits in float16, 8 in bfloat16, and
#     float16 overflows past 65504. Write tl.sum(x.to(tl.float32)).
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh old triton==3.6.0
fresh new triton==3.9.0

cat >"$folder/program.py" <<'PYTHON'
import collections
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), axis=0))


def instructions(dtype):
    source = ASTSource(sum_kernel, {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "N": "constexpr"}, {(2,): 4096})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    return collections.Counter(re.findall(r"\b(?:add|cvt)\.(?:rn\.)?(?:b?f16x2|b?f16|f32)\b[.\w]*", ptx))


print(f"triton {triton.__version__}, sm_90, 4096 values, 4 warps")
for dtype in ("fp16", "bf16"):
    found = instructions(dtype)
    print(f"  tl.sum of {dtype}: {dict(found)}")
    half = dtype.replace("p", "")
    assert set(found) <= {f"add.{half}", f"add.{half}x2"}, "something is widened to float32 now"
    assert (found[f"add.{half}x2"] > 0) == (sys.argv[1] == "packed"), "the additions are in other places"
widened = instructions("fp32")
assert set(widened) == {"add.f32"}, widened
PYTHON
"$folder/old/bin/python" "$folder/program.py" single
"$folder/new/bin/python" -W ignore "$folder/program.py" packed
