#!/usr/bin/env bash
# Guess: tl.fma(x, y, z) rounds once everywhere, by its name; so a kernel may compare the sign of tl.fma in forward and in backward,
#     and the interpreter shows it.
# Fact: until 3.8 the interpreter multiplies and adds with NumPy, and rounds twice; that of 3.9 rounds once, as a GPU does. x * y + z, which
#     compiled code contracts to the same instruction, is rounded twice by both.
# Matters: ReLU's mask is made again in backward from z = fma(x, scale, bias). Where cancellation leaves nothing but the rounding, 3.8's
#     interpreter says 0 and masks the gradient; a GPU says 1.4e-14 and passes it. Tests that compare an interpreted kernel with
#     torch.addcmul, or bit by bit with a GPU, hold for one release of Triton only.
set -euo pipefail
source "$(dirname "$0")/fresh.bash"
fresh env torch==2.13.0 numpy==2.4.6
for version in 3.8.0 3.9.0; do
    fresh env --no-deps --upgrade --target "$folder/$version" "triton==$version"
done

cat >"$folder/program.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, y_ptr, z_ptr, fma_ptr, apart_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y, z = tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)
    tl.store(fma_ptr + at, tl.fma(x, y, z))
    tl.store(apart_ptr + at, x * y + z)


x, z = torch.full((4,), 1 + 2**-23), torch.full((4,), -(1 + 2**-22))
fma, apart = torch.empty(4), torch.empty(4)
kernel[(1,)](x, x, z, fma, apart, 4)
exact = (x.double() * x.double() + z.double())[0].item()
print(f"triton {triton.__version__} interpreted: tl.fma {fma[0].item()}, x * y + z {apart[0].item()}, exact {exact}")
assert exact == 2**-46 and apart[0] == 0
assert fma[0] == (0 if triton.__version__ == "3.8.0" else exact), "tl.fma rounds in another way"
PYTHON
for version in 3.8.0 3.9.0; do
    TRITON_INTERPRET=1 PYTHONPATH="$folder/$version" "$folder/env/bin/python" -W ignore "$folder/program.py"
done
