#!/usr/bin/env bash
# Guess: TRITON_INTERPRET=1 computes bfloat16 by way of float32 and rounds each result, since NumPy has no bfloat16.
# Fact: it keeps bfloat16 as 16-bit integers and, without a cast in the kernel, computes with the integers: 1 + 1 is 1.7e38, a sum of
#     16 ones is -1e34, and tl.dot of them is 4e9. Loads, stores and .to(tl.float32) are right; .to(tl.bfloat16) cuts off
#     where a GPU rounds. No warning is given. So it is in 3.6 and still in 3.9.
# Matters: "the test passes in the interpreter" says nothing of a bfloat16 kernel, and a failure there says nothing either. Test such a
#     kernel in float32 and float16.
# Source: triton-lang/triton#11584 (tl.dot) and #11604 (tl.sum); mended after 3.9.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env torch==2.13.0 numpy==2.4.6
fresh env --no-deps triton==3.9.0

cat >"$folder/program.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, sum_ptr, twice_ptr, dot_ptr, cast_ptr, wide_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x, wide = tl.load(x_ptr + at), tl.load(wide_ptr + at)
    tl.store(twice_ptr + at, x + x)
    tl.store(dot_ptr + at, tl.dot(x, x))
    tl.store(sum_ptr + tl.arange(0, N), tl.sum(x, axis=1))
    tl.store(cast_ptr + at, wide.to(tl.bfloat16))


def run(dtype):
    x, wide = torch.ones(16, 16, dtype=dtype), torch.full((16, 16), 1 + 2**-8 + 2**-10)
    total, twice, dot, cast = torch.empty(16, dtype=dtype), torch.empty_like(x), torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    kernel[(1,)](x, total, twice, dot, cast, wide, 16)
    return twice[0, 0].item(), total[0].item(), dot[0, 0].item(), cast[0, 0].item()


print(f"triton {triton.__version__} interpreted, torch {torch.__version__}")
half, brain = run(torch.float16), run(torch.bfloat16)
print("  of ones          1 + 1          sum of 16      dot of 16      1 + 5/1024 cast to bfloat16")
for name, row in (("float16", half), ("bfloat16", brain)):
    print(f"  {name:12}" + "".join(f"{value:15.6g}" for value in row))
assert half[:3] == (2, 16, 16)
assert brain[0] > 1e38 and brain[1] < -1e34 and brain[2] > 1e9, "bfloat16 is computed now"
assert torch.tensor(1 + 5 / 1024).bfloat16().item() == 1 + 2**-7 and brain[3] == 1, "the cast rounds now"
PYTHON
TRITON_INTERPRET=1 "$folder/env/bin/python" -W ignore "$folder/program.py"
