#!/usr/bin/env bash
# Guess: tl.dot(..., input_precision="tf32") rounds its float32 operands to the 10 bits of TF32, to nearest.
# Fact: the operands go to the tensor core as they were loaded, on sm_80, sm_90 and sm_100: no cvt.rna.tf32 in the kernel. What happens
#     to their low 13 bits is left to the hardware, which is known to drop them (not run here, for want of a GPU): an error of up to a
#     whole last place instead of half of one, and towards zero each time. input_precision="tf32x3" does round.
# Matters: activations behind a ReLU are positive: in a sum of thousands of products the errors of cut-off operands add up, those of
#     rounded ones cancel. Beside a convolution that rounds, this looks like a wrong kernel.
# Source: triton-lang/triton#4574 has the larger error, measured.
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
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION))


print("triton", triton.__version__)
MATRIX = r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*tf32"
for capability in (80, 90, 100):
    for precision in ("tf32", "tf32x3"):
        signature = {"a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*fp32", "N": "constexpr", "PRECISION": "constexpr"}
        source = ASTSource(dot_kernel, signature, {(3,): 64, (4,): precision})
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        products, rounded = len(re.findall(MATRIX, ptx)), len(re.findall(r"cvt\.rn[a]?\.(?:satfinite\.)?tf32", ptx))
        print(f"  sm_{capability} {precision:6}: {products:3} matrix instructions, {rounded:3} conversions to TF32")
        assert products > 0
        assert (rounded > 0) == (precision == "tf32x3"), "operands are rounded now"
PYTHON
"$folder/env/bin/python" -W ignore "$folder/program.py"
